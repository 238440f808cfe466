"""Between snapshots nothing of ours runs in a training step: counted, call by call, not timed.

Runs with the callback, and with a callback of Lightning's that does nothing in its place, are compared: every call of a
Python or C function over whole training steps, and the hooks, patched functions and function modes inside them.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.runs import Classifier, fit
from vit_explain_callback import ViTExplainCallback

STEPS = 2


class Watched(Classifier):
    """Notes in each training step what could run there besides the model."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(
            {
                "hooks of modules": [
                    (name, key, len(value))
                    for name, module in self.named_modules()
                    for key, value in vars(module).items()
                    if "hooks" in key and value
                ],
                "hooks of all modules": [
                    (key, len(value))
                    for key, value in vars(nn.modules.module).items()
                    if key.endswith("_hooks") and value
                ],
                "hooks of parameters": [
                    (name, key)
                    for name, parameter in self.named_parameters()
                    for key in ("_backward_hooks", "_post_accumulate_grad_hooks")
                    if getattr(parameter, key)
                ],
                "functions": (F.scaled_dot_product_attention, F.softmax, torch.matmul, nn.Module.__call__),
                "function modes": torch.overrides._get_current_function_mode_stack(),
            }
        )
        return super().training_step(batch, batch_idx)


class Calls:
    """Counts calls while it is open: (file, function) of Python, ("C", name) of C."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file != Path(__file__):
            self.found[f"{file.parent.name}/{file.name}", frame.f_code.co_name] += 1
        elif event == "c_call" and file != Path(__file__):
            self.found["C", argument.__qualname__] += 1


class Counting(pl.Callback):
    """Counts calls from the start of the second step to the start of the fourth."""

    def __init__(self) -> None:
        self.calls = Calls()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.calls.__enter__()
        elif batch_idx == 1 + STEPS:
            self.calls.__exit__()


@dataclass
class Seen:
    """What a run with a callback did: calls in whole steps, what was found inside each, calls of reading the step."""

    calls: Counter[tuple[str, str]]
    inside: list[Any]
    reading_the_step: Counter[tuple[str, str]]


def watch(callback: pl.Callback, folder: Path) -> Seen:
    counting, module = Counting(), Watched()
    trainer = fit(None, folder, module, max_epochs=1, more_callbacks=[counting, callback], log_every_n_steps=4)
    with Calls() as reading:
        _ = trainer.global_step
    return Seen(counting.calls.found, module.seen, reading.found)


def difference(one: Counter[Any], other: Counter[Any]) -> dict[Any, int]:
    return {key: one[key] - other[key] for key in one.keys() | other.keys() if one[key] != other[key]}


def test_only_a_glance_at_the_step_runs_between_snapshots(tmp_path: Path) -> None:
    """Five calls of ours and one reading of `trainer.global_step`: with Lightning 2.6, thirteen Python calls a step."""
    callback = ViTExplainCallback(every_n_steps=1000, num_images=2, on_error="raise")
    with_callback, without = watch(callback, tmp_path / "with"), watch(pl.Callback(), tmp_path / "without")
    assert len(callback.state_dict()["snapshots"]) == 2  # the baseline and the end of fit
    assert with_callback.inside == without.inside
    expected = Counter(
        {
            ("lightning/callback.py", "on_train_batch_end"): STEPS,
            ("lightning/fit.py", "after_step"): STEPS,
            ("tracking/errors.py", "attempt"): 2 * STEPS,  # of `guarded`, and of the guard
            ("lightning/settings.py", "steps_passed"): STEPS,
        }
    )
    for _ in range(STEPS):
        expected += without.reading_the_step
    expected["callbacks/callback.py", "on_train_batch_end"] = -STEPS  # Lightning's own, which ours stands in for
    names = with_callback.calls["lightning/callback.py", "state_key"]
    expected["lightning/callback.py", "state_key"] = names  # by which Lightning calls a callback
    expected["callbacks/callback.py", "state_key"] = -names
    assert difference(with_callback.calls, without.calls) == expected
    assert sum(expected.values()) <= 13 * STEPS


class Careless(pl.Callback):
    """Leaves something in the model or in torch."""

    def __init__(self, leaves: str) -> None:
        self.leaves = leaves
        self.patch = pytest.MonkeyPatch()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.leaves == "a hook":
            pl_module.net.blocks[0].register_forward_hook(lambda *_: None)
        elif self.leaves == "a hook on a parameter":
            pl_module.net.cls_token.register_hook(lambda _: None)
        elif self.leaves == "a patch":
            own = F.scaled_dot_product_attention
            self.patch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: own(*args, **kwargs))

    def on_train_end(self, *_: object) -> None:
        self.patch.undo()

    def on_train_batch_start(self, *_: object) -> None:
        if self.leaves == "a computation":
            torch.ones(1).sum()


@pytest.mark.parametrize("leaves", ["a hook", "a hook on a parameter", "a patch", "a computation"])
def test_what_is_left_behind_is_seen(leaves: str, tmp_path: Path) -> None:
    careless, without = watch(Careless(leaves), tmp_path / "with"), watch(pl.Callback(), tmp_path / "without")
    assert (careless.inside == without.inside) == (leaves == "a computation")
    assert difference(careless.calls, without.calls)
