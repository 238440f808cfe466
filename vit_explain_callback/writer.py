"""Where scalars, pictures and raw maps go: the trainer's loggers, TensorBoard first, and a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from vit_explain_callback._lightning import Logger
from vit_explain_callback.overlay import Picture
from vit_explain_callback.snapshot import Snapshot


class Writer:
    """Writes scalars to every logger, pictures to those that can show them, and raw maps to a folder.

    Args:
        loggers: The trainer's loggers; may be empty, which is said once.
        folder: Where raw maps are saved, or None to save none. If it cannot be written, that is said once, and the
            rest goes on.
    """

    def __init__(self, loggers: Sequence[Logger], folder: Path | None) -> None:
        self._loggers = loggers
        self._folder = folder
        experiments = [getattr(logger, "experiment", None) for logger in loggers]
        self._boards: list[Any] = [experiment for experiment in experiments if hasattr(experiment, "add_image")]
        if not self._boards:
            rank_zero_warn(
                "ViTExplainCallback found no TensorBoardLogger, so its pictures are not shown anywhere; "
                + (f"raw maps are saved in {folder}." if folder else "raw maps are not saved either.")
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by tag."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step=step)

    def picture(self, tag: str, picture: Picture, step: int) -> None:
        """Log one picture."""
        for board in self._boards:
            board.add_image(tag, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Make what was written visible to readers of the event file."""
        for board in self._boards:
            board.flush()

    def maps(self, snapshot: Snapshot) -> None:
        """Save the raw maps of a snapshot as `step_00000123.safetensors`."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            snapshot.save(self._folder / f"step_{snapshot.step:08d}.safetensors")
        except Exception as error:  # safetensors has its own exception for a failed write
            rank_zero_warn(f"ViTExplainCallback cannot save raw maps in {self._folder} and goes on without: {error!r}.")
            self._folder = None
