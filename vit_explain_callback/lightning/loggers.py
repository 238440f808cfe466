"""Write to any Lightning logger, as far as it can show pictures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from vit_explain_callback.lightning._compat import Logger, is_kind
from vit_explain_callback.lightning.folder import local_path
from vit_explain_callback.lightning.reports import report
from vit_explain_callback.tracking.scalars import PREFIX
from vit_explain_callback.tracking.space import check_space
from vit_explain_callback.tracking.writers import RunEnd, TensorBoardWriter
from vit_explain_callback.visualization.overlay import Picture

T = TypeVar("T")
Show: TypeAlias = Callable[[str, Picture, int], Any]


class LoggerWriter:
    """Writes scalars to a logger, and pictures if there is a way to show them.

    Args:
        logger: Any logger of Lightning.
        index: Of it among those of the trainer.
        margin_charts: Methods for the charts of a TensorBoard's custom scalars pane.
        max_pictures_mb: Megabytes that all pictures may take in a TensorBoard's event file.
        prefix: What its tags begin with instead of `explain/`, where several callbacks share a logger.
        logged: The last step of which the logger has values already; those of it, and before, are not logged again.

    Attributes:
        shows_pictures: Whether there is a way to give the logger pictures.

    Raises:
        Exception: What the logger raises when it is asked for its experiment.
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
        self._logger.log_metrics(self._own(values), step=step)

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Show each picture; nothing where the logger cannot."""
        if step <= self._logged:
            return
        self._check_space()
        if self._board is not None:
            self._board.pictures(self._own(pictures), step)
        elif self._show is not None:
            for tag, picture in self._own(pictures).items():
                self._show(tag, picture, step)

    def finish(self, end: RunEnd) -> None:
        """Show the last pictures, add the summary and the page; animations, which only TensorBoard takes."""
        if self._board is None:
            self.pictures(end.pictures, end.step)
            report(self._logger, self._prefix, end.summary, end.page, end.step)
        else:
            self._check_space()
            pictures, animations = self._own(end.pictures), self._own(end.animations)
            self._board.finish(replace(end, pictures=pictures, animations=animations))

    def _own(self, by_tag: Mapping[str, T]) -> dict[str, T]:
        return {renamed(tag, self._prefix): value for tag, value in by_tag.items()}

    def _check_space(self) -> None:
        if self._directory is not None:
            check_space(self._directory)


def renamed(tag: str, prefix: str) -> str:
    """A tag of ours with another beginning.

    Example:
        >>> renamed("explain/drift/a", "explain_2/")
        'explain_2/drift/a'
    """
    return prefix + tag.removeprefix(PREFIX)


def _show(logger: Logger) -> Show | None:
    """How to give a logger a picture, (H, W, 3) bytes; None if there is no way."""
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
    """Whether a function can be called with these arguments; others of the same name take other ones."""
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError):  # ValueError: it does not say what it takes
        return False
    return True
