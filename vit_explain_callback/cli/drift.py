"""Measure drift over a series of saved checkpoints, with the same snapshots as in training."""

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
    """The model of a series of checkpoints.

    Attributes:
        transform: Turns a photograph into an input of the model, (C, H, W).
        normalisation: Mean and standard deviation that the transform uses, or None.
        load: Creates a model with the weights of a checkpoint.
        class_names: Name of each class, or None.
    """

    transform: Transform
    normalisation: Normalisation
    load: Callable[[Weights], nn.Module]
    class_names: Sequence[str] | None = None

    @classmethod
    def of_timm(cls, name: str) -> Architecture:
        """Describe a timm model, with as many classes as each checkpoint has."""
        model = timm.create_model(name)
        return cls(timm_transform(model), normalisation(model), lambda weights: model_with_weights(name, weights))

    @classmethod
    def of_hugging_face(cls, name: str) -> Architecture:
        """Describe an image classifier of transformers, from the hub or from a folder.

        Raises:
            ImportError: If transformers is not installed.
            OSError: If the classifier cannot be fetched or does not exist.
            ValueError: If it is not an image classifier.
        """
        classifier = Classifier.from_hugging_face(name)
        load = partial(_load_checkpoint, classifier)
        return cls(classifier.view.transform, classifier.normalisation, load, classifier.class_names)


def _load_checkpoint(classifier: Classifier, weights: Weights) -> nn.Module:
    """Create a transformers model with the weights of a checkpoint.

    Transformers loads them itself, since the names in its files can differ from those of its modules.
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
            "another shape. Pass the folder of the fine-tuned model to --hf."
        )
    return loaded.eval()  # type: ignore[no-any-return]


def read_images(folder: Path, transform: Transform, limit: int) -> tuple[Tensor, list[str]]:
    """Read the first images of a folder and its subfolders.

    Args:
        folder: Folder, searched in the order of names.
        transform: Turns an image into an input of the model, (C, H, W).
        limit: Maximum number of images.

    Returns:
        The images, (B, C, H, W), and a message for each file that cannot be read.

    Raises:
        FileNotFoundError: If no image can be read.
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
    """Write a snapshot of each checkpoint to `folder/explanations`; existing snapshots are reused.

    The first checkpoint is the baseline. Steps are read from the checkpoints if all state one and they increase, and
    are 0, 1, 2 … otherwise.

    Args:
        architecture: The model of the checkpoints.
        checkpoints: Checkpoints in order.
        images: Images to explain, (B, C, H, W).
        methods: Methods.
        folder: Folder for the results.
        target: Class to explain; default: the class predicted for each image at the first checkpoint.
        num_shown: Number of images drawn.
        batch_size: Images per forward pass; default: all.
        device: Device to compute on.
        check_every: Checkpoints between two checks of noise floor and faithfulness; None: no checks.
        prefix: Prefix of the model's tensor names, needed if the checkpoints hold several models.

    Raises:
        FileNotFoundError: If a checkpoint does not exist.
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
    run_folder = RunFolder(folder, f"series {probe.fingerprint}")  # the next series of these images extends it
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
    """Load the snapshots in the folder, by step; they must be of the same images and methods."""
    if not (folder / "probe.safetensors").is_file():
        return {}
    same = Probe.load(folder / "probe.safetensors").fingerprint == probe.fingerprint
    snapshots = [Snapshot.load(path) for path in sorted(folder.glob("step_*.safetensors"))]
    names = {method.name for method in methods}
    if not same or any(set(snapshot.maps) != names for snapshot in snapshots):
        raise ValueError(
            f"{folder} holds results of other images or methods; choose another --output, or delete it to start again."
        )
    return {snapshot.step: snapshot for snapshot in snapshots}
