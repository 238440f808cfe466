"""Writers of a run's scalars and pictures: to a folder, to TensorBoard, or one of one's own."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Protocol

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from vit_explain_callback.metrics.drift import METRICS
from vit_explain_callback.system.files import write_bytes
from vit_explain_callback.tracking import tags
from vit_explain_callback.tracking.errors import warn
from vit_explain_callback.tracking.run_folder import RunFolder, check_space
from vit_explain_callback.visualization.encode import jpeg, png
from vit_explain_callback.visualization.overlay import Picture

_QUALITY = 75  # two filmstrips of three rows and a heat map take less than 300 kB, whatever is on the images
_COLUMNS = 110  # that a window of 1366 pixels shows


def lay_out_margin_charts(experiment: Any, methods: Sequence[str]) -> None:
    """Chart each metric's median between p10 and p90 in the custom scalars pane."""
    charts = {
        f"{method} · {metric}": [
            "Margin",
            [tags.drift_spread(method, metric, part) for part in ("median", "p10", "p90")],
        ]
        for method in methods
        for metric in METRICS
    }
    experiment.add_custom_scalars({"drift from the baseline, p10 to p90": charts})


def add_file(experiment: Any, tag: str, file: bytes, step: int) -> None:
    """Add a PNG, JPEG or GIF file unchanged; `add_image` encodes slowly, and only the first picture of a GIF."""
    with Image.open(io.BytesIO(file)) as picture:
        width, height = picture.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
    experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def add_lines(experiment: Any, tag: str, text: str, step: int) -> None:
    """Add text line by line, and wrap the lines that the pane would cut off."""
    wrapped = [part for line in text.splitlines() for part in wrap(line, _COLUMNS, subsequent_indent="    ")]
    experiment.add_text(tag, "\n".join(f"    {line}" for line in wrapped), step)


@dataclass(frozen=True)
class RunEnd:
    """The results of a run that exist only at its end.

    Attributes:
        step: Step of the last snapshot.
        summary: The run in words.
        pictures: Final pictures by tag, which replace earlier ones, (H, W, 3) uint8.
        animations: GIF files by tag.
        page: The HTML page; None if none was written.
    """

    step: int
    summary: str
    pictures: Mapping[str, Picture]
    animations: Mapping[str, bytes]
    page: Path | None


class Writer(Protocol):
    """Receives the scalars and pictures of a run, on its first process. An error that it raises does not stop the run.

    Example:
        >>> import timm, torch
        >>> from vit_explain_callback import Detail, Explainer, ExplanationTracker, Probe
        >>> class Printer:
        ...     def scalars(self, values, step):
        ...         print(step, len(values), values["explain/drift/baseline_rank_correlation/rollout"] > 0.99)
        ...     def pictures(self, pictures, step):
        ...         print(step, {tag: picture.shape for tag, picture in pictures.items()})
        ...     def finish(self, end):
        ...         print(end.step, len(end.summary.splitlines()), end.page)
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
        >>> probe = Probe.of(torch.randn(2, 3, 224, 224), torch.tensor([0, 3]))
        >>> options = {"checks": None, "detail": Detail(block_statistics=False)}
        >>> tracker = ExplanationTracker(Explainer(model, ["rollout"]), probe, writers=[Printer()], **options)
        >>> values, text = tracker.observe(step=0), tracker.finish()
        0 6 True
        0 {'explain/filmstrip/rollout': (584, 700, 3)}
        0 1 None
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Receive the scalars of a snapshot by tag; at the end, the remaining ones."""

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Receive the pictures of a snapshot by tag, (H, W, 3) uint8."""

    def finish(self, end: RunEnd) -> None:
        """Receive the results that exist only at the end."""


class FolderWriter:
    """Saves the latest picture of each tag in a folder as a PNG file, and the animations as GIF files.

    Args:
        folder: The folder, created when it is needed.
    """

    def __init__(self, folder: Path | RunFolder) -> None:
        self._folder = folder

    def __repr__(self) -> str:
        return f"the folder {self._folder}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing: the scalars of a run can be recomputed from its raw maps."""

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Write `{tag}.png`, with dashes for slashes."""
        for tag, picture in pictures.items():
            self._write(tag, "png", png(picture))

    def finish(self, end: RunEnd) -> None:
        """Write `{tag}.png` and `{tag}.gif`."""
        self.pictures(end.pictures, end.step)
        for tag, gif in end.animations.items():
            self._write(tag, "gif", gif)

    def _write(self, tag: str, ending: str, content: bytes) -> None:
        folder = self._folder
        check_space(folder.preferred if isinstance(folder, RunFolder) else folder)
        folder = folder.path if isinstance(folder, RunFolder) else folder
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / f"{tag.replace('/', '-')}.{ending}", content)


class TensorBoardWriter:
    """Writes to a `torch.utils.tensorboard.SummaryWriter`.

    Args:
        experiment: The `SummaryWriter`.
        margin_charts: Methods whose drift the custom scalars pane charts; TensorBoard knows one layout per run.
        max_pictures_mb: Megabytes (10⁶ bytes) that all pictures of the run may take. Pictures beyond that are left out,
            with one warning. Room is reserved for the final pictures.
        prefix: Prefix of the summary's tag.
    """

    def __init__(
        self,
        experiment: Any,
        margin_charts: Sequence[str] = (),
        max_pictures_mb: float = math.inf,
        prefix: str = tags.PREFIX,
    ) -> None:
        self._experiment, self._prefix = experiment, prefix
        self._most = max_pictures_mb * 1e6
        self._written = self._largest = 0
        self._is_full = False
        if margin_charts:
            lay_out_margin_charts(experiment, margin_charts)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add each scalar."""
        for tag, value in values.items():
            self._experiment.add_scalar(tag, value, step)
        self._experiment.flush()  # so that an open TensorBoard sees the snapshot at once

    def pictures(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Add each picture as a PNG or JPEG file, whichever is smaller."""
        files = _encoded(pictures)
        size = sum(map(len, files.values()))
        self._largest = max(size, self._largest)
        # The final filmstrips have more rows.
        self._add(files, step, reserve=2 * self._largest)

    def finish(self, end: RunEnd) -> None:
        """Add the summary as text, the last pictures, and each animation as a GIF file."""
        add_lines(self._experiment, f"{self._prefix}summary", end.summary, end.step)
        self._add(_encoded(end.pictures), end.step)
        self._add(end.animations, end.step)

    def _add(self, files: Mapping[str, bytes], step: int, reserve: int = 0) -> None:
        size = sum(map(len, files.values()))
        if self._written + size + reserve <= self._most:
            self._written += size
            for tag, file in files.items():
                add_file(self._experiment, tag, file, step)
        elif not self._is_full:
            self._is_full = True
            warn(
                f"the pictures reached {self._most / 1e6:g} MB, so from step {step} on only the final ones are written "
                "to TensorBoard, if they fit. A larger `max_pictures_mb` keeps more."
            )
        self._experiment.flush()


def _encoded(pictures: Mapping[str, Picture]) -> dict[str, bytes]:
    """PNG or JPEG files, whichever is smaller: photographs are JPEG, diagrams PNG."""
    return {tag: min(png(picture), jpeg(picture, _QUALITY), key=len) for tag, picture in pictures.items()}
