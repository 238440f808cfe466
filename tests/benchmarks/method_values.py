"""Measure every explanation method on one fine-tuned model: values per image, nothing averaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tests.benchmarks.fine_tuned import Task, with_larger_logits
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.metrics.drift import METRICS, spearman
from vit_explain_callback.metrics.faithfulness import SHARES, Remover, mean_colour, random_maps
from vit_explain_callback.metrics.faithfulness import symmetric_relevance_gain as gain_of
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import shifted

RANDOM = "random order"
NOISE = 0.02
CHANGES = ("mirror", "noise", "shift")
BATCH = 16


class Recorder:
    """A remover that keeps the logits it gave, in order, and the CPU time it took."""

    def __init__(self, remove: Remover) -> None:
        self.remove = remove
        self.logits: list[Tensor] = []
        self.seconds = 0.0

    def __call__(self, images: Tensor, taken: Tensor) -> Tensor:
        begun = time.process_time()
        logits = self.remove(images, taken)
        self.seconds += time.process_time() - begun
        self.logits.append(logits)
        return logits


def named(label: str, depth: int) -> str:
    """The name of a method in a model of so many blocks.

    Example:
        >>> named("rollout_from{half}", 12)
        'rollout_from7'
    """
    return label.format(half=depth // 2 + 1)


def measured(task: Task, labels: Sequence[str], seed: int, advance: Callable[[], object]) -> dict[str, Any]:
    """Values by image of methods, and of a random order, in a form that JSON can hold.

    Args:
        task: The model and its images.
        labels: Methods, as `named` takes them.
        seed: Of the noise and of the random order.
        advance: Called after each of the `len(labels) + 2` parts.
    """
    names = {label: named(label, len(task.model.blocks)) for label in labels}
    maps, logits = explained(task, list(names.values()), task.images)
    changed, changes = _under_changes(task, list(names.values()), seed, logits)
    scaled = Explainer(task.model, list(names.values()), forward=with_larger_logits)
    confident = scaled(task.images, task.labels, batch_size=BATCH).maps
    advance()
    found: dict[str, Any] = {}
    maps[RANDOM] = random_maps(
        len(task.images), (maps[names[labels[0]]].shape[1], maps[names[labels[0]]].shape[2]), seed
    )
    plain = Explainer(task.model, ["rollout"])
    plain(task.images[:1])  # tokens can be left out once they are known
    for label, name in {**names, RANDOM: RANDOM}.items():
        found[label] = {"name": name, **faithfulness(task, plain, maps[name], logits)}
        found[label]["lift"] = region_statistics(maps[name], task.masks)["lift"].tolist()
        if name != RANDOM:
            found[label]["scaled"] = spearman(maps[name], confident[name]).tolist()
            found[label]["drift"] = drift(maps[name], {kind: changed[kind][name] for kind in CHANGES})
        advance()
    right = (logits.argmax(dim=1) == task.labels).double()
    agreement = [[spearman(maps[a], maps[b]).tolist() for b in maps] for a in maps]
    return {
        "accuracy": right.mean().item(),
        "right": right.tolist(),
        "changes": changes,
        "agreement": agreement,
        "methods": found,
    }


def explained(task: Task, names: Sequence[str], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Maps by name, and logits."""
    found = Explainer(task.model, names)(images, task.labels, batch_size=BATCH)
    return dict(found.maps), found.logits


def _under_changes(
    task: Task, names: Sequence[str], seed: int, logits: Tensor
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, list[float]]]]:
    """Maps by kind of change and name, mapped back; and what became of the predictions."""
    maps: dict[str, dict[str, Tensor]] = {}
    predictions: dict[str, dict[str, list[float]]] = {}
    for kind, images in changed_images(task, seed).items():
        found, others = explained(task, names, images)
        maps[kind] = {name: each.flip(-1) if kind == "mirror" else each for name, each in found.items()}
        before, after = (
            each.double().softmax(dim=1).gather(1, task.labels[:, None])[:, 0] for each in (logits, others)
        )
        predictions[kind] = {
            "same": (logits.argmax(dim=1) == others.argmax(dim=1)).double().tolist(),
            "probability": (after - before).abs().tolist(),
        }
    return maps, predictions


def changed_images(task: Task, seed: int) -> dict[str, Tensor]:
    """The images under each of the `CHANGES`.

    Mirrored left to right; with normal noise of 2 % of the range of pixels; moved right and down by a quarter of a
    patch, the edges repeated.
    """
    noise = torch.randn(task.images.shape, generator=torch.Generator().manual_seed(seed))
    by = task.patch // 4
    return {
        "mirror": task.images.flip(-1),
        "noise": task.images + noise * NOISE / torch.tensor(task.std)[:, None, None],
        "shift": shifted(task.images, by, by),
    }


def faithfulness(task: Task, plain: Explainer, maps: Tensor, logits: Tensor) -> dict[str, list[float]]:
    """SRG by both removals, and the areas of insertion and deletion, which the same passes give.

    The areas are those of RISE (Petsiuk et al. 2018, arXiv:1806.07421), with the target's logit for its probability,
    patches for pixels, and the mean colour as the canvas of both: the logit over the share of patches, at no patch,
    the package's five shares and all patches, by the trapezoidal rule. Deletion takes the most relevant first, lower is
    better; insertion puts the most relevant first on the canvas, higher is better.
    """
    painted = Recorder(mean_colour(partial(plain.logits, batch_size=BATCH)))
    dropped = Recorder(partial(plain.logits_without, batch_size=BATCH))
    found: dict[str, list[float]] = {}
    for name, recorder in (("mean_colour", painted), ("tokens", dropped)):
        found[f"srg_{name}"] = gain_of(recorder, task.images, {"": maps}, task.labels)[""].tolist()
        found[f"seconds_{name}"] = [recorder.seconds]
    canvas = mean_colour(partial(plain.logits, batch_size=BATCH))(task.images, torch.ones_like(maps, dtype=torch.bool))
    whole, empty, *values = (each.gather(1, task.labels[:, None])[:, 0] for each in (logits, canvas, *painted.logits))
    # `symmetric_relevance_gain` takes the least and the most relevant away in turn.
    found["deletion"] = area([0.0, *SHARES, 1.0], [whole, *values[1::2], empty])
    found["insertion"] = area([0.0, *(1 - share for share in reversed(SHARES)), 1.0], [empty, *values[-2::-2], whole])
    return found


def area(shares: Sequence[float], values: Sequence[Tensor]) -> list[float]:
    """Area under each image's curve by the trapezoidal rule.

    Example:
        >>> area([0.0, 0.5, 1.0], [torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([2.0])])
        [1.5]
    """
    return torch.trapezoid(torch.stack(list(values)).double(), torch.tensor(shares).double(), dim=0).tolist()  # type: ignore[no-any-return]


def drift(maps: Tensor, changed: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """Every built-in measure of drift by image: under each change, and from two other images."""
    compared = dict(changed)
    for index, by in enumerate((1, len(maps) // 2)):
        compared[f"other{index}"] = maps.roll(by, dims=0)
    return {
        metric: {name: METRICS[metric](maps, other).tolist() for name, other in compared.items()} for metric in METRICS
    }


def progress(runs: int, methods: int) -> tqdm[Any]:
    """A bar over the parts of all runs."""
    return tqdm(total=runs * (methods + 2), unit="part", desc="methods", smoothing=0)
