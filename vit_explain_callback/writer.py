"""Where scalars, pictures and raw maps go: every logger of the trainer, and a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image

from vit_explain_callback._lightning import Logger
from vit_explain_callback.overlay import Picture
from vit_explain_callback.snapshot import Snapshot

Show: TypeAlias = Callable[[str, Picture, int], Any]


class Writer:
    """Writes scalars to every logger, pictures to those that can show them, and raw maps to a folder.

    Where no logger shows pictures, the latest of each tag is kept in the folder as a PNG file, which is said once. What
    cannot be written is said once for each logger and for the folder, and tried again next time.

    Args:
        loggers: The trainer's loggers; may be empty.
        folder: Of the run, or None to write no file.
        save_maps: Whether raw maps go to the folder.
        on_error: `"raise"` raises what a logger or the disk raises, `"warn"` only says it.
    """

    def __init__(self, loggers: Sequence[Logger], folder: Path | None, save_maps: bool, on_error: str) -> None:
        self._loggers = loggers
        self._folder = folder
        self._save_maps = save_maps
        self._on_error = on_error
        self._said: set[str] = set()
        self._files_show = folder is not None and all(_show(logger) is None for logger in loggers)
        if self._files_show:
            rank_zero_warn(
                "ViTExplainCallback: no logger of this run shows pictures, as `TensorBoardLogger` does; the latest of "
                f"each are PNG files in {folder}."
            )

    def write(self, snapshot: Snapshot, scalars: Mapping[str, float], pictures: Sequence[tuple[str, Picture]]) -> None:
        """Write a snapshot with its scalars and pictures by tag."""
        for index, logger in enumerate(self._loggers):
            name = f"{type(logger).__name__} (logger {index})"
            self._attempt(name, partial(_log, logger, snapshot.step, scalars, pictures))
        if self._folder is not None:
            self._attempt(f"the folder {self._folder}", partial(self._files, snapshot, pictures))

    def _attempt(self, place: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            if self._on_error == "raise":
                raise
            if place not in self._said:
                self._said.add(place)
                rank_zero_warn(f"ViTExplainCallback cannot write to {place}, and training goes on: {error!r}.")

    def _files(self, snapshot: Snapshot, pictures: Sequence[tuple[str, Picture]]) -> None:
        assert self._folder is not None
        if self._save_maps or self._files_show:
            self._folder.mkdir(parents=True, exist_ok=True)
        if self._save_maps:
            snapshot.save(self._folder / f"step_{snapshot.step:08d}.safetensors")
        if self._files_show:
            for tag, picture in pictures:
                Image.fromarray(picture).save(self._folder / f"{tag.replace('/', '-')}.png")


def _log(logger: Logger, step: int, scalars: Mapping[str, float], pictures: Sequence[tuple[str, Picture]]) -> None:
    logger.log_metrics(dict(scalars), step=step)
    show = _show(logger)
    if show is None:
        return
    for tag, picture in pictures:
        show(tag, picture, step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "flush"):  # so that an open TensorBoard sees the snapshot at once
        experiment.flush()


def _show(logger: Logger) -> Show | None:
    """How to give a logger a picture, (H, W, 3) bytes; None if there is no way."""
    any_logger: Any = logger
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        return lambda tag, picture, step: experiment.add_image(tag, picture, step, dataformats="HWC")
    if hasattr(any_logger, "log_image"):  # Weights & Biases
        return lambda tag, picture, step: any_logger.log_image(key=tag, images=[picture], step=step)
    if not hasattr(experiment, "log_image"):
        return None
    if getattr(any_logger, "run_id", None) is not None:  # MLflow, whose client serves any run
        return lambda tag, picture, step: experiment.log_image(any_logger.run_id, picture, key=tag, step=step)
    return lambda tag, picture, step: experiment.log_image(picture, name=tag, step=step)  # Comet
