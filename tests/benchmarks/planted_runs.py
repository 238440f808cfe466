"""Run fine-tuning on images with a planted shortcut, or with nothing wrong, and measure each snapshot.

A run goes on from a model that has learnt the task with both hints random, so that there is accuracy to lose; five
neighbouring seeds share that model, and differ in training images, probe, and test images. What is kept is per image,
so that any signal can be made of it later (see `planted_signals`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tests.benchmarks.planted import Batch, Data, Hints
from vit_explain_callback import explain
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import noise_floor, unrelated_level

METHODS = ("rollout", "grad_rollout", "grad_attention")
SHORTCUTS = {"corner": Hints(corner="label"), "background": Hints(background="label")}
CONTROLS = ("more data", "new head", "lr decay", "mirrored", "longer")
"""Nothing wrong, both hints random: the same task goes on with fresh images; the classifier is drawn anew after the
baseline; the learning rate falls to a tenth half-way; every second image is turned over; a quarter of the images is
seen four times."""

RAMP = 6
"""Steps over which the learning rate rises: Adam's first steps are as large as its later ones, and would shock a model
that is trained already."""

Values = list[list[float]]
"""By snapshot and image."""


@dataclass(frozen=True)
class Plan:
    """How long a run is and how much is looked at."""

    warm_up: int
    steps: int
    every: int
    batch: int
    probe: int
    test: int
    shared: int = 5
    """So many neighbouring seeds go on from one model."""
    probes: tuple[str, ...] = ("label",)
    """What the hints of the probe tell: as in training, or nothing (`"random"`)."""


PLANS = {
    "shapes": Plan(warm_up=60, steps=48, every=4, batch=24, probe=16, test=72),
    "photographs": Plan(warm_up=30, steps=21, every=3, batch=12, probe=12, test=48),
}


@dataclass
class Row:
    """One run."""

    data: str
    condition: str
    seed: int
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    """On test images with both hints random."""
    values: dict[str, Values] = field(default_factory=dict)
    """By `quantity/method/probe` and the like."""
    levels: dict[str, float] = field(default_factory=dict)
    """Areas of regions, and rank correlations at the baseline: with a mirror, and of unrelated images."""


def started(data: Data, plan: Plan, seed: int) -> Any:
    """The model that runs of this seed go on from."""
    model = data.model()
    group = 500_000 + seed // plan.shared
    if data.pretrained:
        _teach_head(data, plan, model, group)
        return model.eval()
    batches = [range(step * plan.batch, (step + 1) * plan.batch) for step in range(plan.warm_up)]
    optimizer = _optimizer(data, model)
    for indices in tqdm(batches, desc=f"{data.name}: start {group}", leave=False):
        _step(model, optimizer, data.batch("train", group, indices, Hints()))
    return model.eval()


def _teach_head(data: Data, plan: Plan, model: Any, seed: int) -> None:
    """Fit the classifier alone to features of fresh images."""
    batch = data.batch("train", seed, range(plan.warm_up * plan.batch), Hints())
    with torch.no_grad(), fast(model.eval()):
        parts = [model.forward_head(model.forward_features(part), pre_logits=True) for part in batch.images.split(32)]
    features = torch.cat(parts).float()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model.head(features), batch.labels).backward()
        optimizer.step()


def run(data: Data, plan: Plan, start: Any, condition: str, seed: int) -> Row:
    """Fine-tune a copy of a model under a condition, one of `SHORTCUTS` or `CONTROLS`."""
    model = copy.deepcopy(start)
    hints = SHORTCUTS.get(condition, Hints())
    torch.manual_seed(seed)
    row, watch = Row(data.name, condition, seed), Watch(data, plan, seed)
    row.levels |= watch.areas()
    watch.look(model, 0, row)
    if condition == "new head":
        _draw_head(model)
    optimizer = _optimizer(data, model)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in tqdm(range(1, plan.steps + 1), desc=f"{data.name}: {condition} {seed}", leave=False):
        factor = 0.1 if condition == "lr decay" and step > plan.steps // 2 else min(1.0, step / RAMP)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        place = (step - 1) % (plan.steps // 4 if condition == "longer" else plan.steps)
        indices = range(place * plan.batch, (place + 1) * plan.batch)
        _step(model, optimizer, data.batch("train", seed, indices, hints, mirrored=condition == "mirrored"))
        if step % plan.every == 0:
            watch.look(model, step, row)
    return row


class Watch:
    """Looks at one probe, with each hint telling the label and with both hints random, and at the test images."""

    def __init__(self, data: Data, plan: Plan, seed: int) -> None:
        self.plan = plan
        indices = range(plan.probe)
        self.probes = {
            "label": data.batch("val", seed, indices, Hints("label", "label")),
            "random": data.batch("val", seed, indices, Hints()),
        }
        self.test = data.batch("val", seed, range(1000, 1000 + plan.test), Hints())
        corner = data.corner_masks(plan.probe)
        self.regions = {"corner": corner, "background": ~(self.probes["label"].masks | corner)}
        self.baseline: dict[str, Tensor] = {}

    def areas(self) -> dict[str, float]:
        """Share of the image that each region has, mean over the probe."""
        return {f"area/{region}": masks.float().mean().item() for region, masks in self.regions.items()}

    def look(self, model: Any, step: int, row: Row) -> None:
        """Measure a snapshot into `row`."""
        model.eval()

        def note(name: str, values: Tensor) -> None:
            row.values.setdefault(name, []).append([float(f"{value:.5g}") for value in values.tolist()])

        row.steps.append(step)
        with torch.inference_mode(), fast(model):
            guessed = torch.cat([model(part) for part in self.test.images.split(32)]).argmax(dim=1)
            row.accuracy.append((guessed == self.test.labels).float().mean().item())
            depth, logits = block_depth(model, self.probes["label"].images)
            note("depth/label", depth)
            self._effects(model, logits, note)
        for probe in self.plan.probes:
            batch = self.probes[probe]
            target = batch.labels if probe == "label" else None  # else: the predicted class
            self._maps(model, probe, batch.images, target, row, note)

    def _maps(
        self,
        model: Any,
        probe: str,
        images: Tensor,
        target: Tensor | None,
        row: Row,
        note: Callable[[str, Tensor], None],
    ) -> None:
        maps = explain(model, images, METHODS, target=target).maps
        first = not row.steps[-1]
        back = explain(model, images.flip(-1), METHODS, target=target).maps if first else {}
        for method, found in maps.items():
            name = f"{method}/{probe}"
            if first:
                self.baseline[name] = found
                row.levels[f"noise/{name}"] = noise_floor(found, back[method].flip(-1), spearman)
                row.levels[f"unrelated/{name}"] = unrelated_level(found, spearman)
            note(f"correlation/{name}", spearman(found, self.baseline[name]))
            for region, masks in self.regions.items():
                note(f"mass/{name}/{region}", region_statistics(found, masks)["mass"])
                if method == "grad_attention":
                    note(f"signed/{name}/{region}", signed_share(found, masks))

    def _effects(self, model: Any, logits: Tensor, note: Callable[[str, Tensor], None]) -> None:
        """By how much the label's log-probability falls when a region is painted with the mean colour."""
        batch = self.probes["label"]
        whole = log_probability(logits, batch.labels)
        for region, masks in self.regions.items():
            painted = model(batch.images * ~masks[:, None])
            note(f"effect/{region}", whole - log_probability(painted, batch.labels))


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image's label, (B,)."""
    found: Tensor = F.log_softmax(logits.float(), dim=1).gather(1, labels[:, None])[:, 0]
    return found


def signed_share(maps: Tensor, masks: Tensor) -> Tensor:
    """A region's sum of signed maps (B, h, w), divided by the sum of all magnitudes: (B,) in [-1, 1].

    Example:
        >>> signed_share(torch.tensor([[[3.0, -1.0], [0.0, 0.0]]]), torch.tensor([[[True, True], [False, False]]]))
        tensor([0.5000])
    """
    covered = F.adaptive_avg_pool2d(masks.to(maps.dtype)[:, None], (maps.shape[1], maps.shape[2]))[:, 0]
    return (maps * covered).sum(dim=(1, 2)) / maps.abs().sum(dim=(1, 2))


def block_depth(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """First block, counted from 1, from which on the model's own norm and head give the final class; and the logits.

    The tokens that leave a block are read as those of the last block are (the "logit lens").
    """
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for block in model.blocks
    ]
    try:
        logits: Tensor = model(images)
        classes = torch.stack([model.forward_head(model.norm(output)).argmax(dim=1) for output in outputs])
    finally:
        for handle in handles:
            handle.remove()
    return settled(classes), logits


def settled(classes: Tensor) -> Tensor:
    """First row, counted from 1, from which on a column stays what it is in the last: (R, B) to (B,).

    Example:
        >>> settled(torch.tensor([[1, 2, 0], [0, 2, 0], [1, 2, 0]]))
        tensor([3., 1., 1.])
    """
    other = (classes != classes[-1]).long()
    last_other = torch.where(other.bool(), torch.arange(1, len(classes) + 1)[:, None], 0).amax(dim=0)
    return last_other.float() + 1


def _optimizer(data: Data, model: Any) -> torch.optim.Optimizer:
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("head.")]
    head = {"params": list(model.head.parameters()), "lr": data.head_lr}
    return torch.optim.AdamW([{"params": body, "lr": data.lr}, head])


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    with fast(model):
        logits = model.train()(batch.images)
    optimizer.zero_grad()
    F.cross_entropy(logits.float(), batch.labels).backward()
    optimizer.step()


def fast(model: Any) -> torch.autocast:
    """Half precision for the larger model, which takes it half the time; maps are always in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=model.embed_dim > 100)


def _draw_head(model: Any) -> None:
    nn.init.trunc_normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
