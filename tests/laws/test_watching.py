"""The first validation step is watched, not run again, and cannot notice it."""

from __future__ import annotations

import copy
import logging
import pickle
import sqlite3
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import CLASSES
from tests.runs import events, fit, quiet
from tests.situations.project import Project, loader, pictures
from vit_explain_callback import ViTExplainCallback
from vit_explain_callback.lightning import trace

CALLS: Counter[str] = Counter()
FIT: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 2, "num_sanity_val_steps": 2}


def trained(callback: Any, folder: Path, module: Any, **options: Any) -> pl.Trainer:
    torch.manual_seed(1)
    return fit(callback, folder, module, loader(), loader(pictures(6)), **FIT | options)


class Counted(Project):
    """Counts its calls where no copy can hide them."""

    def forward(self, images: Tensor) -> Tensor:
        CALLS["forward"] += 1
        logits: Tensor = self.vit(images)
        return logits

    def step(self, batch: Any) -> Tensor:
        CALLS["step"] += 1
        return super().step(batch)


class HeadInStep(Counted):
    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, CLASSES)

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        CALLS["step"] += 1
        return F.cross_entropy(self.head(self.norm(self.vit(batch[0]))), batch[1])


class Wrapped(Counted):
    """The ViT and its head in one module, whose output carries more."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.net = nn.Sequential(self.vit, nn.LayerNorm(48), nn.Linear(48, CLASSES))
        del self.vit

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        CALLS["step"] += 1
        return F.cross_entropy(self.net(batch[0]).float(), batch[1].long())


@pytest.mark.parametrize("project", [Counted, HeadInStep, Wrapped])
def test_no_step_is_run_and_no_forward_of_the_module(project: Any, tmp_path: Path) -> None:
    counts = []
    for callback in (None, ViTExplainCallback(num_images=5, checks=1)):
        CALLS.clear()
        torch.manual_seed(0)
        trained(callback, tmp_path / str(callback is None), project())
        counts.append(dict(CALLS))
    assert counts[0] == counts[1]


class FastPath(nn.Module):
    """A ViT of torch's own encoder, which computes with a kernel of its own as long as nothing looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 48))
        self.position = nn.Parameter(torch.randn(1, 17, 48) * 0.1)
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], dim=1) + self.position
        logits: Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits


class Watched(Project):
    """Logs what it computes, and keeps a copy of itself as an average of weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = FastPath()
        self.kept: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept = [copy.deepcopy(self.vit)]
        loss = self.step(batch)
        self.log("val_loss", loss, batch_size=1)
        return loss


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:ViTExplainCallback")
def test_what_a_watched_step_computes_differs_in_no_bit(tmp_path: Path) -> None:
    values, hooks = [], []
    for callbacks in ([], [quiet(num_images=5), quiet(["rollout"], num_images=4)]):
        torch.manual_seed(0)
        module = Watched()
        seen: list[float] = []
        torch.manual_seed(1)
        trainer = pl.Trainer(
            default_root_dir=tmp_path / str(len(callbacks)), callbacks=[*callbacks, Seen(seen)], logger=False,
            accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False, **FIT,
        )  # fmt: skip
        trainer.fit(module, loader(pictures(6)), loader())
        values.append(seen)
        hooks.append([len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.kept[0].modules()])
        pickle.dumps(module.kept[0])
        assert "validation_step" not in vars(trainer.strategy)
    assert values[0] == values[1]
    assert len(values[0]) > 2
    assert hooks[0] == hooks[1]
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"


class Seen(pl.Callback):
    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs.item())


class Failing(Project):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch)
        raise KeyError("the user's own")


def test_a_watched_step_that_fails_raises_the_users_error_and_leaves_nothing(tmp_path: Path) -> None:
    module = Failing()
    with pytest.raises(KeyError, match="the user's own"):
        trained(quiet(), tmp_path, module)
    assert nn.Module.__call__.__name__ == "_wrapped_call_impl"
    assert torch.overrides._get_current_function_mode() is None  # type: ignore[no-untyped-call]


def test_a_fault_of_the_watching_does_not_reach_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vit_explain_callback.vit.sources.Flow.computed", broken)
    torch.manual_seed(0)
    module = Project()
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        trainer = trained(quiet(num_images=5), tmp_path, module)
    assert trainer.global_step == 2


PICKLED: Counter[str] = Counter()


class Record:
    """Says when it is copied, in whatever way."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        PICKLED["record"] += 1
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        PICKLED["record"] += 1
        return self

    __copy__ = __reduce_ex__


class Holding(Project):
    """Holds what no copy can be made of, and much that none should be made of."""

    registry: ClassVar[list[type]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Holding.registry.append(cls)

    def __new__(cls, folder: Path) -> Holding:
        return super().__new__(cls)

    def __init__(self, folder: Path) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)
        self.records = [Record() for _ in range(1000)]
        self.file = open(folder / "notes.txt", "w")  # noqa: SIM115
        self.connection = sqlite3.connect(":memory:")
        self.lock, self.local = threading.Lock(), threading.local()
        self.numbers = (number for number in range(10))
        self.temporary = tempfile.TemporaryDirectory(dir=folder)

    def __getstate__(self) -> Any:
        raise RuntimeError("not to be pickled")

    def __del__(self) -> None:
        PICKLED["deleted"] += 1

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.vit(images) * 1.0)
        return logits


def test_a_module_is_not_copied_with_what_it_holds(tmp_path: Path) -> None:
    PICKLED.clear()
    torch.manual_seed(0)
    module = Holding(tmp_path)
    registered = list(Holding.registry)
    callback = quiet(num_images=5)
    trainer = trained(callback, tmp_path, module, enable_checkpointing=False)
    assert callback.tracker is not None
    assert callback.tracker.history.count >= 2
    assert PICKLED == {}
    assert Holding.registry == registered
    assert Path(module.temporary.name).is_dir()
    assert next(module.numbers) == 0
    assert events(trainer).Tags()["scalars"]
    with torch.no_grad():
        expected = module.eval()(callback.tracker.probe.images)
    torch.testing.assert_close(callback.tracker.history.now.logits, expected)
    module.file.close()
    module.connection.close()
    module.temporary.cleanup()


class Stem(Project):
    """Convolutions over many features before the ViT's tokens."""

    def __init__(self) -> None:
        super().__init__(in_chans=3)
        self.stem = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(6)])
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.1))

    def forward(self, images: Tensor) -> Any:
        return self.vit(self.stem(images - self.get_buffer("mean")))


def test_no_features_are_kept_of_a_watched_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the images that enter: not what convolutions made of them."""
    kept: list[int] = []
    original = trace.StepRecorder.trace

    def looked_at(self: Any, *args: Any) -> Any:
        kept.append(len([call for call in self._calls if call.images is not None]))
        return original(self, *args)

    monkeypatch.setattr(trace.StepRecorder, "trace", looked_at)
    torch.manual_seed(0)
    module, callback = Stem(), quiet(num_images=5)
    trained(callback, tmp_path, module)
    assert kept[0] == 4  # the module, its stem, and there the first part and its convolution
    assert callback.tracker is not None
    assert callback.tracker.history.count >= 2
    assert callback.tracker.probe.images is not None
    with torch.no_grad():
        expected = module.eval().vit(module.stem(callback.tracker.probe.images))
    torch.testing.assert_close(callback.tracker.history.now.logits, expected)


class Swapping(Project):
    """Puts other tensors in the place of its weights, as some conversions of torch do."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        weight = self.vit.head.weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))
        return self.step(batch)


def test_weights_can_be_swapped_in_a_watched_step(tmp_path: Path) -> None:
    values = []
    for callback in (None, quiet(num_images=5)):
        torch.manual_seed(0)
        module, seen = Swapping(), list[float]()
        trained(callback, tmp_path / str(callback is None), module, more_callbacks=[Seen(seen)])
        values.append((seen, module.vit.head.weight.tolist()))
    assert values[0] == values[1]


class Wrapping(pl.Callback):
    """Wraps the strategy's step and the call of every module, before the callback does."""

    def __init__(self) -> None:
        self.steps = self.calls = 0
        self.call = nn.Module.__call__

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        step = trainer.strategy.validation_step

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return step(*args, **kwargs)

        def counted_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.call(module, *args, **kwargs)

        trainer.strategy.validation_step = counted_step
        nn.Module.__call__ = counted_call  # type: ignore[method-assign]

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        nn.Module.__call__ = self.call  # type: ignore[method-assign]


@pytest.mark.parametrize("is_first", [False, True])
def test_what_the_user_has_wrapped_stays_so(is_first: bool, tmp_path: Path) -> None:
    counts = []
    for callback in (None, quiet(num_images=5)):
        torch.manual_seed(0)
        wrapping = Wrapping()
        others = [] if callback is None else [callback]
        more = [wrapping, *others] if is_first else [*others, wrapping]
        trainer = trained(None, tmp_path / str(callback is None), Project(), more_callbacks=more)
        assert trainer.strategy.validation_step.__name__ == "counted_step"
        assert nn.Module.__call__ is wrapping.call
        counts.append((wrapping.steps, wrapping.calls))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 1


class Talking(Project):
    """Its parts print and log, in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.vit.head.register_forward_hook(self.talk)

    def talk(self, *_: Any) -> None:
        print("said by the head")
        LOG.warning("logged by the head")


LOG = logging.getLogger("user")


def test_what_parts_print_and_log_in_a_snapshot_is_not_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    heard = []
    for callback in (None, quiet(num_images=5)):
        torch.manual_seed(0)
        trained(callback, tmp_path / str(callback is None), Talking())
        heard.append((capsys.readouterr().out.count("said by the head"), caplog.text.count("logged by the head")))
        caplog.clear()
    assert heard[0] == heard[1]
    assert min(heard[0]) > 1
