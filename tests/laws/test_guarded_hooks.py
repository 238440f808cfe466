"""No hook of the callback stops a run, however the model, the filters of warnings or the standard output are made.

What makes a refusal is a `raise` of this package; what the user's code, Python or torch raises in a frame of it is not.
"""

from __future__ import annotations

import io
import sys
import textwrap
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.test_faults import assert_trained_alike, ending
from tests.lightning.test_loggers import Spy
from tests.models import tiny_vit
from tests.processes import python
from tests.runs import Classifier, Pictures, fit, loader, messages, quiet, saved
from vit_explain_callback import Detail, ViTExplainCallback
from vit_explain_callback.lightning.fit import Fit
from vit_explain_callback.options.images import check_images
from vit_explain_callback.tracking.errors import Guard, is_refusal, raised_by_us, warn


def short(**options: Any) -> ViTExplainCallback:
    return quiet(["rollout"], **{"num_images": 2} | options)


class Sized(nn.Identity):
    def __new__(cls, size: int) -> Any:
        return super().__new__(cls)

    def __init__(self, size: int) -> None:
        super().__init__()


class GivesATuple(nn.Identity):
    def __getstate__(self) -> Any:
        return 1, 2

    def __setstate__(self, state: Any) -> None: ...


class Reduced(nn.Identity):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot be pickled")


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.proxy = weakref.proxy(module)


class Strange(Classifier):
    """Has a part that cannot be copied, or not so simply."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.part: Any = nn.Identity()
        if kind == "__new__(cls, size)":
            self.part = Sized(3)
        elif kind == "a tuple as state":
            self.part = GivesATuple()
        elif kind == "no pickle":
            self.part = Reduced()
        elif kind == "a proxy":
            self.holders = [Holder(self.net)]
        elif kind == "an iterator":
            self.lines = iter(["a", "b"])
        elif kind == "an unhashable part":
            self.part = type("Unhashable", (nn.Identity,), {"__eq__": lambda *_: True})()

    def forward(self, images: Tensor) -> Any:
        return self.part(self.net(images)) if isinstance(self.part, nn.Module) else self.net(images)


KINDS = ["__new__(cls, size)", "a tuple as state", "no pickle", "a proxy", "an iterator"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_cannot_be_copied_is_no_refusal(tmp_path: Path, kind: str) -> None:
    _, plain, _ = ending(None, tmp_path, Strange(kind))
    trainer, weights, said = ending(short(), tmp_path, Strange(kind))
    assert trainer.global_step == 8
    assert_trained_alike(weights, plain)
    if not saved(trainer):
        (only,) = said
        assert "explain the checkpoints of the run instead: `explain(module.part, images)`" in only


def test_only_a_raise_of_this_package_is_a_refusal() -> None:
    def caught(work: Any) -> BaseException:
        with pytest.raises(Exception) as error:  # noqa: PT011
            work()
        return error.value

    assert is_refusal(caught(lambda: check_images(torch.zeros(3))))
    guest = dict(vars(sys.modules["vit_explain_callback.options.images"]))
    for source in ("int('x')", "len(3)", "Sized.__new__(Sized)", "{}['a']", "(lambda a: a)()", "(1, 2) | {}", "fail()"):
        space = {**guest, "Sized": Sized, "fail": lambda: exec("raise ValueError(1)", {"__name__": "of_the_user"})}
        error = caught(lambda source=source, space=space: exec(source, space))
        assert not raised_by_us(error), source
    assert raised_by_us(caught(lambda: exec("raise ValueError('x')", guest)))
    assert raised_by_us(caught(lambda: exec("try:\n    raise ValueError('x')\nfinally:\n    a = 1", guest)))
    assert not is_refusal(caught(lambda: exec("raise RuntimeError('x')", guest)))


class Freed(Classifier):
    """Lets go of what was trained when training ends."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def on_train_end(self) -> None:
        if self.how == "deleted":
            del self.net
        elif self.how == "a part deleted":
            del self.net.blocks
        elif self.how == "None":
            self.net = None
        elif self.how == "no memory":
            self.net.head.weight.data = torch.empty(0)
        elif self.how == "another model":
            self.net = nn.Linear(3, 3)


@pytest.mark.parametrize("steps", [1, 3], ids=["the last step is seen", "the last step is not"])
@pytest.mark.parametrize("how", ["deleted", "a part deleted", "None", "no memory", "another model"])
def test_a_module_that_is_freed_when_training_ends(tmp_path: Path, how: str, steps: int) -> None:
    trainer, _, said = ending(short(every_n_steps=steps, checks=9), tmp_path, Freed(how))
    assert trainer.global_step == 8
    assert [snapshot.step for snapshot in saved(trainer)] == ([*range(9)] if steps == 1 else [0, 3, 6])
    assert len(said) <= 2
    assert any("Training continues" in text for text in said) or steps == 1
    if steps == 1:
        assert Path(trainer.log_dir, "explanations", "summary.txt").is_file()
        assert not [text for text in said if "the snapshot at step" in text and how != "another model"]


HOOKS = ["after_step", "after_epoch", "after_validation", "end", "release", "begin"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_fault_in_any_hook_is_said_once(tmp_path: Path, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a fault of ours")

    _, plain, _ = ending(None, tmp_path, Classifier())
    monkeypatch.setattr(Fit, hook, broken)
    _, weights, said = ending(short(), tmp_path, Classifier())
    assert_trained_alike(weights, plain)
    assert len([text for text in said if "a fault of ours" in text]) == 1
    with pytest.raises(KeyError):
        fit(short(on_error="raise"), tmp_path)


TIMES = [0]
"""How often it was raised; what a module holds is copied with it."""


class Fails(Classifier):
    """Raises when it is explained after the baseline, with a message that differs each time."""

    def __init__(self, message: Any) -> None:
        super().__init__()
        self.message = message
        TIMES[0] = 0
        self.net.register_forward_pre_hook(self.fail)

    def fail(self, net: Any, _args: Any) -> None:
        if not net.training and self.global_step > 0:
            TIMES[0] += 1
            raise RuntimeError(self.message(TIMES[0]))


CHANGING = {
    "an address": lambda n: f"{object()!r} at {id(n):#x}",
    "numbers": lambda n: f"loss {n / 7:.3e} of {-n} images, {n**9}",
    "nan": lambda n: f"got {'nan' if n % 2 else 1.5}",
    "a tensor": lambda n: f"{torch.arange(n)} of shape {tuple(range(n + 1))}",
    "a path": lambda n: f"no file /tmp/tmpab{n}cd{n}/step={n}.pt",
    "a hash": lambda n: f"node {n:032x} of worker-{n}",
    "a date": lambda n: f"at 2024-05-{n:02d} 10:{n:02d}:00,{n:03d}",
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_message_that_changes_is_said_once(tmp_path: Path, kind: str) -> None:
    *_, said = ending(short(every_n_steps=1), tmp_path, Fails(CHANGING[kind]))
    assert len(said) == 1


def test_other_errors_are_said_but_never_without_end() -> None:
    guard = Guard("warn")

    def say(error: Exception) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            guard.failed("it failed", error)
        return len(caught)

    assert [say(error) for error in (ValueError("a"), KeyError("a"), ValueError("b"), ValueError("a"))] == [1, 1, 1, 0]

    def wordy(word: str) -> Exception:
        try:
            raise RuntimeError(word)
        except RuntimeError as error:
            return error

    assert sum(say(wordy("".join(chr(97 + index) for _ in range(index + 1)))) for index in range(20)) == 3


NOTICES = {
    "no baseline": lambda folder: fit(short(), folder, validation=Stream()),
    "no pictures": lambda folder: fit(short(), folder, logger=Spy()),
    "few images": lambda folder: fit(short(num_images=64), folder),
    "another machine": lambda folder: fit(short(), "memory://runs", logger=Spy(), enable_checkpointing=False),
    "a failure": lambda folder: fit(short(every_n_steps=1), folder, Fails(lambda n: "no")),
    "degenerate": lambda folder: fit(quiet(["grad_rollout"]), folder, ZeroHead()),
    "a full log": lambda folder: fit(short(detail=Detail(max_pictures_mb=0.0001)), folder),
}


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([next(iter(loader(Pictures(4))))])


class ZeroHead(Classifier):
    def __init__(self) -> None:
        super().__init__(lr=0)
        nn.init.zeros_(self.net.head.weight)


@pytest.mark.warnings_as_errors
@pytest.mark.parametrize("notice", NOTICES)
def test_warnings_that_are_errors_do_not_stop_a_run(
    tmp_path: Path, notice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(action: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings(action, message="ViTExplainCallback")
            trainer = NOTICES[notice](tmp_path)
        assert trainer.global_step == 8
        return messages(caught)

    expected = said("always")
    assert expected
    assert [text[:60] for text in said("error")] == [text[:60] for text in expected]


WITH_ERRORS = """
    import sys, warnings
    from tests.runs import fit, quiet
    {setup}
    warnings.filterwarnings("error", message="ViTExplainCallback")
    trainer = fit(quiet(["rollout"], num_images=64), sys.argv[1])
    open(sys.argv[1] + "/done", "w").write(str(trainer.global_step))
"""
STREAMS = {
    "as they are": "",
    "closed": "sys.stdout.close(); sys.stderr.close()",
    "None": "sys.stdout = sys.stderr = None",
    "ascii": "sys.stdout.reconfigure(encoding='ascii', errors='strict')",
    "detached": "sys.stdout.detach()",
    "an unknown encoding": "sys.stdout = type('Odd', (), dict(encoding='klingon', write=print, flush=print))()",
}


@pytest.mark.parametrize("streams", STREAMS)
def test_notices_on_broken_streams(tmp_path: Path, streams: str) -> None:
    source = textwrap.dedent(WITH_ERRORS).format(setup=STREAMS[streams])
    if streams in ("closed", "None", "detached", "an unknown encoding"):  # which Lightning's own lines do not survive
        quiet = "import logging, warnings\nlogging.disable(logging.CRITICAL)\nwarnings.simplefilter('ignore')\n"
        source = quiet + source
    done = python("-c", source, str(tmp_path))
    assert (tmp_path / "done").read_text() == "8", done.stderr
    if streams in ("as they are", "ascii"):
        assert done.stderr.count("the validation set gave 16") == 1


@pytest.mark.warnings_as_errors
def test_a_warning_hook_of_the_users_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no log")

    out = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", out)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", refuse)
        warn("look")
        warn("there \udc80 → here")
    assert out.getvalue() == "ViTExplainCallback: look\nViTExplainCallback: there \\udc80 → here\n"


def test_an_ordinary_model_is_still_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `vit`"):
        fit(short(vit="nowhere"), tmp_path, Classifier(tiny_vit()))
