"""Write to any Lightning logger: scalars, and pictures, text and files if it takes them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vit_explain_callback.lightning._compat import Logger, is_kind
from vit_explain_callback.lightning.run_folder import local_path
from vit_explain_callback.tracking.run_folder import check_space
from vit_explain_callback.tracking.tags import PREFIX, with_prefix
from vit_explain_callback.tracking.writers import RunEnd, TensorBoardWriter
from vit_explain_callback.visualization.overlay import Picture

T = TypeVar("T")
Show: TypeAlias = Callable[[str, Picture, int], Any]


class LoggerWriter:
    """Writes scalars to a logger, and pictures if there is a way to show them.

    Args:
        logger: Any logger of Lightning.
        index: Its index among the loggers of the trainer.
        margin_charts: Methods to chart in TensorBoard's custom scalars pane.
        max_pictures_mb: Megabytes that all pictures may take in TensorBoard's event file.
        prefix: Prefix of the tags instead of `explain/`, if several callbacks share a logger.
        logged: The last step that the logger has values of; values up to it are not logged again.

    Attributes:
        shows_pictures: Whether the logger takes pictures.

    Raises:
        Exception: Whatever the logger raises when its experiment is created.
    """

    def __init__(
        self,
        logger: Logger,
        index: int,
        margin_charts: Sequence[str] = (),
        max_pictures_mb: float = math.inf,
        prefix: str = PREFIX,
        logged: int = -1,
    ) -> None:
        self._logger = logger
        self._logged = logged
        self._index = index
        self._prefix = prefix
        any_logger: Any = logger
        is_board = is_kind(logger, "TensorBoardLogger")
        directory = any_logger.log_dir if is_board else logger.save_dir
        self._directory = None if directory is None else local_path(directory)
        self._check_space()
        self._board = (
            TensorBoardWriter(any_logger.experiment, margin_charts, max_pictures_mb, prefix) if is_board else None
        )
        self._show = None if is_board else _show(logger)
        self.shows_pictures = self._board is not None or self._show is not None

    def __repr__(self) -> str:
        return f"{type(self._logger).__name__} (logger {self._index})"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log each scalar."""
        if step <= self._logged:
            return
        self._check_space()
        self._logger.log_metrics(self._renamed(values), step=step)

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Show each picture, if the logger can."""
        if step <= self._logged:
            return
        self._check_space()
        if self._board is not None:
            self._board.pictures(self._renamed(pictures), step)
        elif self._show is not None:
            for tag, picture in self._renamed(pictures).items():
                self._show(tag, picture, step)

    def finish(self, end: RunEnd) -> None:
        """Show the last pictures, and add the summary and the page; animations for TensorBoard only."""
        if self._board is None:
            self.pictures(end.pictures, end.step)
            add_summary_and_page(self._logger, self._prefix, end.summary, end.page, end.step)
        else:
            self._check_space()
            pictures, animations = self._renamed(end.pictures), self._renamed(end.animations)
            self._board.finish(replace(end, pictures=pictures, animations=animations))

    def _renamed(self, by_tag: Mapping[str, T]) -> dict[str, T]:
        return {with_prefix(tag, self._prefix): value for tag, value in by_tag.items()}

    def _check_space(self) -> None:
        if self._directory is not None:
            check_space(self._directory)


def _show(logger: Logger) -> Show | None:
    """A function that gives a logger a picture, (H, W, 3) bytes; None if the logger takes none."""
    any_logger: Any = logger
    experiment: Any = getattr(logger, "experiment", None)
    run = getattr(any_logger, "run_id", None)
    # Other writers of TensorBoard's files; Weights & Biases; MLflow, whose client serves any run; Comet.
    ways: list[tuple[Any, Callable[..., dict[str, Any]]]] = [
        (
            getattr(experiment, "add_image", None),
            lambda tag, picture, step: {"tag": tag, "img_tensor": picture, "global_step": step, "dataformats": "HWC"},
        ),
        (
            getattr(any_logger, "log_image", None),
            lambda tag, picture, step: {"key": tag, "images": [picture], "step": step},
        ),
        (
            None if run is None else getattr(experiment, "log_image", None),
            lambda tag, picture, step: {"run_id": run, "image": picture, "key": tag, "step": step},
        ),
        (
            getattr(experiment, "log_image", None),
            lambda tag, picture, step: {"image_data": picture, "name": tag, "step": step},
        ),
    ]
    for function, arguments in ways:
        if function is not None and _takes(function, arguments("", None, 0)):
            return partial(_call, function, arguments)
    return None


def _call(function: Any, arguments: Callable[..., dict[str, Any]], tag: str, picture: Picture, step: int) -> None:
    function(**arguments(tag, picture, step))


def _takes(function: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a function can be called with these arguments; functions of the same name differ in them."""
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError):  # ValueError: it has no signature
        return False
    return True


def add_summary_and_page(logger: Logger, prefix: str, summary: str, page: Path | None, step: int) -> None:
    """Add the summary of a run as text, and the page as a file, to a logger that takes them.

    Args:
        logger: Any Lightning logger but TensorBoard's, which has a writer of its own.
        prefix: Prefix of our names, such as `explain/`.
        summary: The summary.
        page: The HTML file, or None.
        step: Step of the last snapshot.
    """
    for kind, add in _ADDERS.items():
        if is_kind(logger, kind):
            add(logger, prefix, summary, page, step)


def _wandb(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    """The page as a panel and as an artifact, the text as a value of the run's summary."""
    import wandb

    run = logger.experiment
    run.summary[f"{prefix}summary"] = summary
    if page is not None:
        panel = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        logger.log_metrics({f"{prefix}report": panel}, step=step)
        artifact = wandb.Artifact(f"{prefix.strip('/')}-{run.id}", type="report")
        artifact.add_file(str(page))
        run.log_artifact(artifact)


def _mlflow(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    """Artifacts of the run, which MLflow shows on the run's page."""
    folder = prefix.strip("/")
    logger.experiment.log_text(logger.run_id, summary, f"{folder}/summary.txt")
    if page is not None:
        logger.experiment.log_artifact(logger.run_id, str(page), folder)


def _comet(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    logger.experiment.log_text(summary, step=step)
    if page is not None:
        logger.experiment.log_asset(str(page), file_name=f"{prefix}{page.name}", step=step)


def _neptune(logger: Any, prefix: str, summary: str, page: Path | None, step: int) -> None:
    logger.experiment[f"{prefix}summary"] = summary
    if page is not None:
        logger.experiment[f"{prefix}report"].upload(str(page))


_ADDERS: dict[str, Callable[[Any, str, str, Path | None, int], None]] = {
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "NeptuneLogger": _neptune,
}
