"""The comparison sees what a careless callback would do to a user's project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from tests.bits import differing
from tests.laws.test_user_data import CASES as DATA
from tests.laws.test_user_state import CASES as STATE
from tests.laws.user_project import Case, leave
from tests.situations.project import pictures


class Careless(pl.Callback):
    """A callback as one would first write it."""

    def __init__(self, act: Callable[[Any, Any], Any]) -> None:
        self.act = act

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            self.act(trainer, pl_module)


def loader_of(trainer: Any) -> Any:
    return trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()


def reads(trainer: Any, module: Any) -> Any:
    return next(iter(loader_of(trainer)))


def reads_in_this_process(trainer: Any, module: Any) -> Any:
    return loader_of(trainer).dataset[0]


def calls(trainer: Any, module: Any) -> Any:
    return module.eval()(pictures()[:2]), module.train()


def writes(trainer: Any, module: Any) -> Any:
    trainer.logger.experiment.add_scalar("own", 0.5, 0)


CARELESS: dict[str, tuple[Callable[[Any, Any], Any], Case]] = {
    "draws from a loader's generator": (reads, DATA["shuffled by a generator of its own"]),
    "reads on in a stream": (reads, DATA["a stream that reads on"]),
    "takes a batch of a loader that is its own iterator": (reads, DATA["a loader that is its own iterator"]),
    "asks for the loader again": (reads, DATA["a module that counts how often it makes its loader"]),
    "opens the file": (reads_in_this_process, DATA["a file opened in the first __getitem__"]),
    "moves the centre": (calls, STATE["a buffer replaced by detached values"]),
    "sets the scale": (calls, STATE["ActNorm under no_grad"]),
    "counts": (calls, STATE["counters, lists, dicts, a deque, a data class"]),
    "measures": (calls, STATE["torchmetrics updated in forward"]),
    "fires a hook": (calls, STATE["a closure as a hook"]),
    "writes among the user's events": (writes, STATE["a step that looks at trainer and logger"]),
}


@pytest.mark.parametrize("name", CARELESS)
def test_a_careless_callback_is_caught(name: str, tmp_path: Path) -> None:
    act, case = CARELESS[name]
    without = leave(case, tmp_path / "without", [])
    assert differing(without.everything, leave(case, tmp_path / "with", [Careless(act)]).everything) != []
