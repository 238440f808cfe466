"""Measure the drift of a series of saved checkpoints, with the same snapshots as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vit_explain_callback.cli.classifier import Classifier, quiet_transformers, timm_transform
from vit_explain_callback.cli.photograph import SUFFIXES, Transform, image_files, read_image
from vit_explain_callback.cli.weights import Weights, model_with_weights
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.methods.map_function import AnyMethod
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run_folder import RunFolder
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.vit.timm import Normalisation, normalisation


@dataclass(frozen=True)
class Architecture:
    """What the checkpoints of a series are of.

    Attributes:
        transform: Of a photograph to an image as the model takes it.
        normalisation: Mean and standard deviation of that, where known.
        load: A model with the weights of a checkpoint.
        class_names: Name of each class, where known.
    """

    transform: Transform
    normalisation: Normalisation
    load: Callable[[Weights], nn.Module]
    class_names: Sequence[str] | None = None

    @classmethod
    def of_timm(cls, name: str) -> Architecture:
        """A timm model, with as many classes as each checkpoint has."""
        model = timm.create_model(name)
        return cls(timm_transform(model), normalisation(model), lambda weights: model_with_weights(name, weights))

    @classmethod
    def of_hugging_face(cls, name: str) -> Architecture:
        """An image classifier of transformers, from the hub or from a folder.

        Raises:
            ImportError: If transformers is not installed.
            OSError: If it cannot be fetched or found.
            ValueError: If it is no image classifier.
        """
        classifier = Classifier.from_hugging_face(name)
        load = partial(_load_checkpoint, classifier)
        return cls(classifier.view.transform, classifier.normalisation, load, classifier.class_names)


def _load_checkpoint(classifier: Classifier, weights: Weights) -> nn.Module:
    """A model of transformers with the weights of a checkpoint.

    Transformers itself loads them, as the names in its files are not always those of its modules.
    """
    model: Any = classifier.model
    with quiet_transformers():
        loaded, loading_info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=weights.converted_for(model),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    missing = sorted([*loading_info["missing_keys"], *(name for name, *_ in loading_info["mismatched_keys"])])
    if missing:
        raise ValueError(
            f"{weights.path} does not hold all of {classifier.name}; {', '.join(missing[:3])} … are missing or of "
            "another shape. With --hf, give the folder of the model that was fine-tuned."
        )
    return loaded.eval()  # type: ignore[no-any-return]


def read_images(folder: Path, transform: Transform, limit: int) -> tuple[Tensor, list[str]]:
    """The first images of a folder and of those in it, as the model takes them; and what was wrong with others.

    Args:
        folder: Searched in the order of the names.
        transform: Of each.
        limit: Images taken at most.

    Returns:
        (B, C, H, W), and a line for each file that is no image.

    Raises:
        FileNotFoundError: If there is no image.
    """
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
    architecture: Architecture,
    checkpoints: Sequence[Path],
    images: Tensor,
    methods: Sequence[AnyMethod],
    folder: Path,
    *,
    target: int | None = None,
    num_shown: int = 6,
    batch_size: int | None = None,
    device: str = "cpu",
    check_every: int | None = 20,
    prefix: str | None = None,
) -> None:
    """Write a snapshot of each checkpoint to `folder/explanations`; what is there already is kept.

    The first checkpoint is the baseline. Steps are those that the checkpoints say, or else 0, 1, 2 …

    Args:
        architecture: What they are of.
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
    steps = _steps([Weights.read(path, prefix) for path in checkpoints])
    about: Any = {"normalisation": architecture.normalisation, "class_names": architecture.class_names}
    probe = Probe.of(images, num_shown=num_shown, **about)
    saved = _saved_snapshots(folder, probe, methods)
    series = list(zip(steps, checkpoints, strict=True))

    def explainer(path: Path) -> Explainer:
        return Explainer(architecture.load(Weights.read(path, prefix)).to(device), methods)

    missing = [path for step, path in series if step not in saved]
    if not missing:
        return
    run_folder = RunFolder(folder, f"series {probe.fingerprint}")  # the next series of these images adds to it
    options: dict[str, Any] = {"target": target, "checks": check_every, "batch_size": batch_size}
    tracker = ExplanationTracker(explainer(missing[0]), probe, folder=run_folder, on_error="raise", **options)
    for step, path in tqdm(series, unit="checkpoint"):
        if step in saved:
            tracker.history.add(saved[step])
            continue
        if path is not missing[0]:
            tracker.explainer = explainer(path)
        tracker.observe(step)
    if series[-1][0] not in saved:
        tracker.finish()


def _steps(series: Sequence[Weights]) -> list[int]:
    stored_steps = [weights.step for weights in series if weights.step is not None]
    increasing = len(stored_steps) == len(series) and stored_steps == sorted(set(stored_steps))
    return stored_steps if increasing else list(range(len(series)))


def _saved_snapshots(folder: Path, probe: Probe, methods: Sequence[AnyMethod]) -> dict[int, Snapshot]:
    """The snapshots that the folder holds already, by step; they must be of the same images and methods."""
    if not (folder / "probe.safetensors").is_file():
        return {}
    same = Probe.load(folder / "probe.safetensors").fingerprint == probe.fingerprint
    snapshots = [Snapshot.load(path) for path in sorted(folder.glob("step_*.safetensors"))]
    names = {method.name for method in methods}
    if not same or any(set(snapshot.maps) != names for snapshot in snapshots):
        raise ValueError(
            f"{folder} holds results of other images or methods; give another --output, or delete it to start again."
        )
    return {snapshot.step: snapshot for snapshot in snapshots}
