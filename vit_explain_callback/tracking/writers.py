"""Where scalars and pictures of a run go: a folder, TensorBoard, or a writer of one's own.

The raw maps do not go through a writer: an `ExplanationTracker` saves them itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vit_explain_callback._files import write_bytes
from vit_explain_callback.tracking.tensorboard import add_file, add_lines, lay_out_margin_charts
from vit_explain_callback.visualization.encode import png
from vit_explain_callback.visualization.overlay import Picture


class Writer(Protocol):
    """What takes the scalars and pictures of a run. What it raises does not stop the run.

    Example:
        >>> class Printer:
        ...     def scalars(self, values, step):
        ...         print(step, len(values))
        ...     def pictures(self, pictures, step):
        ...         print(step, list(pictures))
        ...     def finish(self, summary, animations, step):
        ...         print(summary)
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take the scalars of a snapshot by tag."""

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Take the pictures of a snapshot by tag, (H, W, 3) uint8."""

    def finish(self, summary: str, animations: Mapping[str, bytes], step: int) -> None:
        """Take what is known at the end only: the summary in words, and GIF files by tag."""


class FolderWriter:
    """Keeps the latest picture of each tag in a folder as a PNG file, and the animations as GIF files.

    Args:
        folder: Made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Nothing: the scalars of a run are computed again from its raw maps."""

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Write `{tag}.png`, with dashes for slashes."""
        for tag, picture in pictures.items():
            self._write(tag, "png", png(picture))

    def finish(self, summary: str, animations: Mapping[str, bytes], step: int) -> None:
        """Write `{tag}.gif`."""
        for tag, gif in animations.items():
            self._write(tag, "gif", gif)

    def _write(self, tag: str, ending: str, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._folder / f"{tag.replace('/', '-')}.{ending}", content)


class TensorBoardWriter:
    """Writes to a `torch.utils.tensorboard.SummaryWriter`.

    Args:
        experiment: The `SummaryWriter`.
        margin_charts: Methods whose drift the custom scalars pane is to show as charts; TensorBoard knows one layout a
            run.
    """

    def __init__(self, experiment: Any, margin_charts: Sequence[str] = ()) -> None:
        self._experiment = experiment
        if margin_charts:
            lay_out_margin_charts(experiment, margin_charts)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add each scalar."""
        for tag, value in values.items():
            self._experiment.add_scalar(tag, value, step)
        self._experiment.flush()  # so that an open TensorBoard sees the snapshot at once

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Add each picture as a PNG file."""
        for tag, picture in pictures.items():
            add_file(self._experiment, tag, png(picture), step)
        self._experiment.flush()

    def finish(self, summary: str, animations: Mapping[str, bytes], step: int) -> None:
        """Add the summary as text and each animation as a GIF file."""
        add_lines(self._experiment, "explain_verdict", summary, step)
        for tag, gif in animations.items():
            add_file(self._experiment, tag, gif, step)
        self._experiment.flush()
