"""What only TensorBoard takes: moving pictures, text, a layout of charts, and final values beside hyperparameters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from vit_explain_callback.lightning._compat import LightningModule, TensorBoardLogger, Trainer
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.metrics.drift import METRICS


def final_tags(settings: Settings) -> dict[str, str]:
    """Tag of each value that is kept for the whole run, and the tag of the scalar that it is the last of."""
    tags: dict[str, str] = {}
    for method in (method.name for method in settings.methods):
        tags[f"final/drift/{method}"] = f"drift_baseline/{method}/spearman"
        if settings.check_every_n_snapshots:
            tags[f"final/faithfulness/{method}"] = f"faithfulness/{method}/srg"
        for region in settings.regions:
            tags[f"final/lift/{region}/{method}"] = f"region/{region}/{method}/lift"
    return tags


def declare_final_metrics(trainer: Trainer, pl_module: LightningModule, settings: Settings) -> None:
    """Make the HParams pane show the final values, if the module has hyperparameters to show there.

    Of several declarations in a run TensorBoard takes the first, so this must come before Lightning's own.
    """
    if trainer.is_global_zero and pl_module.hparams_initial and not getattr(trainer, "fast_dev_run", False):
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                metrics = dict.fromkeys(final_tags(settings), float("nan"))
                logger.log_hyperparams(pl_module.hparams_initial, metrics)


def lay_out_margin_charts(experiment: Any, methods: Sequence[str]) -> None:
    """Charts of each measure's median between p10 and p90, for the custom scalars pane."""
    charts = {
        f"{method} · {metric}": [
            "Margin",
            [f"drift_baseline_spread/{method}/{metric}/{part}" for part in ("median", "p10", "p90")],
        ]
        for method in methods
        for metric in METRICS
    }
    experiment.add_custom_scalars({"drift from the baseline, p10 to p90": charts})


def add_file(experiment: Any, tag: str, file: bytes, step: int) -> None:
    """Add a PNG or GIF file as it is; `add_image` is slow to encode, and would keep only the first picture of a GIF."""
    with Image.open(io.BytesIO(file)) as picture:
        width, height = picture.size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
    experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def add_lines(experiment: Any, tag: str, text: str, step: int) -> None:
    """Add text whose lines and columns stay as they are."""
    experiment.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
