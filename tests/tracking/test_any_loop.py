"""Training ends in the same bits with a tracker and without it: a plain loop, transformers, accelerate, Fabric."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.bits import differing
from tests.models import tiny_vit
from tests.optional import optional
from vit_explain_callback import Explainer, ExplanationTracker, Probe

accelerate, hf_trainer, transformers = map(optional, ("accelerate", "hf_trainer", "transformers"))

EVERY = 2
STEPS = 6
Tracker = Callable[[nn.Module], ExplanationTracker]


def tracker_of(model: nn.Module, kind: type[ExplanationTracker] = ExplanationTracker) -> ExplanationTracker:
    images, labels = hf_trainer.squares(3)
    return kind(Explainer(model, ["rollout", "grad_rollout"]), Probe.of(images, labels), on_error="raise")


def timm_vit() -> Any:
    """With dropout of every kind."""
    return tiny_vit(num_classes=3, drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.2).train()


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*hf_trainer.squares(24)), batch_size=4, shuffle=True)


def steps(model: Any, optimizer: Any, loader: Any, backward: Any, tracker: Tracker | None) -> list[float]:
    """The loop that is the same wherever the model comes from."""
    follow = None if tracker is None else tracker(model)
    losses = []
    for step, (images, labels) in enumerate(loader):
        if follow is not None and step % EVERY == 0:
            follow.observe(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    if follow is not None:
        follow.finish()
        assert follow.history.count == STEPS // EVERY
    return losses


def plain(tracker: Tracker | None, folder: Path) -> tuple[nn.Module, Any]:
    model = timm_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, steps(model, optimizer, batches(), Tensor.backward, tracker)


def hugging_face_trainer(tracker: Tracker | None, folder: Path) -> tuple[nn.Module, Any]:
    model = hf_trainer.small_vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(*hf_trainer.squares(24), strict=True)]
    numbers: dict[str, Any] = {"num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1}
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    callbacks: list[Any] = [] if tracker is None else [hf_trainer.TrackExplanations(tracker(model), EVERY)]
    arguments = transformers.TrainingArguments(str(folder), per_device_train_batch_size=4, **numbers, **quiet)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    if callbacks:
        assert callbacks[0].tracker.history.count == 1 + STEPS // EVERY
    return model, [
        {key: row[key] for key in ("loss", "grad_norm")} for row in trainer.state.log_history if "loss" in row
    ]


def accelerated(tracker: Tracker | None, folder: Path) -> tuple[nn.Module, Any]:
    accelerator = accelerate.Accelerator(cpu=True)
    net = timm_vit()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(net, optimizer, batches())
    return net, steps(model, optimizer, loader, accelerator.backward, tracker)


def fabric(tracker: Tracker | None, folder: Path) -> tuple[nn.Module, Any]:
    lightning = Fabric(accelerator="cpu", devices=1)
    net = timm_vit()
    model, optimizer = lightning.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    return net, steps(model, optimizer, lightning.setup_dataloaders(batches()), lightning.backward, tracker)


LOOPS = [plain, hugging_face_trainer, accelerated, fabric]


def outcome(loop: Callable[..., tuple[nn.Module, Any]], tracker: Tracker | None, folder: Path) -> dict[str, Any]:
    """Everything a run leaves behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model, losses = loop(tracker, folder)
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "losses": losses,
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }


def undisturbed(kind: type[ExplanationTracker] = ExplanationTracker) -> Tracker:
    """A tracker whose images are drawn from a stream that is put back: making a probe is the user's own doing."""

    def make(model: nn.Module) -> ExplanationTracker:
        with torch.random.fork_rng():
            return tracker_of(model, kind)

    return make


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_with_a_tracker_ends_in_the_same_bits(loop: Any, tmp_path: Path) -> None:
    without = outcome(loop, None, tmp_path)
    assert len(without["losses"]) == STEPS
    assert differing(without, outcome(loop, None, tmp_path)) == []  # the run itself can be repeated
    assert differing(without, outcome(loop, undisturbed(), tmp_path)) == []


class Careless(ExplanationTracker):
    """Draws one random number."""

    def observe(self, step: int) -> dict[str, float]:
        torch.rand(1)
        return super().observe(step)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_careless_tracker_is_caught(loop: Any, tmp_path: Path) -> None:
    without = outcome(loop, None, tmp_path)
    places = differing(without, outcome(loop, undisturbed(Careless), tmp_path))
    assert any(place.startswith("/state") for place in places)
    assert any(place.startswith("/losses") for place in places)
