"""Write to any Lightning logger, as far as it can show pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from vit_explain_callback.lightning._compat import LightningModule, Logger, Trainer, is_kind
from vit_explain_callback.tracking.writers import TensorBoardWriter
from vit_explain_callback.visualization.overlay import Picture

Show: TypeAlias = Callable[[str, Picture, int], Any]


class LoggerWriter:
    """Writes scalars to a logger, and pictures if there is a way to show them.

    Args:
        logger: Any logger of Lightning.
        index: Of it among those of the trainer.
        margin_charts: Methods for the charts of a TensorBoard's custom scalars pane.
        max_pictures_mb: Megabytes that all pictures may take in a TensorBoard's event file.
    """

    def __init__(
        self, logger: Logger, index: int, margin_charts: Sequence[str] = (), max_pictures_mb: float = math.inf
    ) -> None:
        self._logger = logger
        self._index = index
        any_logger: Any = logger
        self._board: TensorBoardWriter | None = None
        if is_kind(logger, "TensorBoardLogger"):
            self._board = TensorBoardWriter(any_logger.experiment, margin_charts, max_pictures_mb)

    def __repr__(self) -> str:
        return f"{type(self._logger).__name__} (logger {self._index})"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log each scalar."""
        self._logger.log_metrics(dict(values), step=step)

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Show each picture; nothing where the logger cannot."""
        if self._board is not None:
            self._board.pictures(pictures, step)
        elif (show := _show(self._logger)) is not None:
            for tag, picture in pictures.items():
                show(tag, picture, step)

    def finish(self, summary: str, pictures: Mapping[str, Picture], animations: Mapping[str, bytes], step: int) -> None:
        """Show the last pictures; add summary and animations, which only TensorBoard takes."""
        if self._board is not None:
            self._board.finish(summary, pictures, animations, step)
        else:
            self.pictures(pictures, step)


def shows_pictures(logger: Logger) -> bool:
    """Whether there is a way to give a logger pictures."""
    return is_kind(logger, "TensorBoardLogger") or _show(logger) is not None


def declare_final_metrics(trainer: Trainer, pl_module: LightningModule, tags: Iterable[str]) -> None:
    """Make the HParams pane show the final values, if the module has hyperparameters to show there.

    Of several declarations in a run TensorBoard takes the first, so this must come before Lightning's own.
    """
    if trainer.is_global_zero and pl_module.hparams_initial and not getattr(trainer, "fast_dev_run", False):
        for logger in trainer.loggers:
            if is_kind(logger, "TensorBoardLogger"):
                logger.log_hyperparams(pl_module.hparams_initial, dict.fromkeys(tags, float("nan")))


def _show(logger: Logger) -> Show | None:
    """How to give a logger a picture, (H, W, 3) bytes; None if there is no way."""
    any_logger: Any = logger
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # other writers of TensorBoard's files
        return lambda tag, picture, step: experiment.add_image(tag, picture, step, dataformats="HWC")
    if hasattr(any_logger, "log_image"):  # Weights & Biases
        return lambda tag, picture, step: any_logger.log_image(key=tag, images=[picture], step=step)
    if not hasattr(experiment, "log_image"):
        return None
    if getattr(any_logger, "run_id", None) is not None:  # MLflow, whose client serves any run
        return lambda tag, picture, step: experiment.log_image(any_logger.run_id, picture, key=tag, step=step)
    return lambda tag, picture, step: experiment.log_image(picture, name=tag, step=step)  # Comet
