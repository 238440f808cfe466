"""Where scalars, pictures and raw maps go: every logger of the trainer, and a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lightning_utilities.core.rank_zero import rank_zero_warn

from vit_explain_callback.lightning._compat import Logger, TensorBoardLogger
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.tracking.report import Report
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.tracking.tensorboard import add_file, add_lines, final_tags, lay_out_margin_charts
from vit_explain_callback.visualization.encode import png
from vit_explain_callback.visualization.overlay import Picture

Show: TypeAlias = Callable[[str, Picture, int], Any]


class Writer:
    """Writes scalars to every logger, pictures to those that can show them, and raw maps to a folder.

    Where no logger shows pictures, the latest of each tag is kept in the folder as a PNG file, which is said once. What
    cannot be written is said once for each logger and for the folder, and tried again next time.

    Args:
        loggers: The trainer's loggers; may be empty.
        folder: Of the run, or None to write no file.
        settings: Say whether raw maps go to the folder, and what becomes of an error that a logger or the disk raises.
    """

    def __init__(self, loggers: Sequence[Logger], folder: Path | None, settings: Settings) -> None:
        self._loggers = loggers
        self._folder = folder
        self._settings = settings
        self._said: set[str] = set()
        self._written: set[tuple[int, str]] = set()
        self._files_show = folder is not None and all(_show(logger) is None for logger in loggers)
        if self._files_show:
            rank_zero_warn(
                "ViTExplainCallback: no logger of this run shows pictures, as `TensorBoardLogger` does; the latest of "
                f"each are PNG files in {folder}."
            )

    def begin(self, report: Report) -> None:
        """Write what stays the same for the whole run."""
        if self._settings.margin_charts:
            methods = [method.name for method in self._settings.methods]
            self._each_tensorboard(lambda experiment: lay_out_margin_charts(experiment, methods))
        if self._settings.save_maps:
            self._to_folder(lambda folder: report.save(folder / "probe.safetensors"))

    def write(self, snapshot: Snapshot, scalars: Mapping[str, float], pictures: Sequence[tuple[str, Picture]]) -> None:
        """Write a snapshot with its scalars and pictures by tag."""
        self._written = {(snapshot.step, tag) for tag in scalars}
        self._each_logger(lambda logger: _log(logger, snapshot.step, scalars, pictures))
        self._to_folder(lambda folder: self._save(folder, snapshot, pictures))

    def conclude(
        self,
        snapshot: Snapshot,
        scalars: Mapping[str, float],
        text: str,
        animations: Iterable[tuple[str, bytes]],
    ) -> None:
        """Write what is known at the end only: more scalars of the last snapshot, final values, text and animations."""
        values = {tag: value for tag, value in scalars.items() if (snapshot.step, tag) not in self._written}
        values |= {final: scalars[tag] for final, tag in final_tags(self._settings).items() if tag in scalars}
        moving = list(animations)

        def to_tensorboard(experiment: Any) -> None:
            add_lines(experiment, "explain_verdict", text, snapshot.step)
            for tag, gif in moving:
                add_file(experiment, tag, gif, snapshot.step)
            experiment.flush()

        def to_folder(folder: Path) -> None:
            self._save(folder, snapshot, ())
            if self._settings.save_maps:
                (folder / "verdict.txt").write_text(text + "\n", encoding="utf-8")
            if self._files_show:
                for tag, gif in moving:
                    (folder / f"{tag.replace('/', '-')}.gif").write_bytes(gif)

        print(text)
        self._each_logger(lambda logger: logger.log_metrics(dict(values), step=snapshot.step))
        self._each_tensorboard(to_tensorboard)
        self._to_folder(to_folder)

    def _each_logger(self, write: Callable[[Logger], None]) -> None:
        for index, logger in enumerate(self._loggers):
            self._attempt(f"{type(logger).__name__} (logger {index})", partial(write, logger))

    def _each_tensorboard(self, write: Callable[[Any], None]) -> None:
        self._each_logger(lambda logger: write(logger.experiment) if isinstance(logger, TensorBoardLogger) else None)

    def _to_folder(self, write: Callable[[Path], None]) -> None:
        folder = self._folder
        if folder is not None and (self._settings.save_maps or self._files_show):

            def make_and_write() -> None:
                folder.mkdir(parents=True, exist_ok=True)
                write(folder)

            self._attempt(f"the folder {folder}", make_and_write)

    def _attempt(self, place: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            if self._settings.on_error == "raise":
                raise
            if place not in self._said:
                self._said.add(place)
                rank_zero_warn(f"ViTExplainCallback cannot write to {place}, and training goes on: {error!r}.")

    def _save(self, folder: Path, snapshot: Snapshot, pictures: Sequence[tuple[str, Picture]]) -> None:
        if self._settings.save_maps:
            snapshot.save(folder / f"step_{snapshot.step:08d}.safetensors")
        if self._files_show:
            for tag, picture in pictures:
                (folder / f"{tag.replace('/', '-')}.png").write_bytes(png(picture))


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
    if isinstance(logger, TensorBoardLogger):
        return lambda tag, picture, step: add_file(experiment, tag, png(picture), step)
    if hasattr(experiment, "add_image"):  # other writers of TensorBoard's files
        return lambda tag, picture, step: experiment.add_image(tag, picture, step, dataformats="HWC")
    if hasattr(any_logger, "log_image"):  # Weights & Biases
        return lambda tag, picture, step: any_logger.log_image(key=tag, images=[picture], step=step)
    if not hasattr(experiment, "log_image"):
        return None
    if getattr(any_logger, "run_id", None) is not None:  # MLflow, whose client serves any run
        return lambda tag, picture, step: experiment.log_image(any_logger.run_id, picture, key=tag, step=step)
    return lambda tag, picture, step: experiment.log_image(picture, name=tag, step=step)  # Comet
