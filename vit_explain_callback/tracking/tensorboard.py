"""Write what only TensorBoard takes: encoded pictures, text as it stands, and a layout of charts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from vit_explain_callback.metrics.drift import METRICS
from vit_explain_callback.tracking.scalars import STATISTICS

_COLUMNS = 110  # that a window of 1366 pixels shows


def lay_out_margin_charts(experiment: Any, methods: Sequence[str]) -> None:
    """Charts of each measure's median between p10 and p90, for the custom scalars pane."""
    charts = {
        f"{method} · {metric}": [
            "Margin",
            [f"{STATISTICS}/drift_baseline_spread/{method}/{metric}/{part}" for part in ("median", "p10", "p90")],
        ]
        for method in methods
        for metric in METRICS
    }
    experiment.add_custom_scalars({"drift from the baseline, p10 to p90": charts})


def add_file(experiment: Any, tag: str, file: bytes, step: int) -> None:
    """Add a PNG, JPEG or GIF file as it is; `add_image` is slow to encode, and keeps but the first picture of a GIF."""
    with Image.open(io.BytesIO(file)) as picture:
        width, height = picture.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
    experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def add_lines(experiment: Any, tag: str, text: str, step: int) -> None:
    """Add text whose lines stay as they are, but for those that the pane would cut off."""
    wrapped = [part for line in text.splitlines() for part in wrap(line, _COLUMNS, subsequent_indent="    ")]
    experiment.add_text(tag, "\n".join(f"    {line}" for line in wrapped), step)
