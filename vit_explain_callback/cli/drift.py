"""The drift of a series of saved checkpoints: the same snapshots as in training, taken after the fact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from vit_explain_callback.cli.classifier import timm_transform
from vit_explain_callback.cli.photograph import SUFFIXES, image_files, read_image
from vit_explain_callback.cli.weights import Weights, with_weights
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.lightning.strategy import check_together, explain_together
from vit_explain_callback.methods.base import Method
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.probe import ProbeBatch
from vit_explain_callback.tracking.report import Report
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.vit.timm import normalisation


def read_images(folder: Path, model: Any, limit: int) -> tuple[Tensor, list[str]]:
    """The first images of a folder and of those in it, as the model takes them; and what was wrong with others.

    Args:
        folder: Searched in the order of the names.
        model: A timm model, whose own evaluation transform is used.
        limit: Images taken at most.

    Returns:
        (B, C, H, W), and a line for each file that is no image.

    Raises:
        FileNotFoundError: If there is no image.
    """
    transform = timm_transform(model)
    images: list[Tensor] = []
    unreadable: list[str] = []
    for path in image_files(folder):
        if len(images) == limit:
            break
        try:
            images.append(transform(read_image(path)))
        except OSError as error:
            unreadable.append(str(error))
    if not images:
        raise FileNotFoundError(f"There is no image in {folder} ({', '.join(sorted(SUFFIXES))}).")
    return torch.stack(images), unreadable


def explain_series(
    name: str,
    checkpoints: Sequence[Path],
    images: Tensor,
    methods: Sequence[Method],
    folder: Path,
    *,
    target: int | None = None,
    num_shown: int = 6,
    batch_size: int | None = None,
    device: str = "cpu",
    check_every: int | None = 5,
    prefix: str | None = None,
) -> None:
    """Write a snapshot of each checkpoint to `folder/explanations`; what is there already is kept.

    The first checkpoint is the baseline. Steps are those that the checkpoints say, or else 0, 1, 2 …

    Args:
        name: Of the timm model.
        checkpoints: In order.
        images: (B, C, H, W).
        methods: Methods.
        folder: Of the results.
        target: Class whose logit the gradients are of; default: the prediction at the first checkpoint.
        num_shown: Images drawn.
        batch_size: Images explained in one pass.
        device: Device to compute on.
        check_every: Checkpoints between those of which noise floor and faithfulness are measured, or None.
        prefix: Of the model's names in the checkpoints, needed where they hold several models.

    Raises:
        FileNotFoundError: If a checkpoint is not there.
        ValueError: If one does not fit the model, or if the folder holds results of other images or methods.
    """
    folder = folder / "explanations"
    folder.mkdir(parents=True, exist_ok=True)
    steps = _steps([Weights.read(path, prefix) for path in checkpoints])
    probe = ProbeBatch(images)
    report = Report.of(probe, num_shown, normalisation(timm.create_model(name)), None, {})
    _keep_or_refuse(folder / "probe.safetensors", report, methods, folder)
    first: Tensor | None = None
    for index, (step, path) in enumerate(tqdm(list(zip(steps, checkpoints, strict=True)), unit="checkpoint")):
        file = folder / f"step_{step:08d}.safetensors"
        if not file.is_file():
            explainer = Explainer(with_weights(name, Weights.read(path, prefix)).to(device), methods)
            chosen = target if target is not None else first
            found = explain_together(Ranks(), explainer, images, chosen, batch_size, block_statistics=True)
            checks = None
            if check_every and (index % check_every == 0 or index == len(checkpoints) - 1):
                checks = check_together(Ranks(), explainer, images, found.maps, found.target, batch_size)
            Snapshot(step, found.maps, found.logits, found.target, found.blocks, checks).save(file)
        if first is None:
            first = Snapshot.load(file).target


def _steps(series: Sequence[Weights]) -> list[int]:
    told = [weights.step for weights in series if weights.step is not None]
    increasing = len(told) == len(series) and told == sorted(set(told))
    return told if increasing else list(range(len(series)))


def _keep_or_refuse(file: Path, report: Report, methods: Sequence[Method], folder: Path) -> None:
    """Write the report, unless there is one; then it must be of the same images, and the snapshots of the methods."""
    if not file.is_file():
        report.save(file)
        return
    same = torch.equal(torch.tensor(report.pictures[0]), torch.tensor(Report.load(file).pictures[0]))
    names = {method.name for method in methods}
    if not same or any(set(Snapshot.load(path).maps) != names for path in folder.glob("step_*.safetensors")):
        raise ValueError(
            f"{folder} holds results of other images or methods; give another --output, or delete it to start again."
        )
