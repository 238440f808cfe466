"""Somebody else's project, run with or without the callback, and everything that the run leaves behind."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor

from tests.bits import differing
from tests.runs import events, fit, messages, quiet, saved
from tests.situations.check import FAILED
from tests.situations.project import Project, loader, training

OURS = "ViTExplainCallback"
NAMED = ("metrics", "logged", "events")
NOT_STATE = {"_parameters", "_buffers", "_modules", "_trainer", "_fabric"}
CONTAINERS = (list, tuple, set, deque)


@dataclass(frozen=True)
class Case:
    """A project in which something of the user's is at stake.

    Attributes:
        source: Public thread that tells of it.
        before: What happened to training.
        module: Makes the LightningModule.
        loaders: Makes the loaders of training and of validation.
        trainer: Options of the Trainer.
        warned: How many warnings of a failure there may be.
        snapshots: How many snapshots there must be at least.
    """

    source: str
    before: str
    module: Callable[[], pl.LightningModule] = Project
    loaders: Callable[[], tuple[Any, Any]] = lambda: (training(), loader())
    trainer: Mapping[str, Any] = field(default_factory=dict)
    warned: tuple[int, ...] = (0,)
    snapshots: int = 3


@dataclass
class Left:
    """What a run leaves behind, and what the callback said and took."""

    everything: dict[str, Any]
    said: list[str]
    steps: list[int]


def check(case: Case, folder: Path) -> None:
    """With the callback, the run leaves behind what it leaves without, bit by bit."""
    without = leave(case, folder / "without", [])
    found = leave(case, folder / "with", [quiet()])
    changed = differing(without.everything, of_user(found.everything, without.everything))
    if changed:
        again = leave(case, folder / "again", [])
        assert differing(without.everything, again.everything) == [], "the run itself cannot be repeated"
    assert changed == []
    failed = [text for text in found.said if FAILED.search(text)]
    assert len(failed) in case.warned, failed
    assert len(found.steps) >= case.snapshots, (found.steps, found.said)


def leave(case: Case, folder: Path, callbacks: Sequence[pl.Callback]) -> Left:
    """Run a case for 2 epochs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module = case.module()
    train, validation = case.loaders()
    options: dict[str, Any] = {"max_epochs": 2} | dict(case.trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(None, folder, module, validation, train, more_callbacks=callbacks, **options)
    everything = {
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "module": state_of(module),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": plain(trainer.callback_metrics),
        "logged": plain(trainer.logged_metrics),
        "training data": state_of_data(train),
        "validation data": state_of_data(validation),
        "events": scalars_of(trainer),
        "checkpoint": checkpoint(trainer, folder / "end.ckpt"),
    }
    return Left(everything, messages(caught), [snapshot.step for snapshot in saved(trainer)])


def of_user(everything: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, Any]:
    """What a run leaves behind under the names that the user has given."""
    named = {part: {key: everything[part][key] for key in without[part] if key in everything[part]} for part in NAMED}
    return {**everything, **named}


def scalars_of(trainer: pl.Trainer) -> dict[str, list[tuple[int, float]]]:
    board = events(trainer)
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def checkpoint(trainer: pl.Trainer, path: Path) -> dict[str, Any]:
    """What a checkpoint holds apart from the callback's own entry; it loads without trusting anybody."""
    trainer.save_checkpoint(path)
    held: dict[str, Any] = torch.load(path, weights_only=True)
    held["callbacks"] = {key: value for key, value in held["callbacks"].items() if not key.startswith(OURS)}
    return plain(held)  # type: ignore[no-any-return]


def state_of(module: pl.LightningModule) -> dict[str, Any]:
    """Parameters with their gradients and flags, buffers, and every attribute of every submodule."""
    state: dict[str, Any] = {"state_dict": plain(module.state_dict())}
    for name, parameter in module.named_parameters():
        state[f"{name}.grad"] = (plain(parameter.grad), parameter.requires_grad)
    for name, child in module.named_modules():
        attributes = {key: value for key, value in vars(child).items() if key not in NOT_STATE}
        state[f"{name}.attributes"] = {
            # The keys of hooks count up over the whole process.
            key: plain(list(value.values()) if key.endswith("_hooks") else value)
            for key, value in attributes.items()
        }
    return state


def state_of_data(loader: Any) -> Any:
    parts = [loader, *(getattr(loader, name, None) for name in ("dataset", "sampler", "generator"))]
    return [plain(vars(part)) if type(part).__module__.startswith("tests") else plain(part) for part in parts]


def plain(value: Any) -> Any:
    """A value as containers, numbers and tensors that no later step changes."""
    if isinstance(value, Tensor):
        return value.detach().clone().as_subclass(Tensor)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return plain(value.bit_generator.state)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, CONTAINERS):
        return [type(value).__name__, *(plain(one) for one in value)]
    if dataclasses.is_dataclass(value) or isinstance(value, torchmetrics.Metric):
        return plain(vars(value))
    simple = isinstance(value, int | float | str | bytes | torch.dtype | torch.device | None)
    return value if simple else type(value).__name__
