"""Whatever a module holds, its twin owns a copy of it that does the same, or raises; nothing is shared in silence."""

from __future__ import annotations

import array
import collections
import contextlib
import ctypes
import functools
import io
import itertools
import multiprocessing
import socket
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.isolation.undisturbed import undisturbed


class Holder(nn.Module):
    """Holds something, changes it in each call, and answers with it."""

    def __init__(self, held: Any, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.held = held
        self.change = change

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight + float(self.change(self.held))  # type: ignore[arg-type]


class Slots:
    __slots__ = ("count", "names")

    def __init__(self) -> None:
        self.count, self.names = 0, ["a"]

    def step(self) -> int:
        self.count += 1
        self.names.append("b")
        return self.count + len(self.names)


class OwnNew(Slots):
    __slots__ = ()

    def __new__(cls, size: int) -> OwnNew:
        return super().__new__(cls)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.count = size


class Forgetful:
    """Leaves its cache out when it is pickled, and says so by a tuple."""

    def __init__(self) -> None:
        self.cache = {"a": 1}

    def __getstate__(self) -> tuple[int]:  # type: ignore[override]
        return (3,)

    def step(self) -> int:
        self.cache["a"] += 1
        return self.cache["a"]


class Context:
    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: Any) -> None:
        pass


def entered(held: Context) -> int:
    with held:
        return held.depth


class Named:
    def __init__(self) -> None:
        self.held = {"count": 0}


class Weakly:
    def __init__(self) -> None:
        self.named = Named()
        self.weak = weakref.WeakValueDictionary({"a": self.named})

    def step(self) -> int:
        assert self.weak["a"] is self.named
        self.named.held["count"] += 1
        return self.weak["a"].held["count"]


def closing() -> Callable[[], int]:
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def recursive() -> Callable[[int], int]:
    seen: list[int] = []

    def step(depth: int) -> int:
        seen.append(depth)
        return len(seen) if depth == 0 else step(depth - 1)

    return step


def keyword_only() -> Callable[..., int]:
    def step(*, seen: list[int] = []) -> int:  # noqa: B006
        seen.append(1)
        return len(seen)

    return step


class Cached:
    def __init__(self) -> None:
        self.calls = 0
        self.get = functools.lru_cache(maxsize=None)(self.compute)

    def compute(self, key: int) -> int:
        self.calls += 1
        return self.calls + key


def lasting(function: Any) -> Any:
    return function


def increased(held: Any, name: str) -> Any:
    setattr(held, name, getattr(held, name) + 1)
    return getattr(held, name)


RIGHT: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], object]]] = {
    "slots": (Slots, lambda held: held.step(), lambda held: (held.count, held.names)),
    "its own __new__": (lambda: OwnNew(4), lambda held: held.step(), lambda held: (held.count, held.names)),
    "__getstate__ that forgets": (Forgetful, lambda held: held.step(), lambda held: held.cache),
    "a context": (Context, entered, lambda held: held.depth),
    "bytearray": (lambda: bytearray(b"a"), lambda held: held.append(1) or len(held), bytes),
    "array": (lambda: array.array("i", [1]), lambda held: held.append(1) or len(held), list),
    "BytesIO": (lambda: io.BytesIO(b"abc"), lambda held: len(held.read(1)) + held.tell(), lambda held: held.tell()),
    "StringIO": (lambda: io.StringIO("abc"), lambda held: held.write("x") + held.tell(), lambda held: held.tell()),
    "an iterator over a list": (lambda: iter([1, 2, 3]), next, lambda held: held.__length_hint__()),
    "ctypes": (lambda: ctypes.c_int(3), lambda held: increased(held, "value"), lambda held: held.value),
    "a closure with nonlocal": (closing, lambda held: held(), lambda held: held.__closure__[0].cell_contents),
    "a recursive closure": (recursive, lambda held: held(2), lambda held: str(held.__closure__[0].cell_contents)),
    "keyword-only defaults": (keyword_only, lambda held: held(), lambda held: held.__kwdefaults__),
    "lru_cache round a method": (Cached, lambda held: held.get(len(str(held.calls))), lambda held: held.calls),
    "lru_cache of a closure": (
        lambda: functools.lru_cache(functools.partial(lasting, closing())),
        lambda held: held.__wrapped__.args[0](),
        lambda held: held.__wrapped__.args[0].__closure__[0].cell_contents,
    ),
    "a partial": (
        lambda: functools.partial(lambda seen: seen.append(1) or len(seen), []),
        lambda held: held(),
        lambda held: held.args,
    ),
    "a method of a builtin": (
        lambda: [].append,
        lambda held: held(1) or len(held.__self__),
        lambda held: held.__self__,
    ),
    "Counter": (lambda: collections.Counter("aab"), lambda held: held.update("a") or held["a"], dict),
    "OrderedDict": (
        lambda: collections.OrderedDict(a=[1]),
        lambda held: held["a"].append(1) or len(held["a"]),
        lambda held: dict(held),
    ),
    "defaultdict": (
        lambda: collections.defaultdict(list),
        lambda held: held["a"].append(1) or len(held["a"]),
        lambda held: dict(held),
    ),
    "an array of numpy": (lambda: np.zeros(2), lambda held: held.__iadd__(1).sum(), lambda held: held.tolist()),
    "numpy's generator": (
        lambda: np.random.default_rng(0),
        lambda held: held.random(),
        lambda held: str(held.bit_generator.state),
    ),
    "torch's generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda held: torch.rand(1, generator=held),
        lambda held: held.get_state().tolist(),
    ),
    "a lock": (threading.Lock, lambda held: held.acquire(blocking=False), lambda held: held.locked()),
    "an event": (threading.Event, lambda held: held.set() or held.is_set(), lambda held: held.is_set()),
    "Sobol's engine": (
        lambda: torch.quasirandom.SobolEngine(1, scramble=True, seed=0),
        lambda held: held.draw(1),
        lambda held: (held.num_generated, held.quasi.tolist()),
    ),
    "weak values": (Weakly, lambda held: held.step(), lambda held: dict(held.weak["a"].held)),
    "nested": (
        lambda: SimpleNamespace(a={"b": [SimpleNamespace(c=0)]}),
        lambda held: increased(held.a["b"][0], "c"),
        lambda held: held.a["b"][0].c,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_copy_does_the_same_and_the_original_stays(name: str) -> None:
    make, change, read = RIGHT[name]
    module, other = Holder(make(), change), Holder(make(), change)
    before = repr(read(module.held))
    inputs = torch.zeros(1, 2)
    with undisturbed(module) as twin, torch.no_grad():
        found = [twin.module(inputs) for _ in range(2)]
    with torch.no_grad():
        expected = [other(inputs) for _ in range(2)]
    assert torch.cat(found).equal(torch.cat(expected))
    assert repr(read(module.held)) == before
    assert repr(read(other.held)) != before  # so that this can be seen


@contextlib.contextmanager
def opened(make: Callable[[], Any]) -> Iterator[Any]:
    held = make()
    yield held
    getattr(held, "close", lambda: None)()


def counting() -> Iterator[int]:
    yield from itertools.count()


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "an open file": (tempfile.TemporaryFile, lambda held: held.write(b"1")),
    "a generator": (counting, next),
    "a connection": (lambda: sqlite3.connect(":memory:"), lambda held: held.execute("create table a (b)") and 1),
    "a socket": (socket.socket, lambda held: held.fileno()),
    "a shared number": (lambda: multiprocessing.Value("i", 3), lambda held: increased(held, "value")),
    "a pipe": (lambda: multiprocessing.Pipe()[1], lambda held: held.send(1) or 1),
    "what belongs to a thread": (threading.local, lambda held: increased(held, "a")),
    "a loader's iterator": (lambda: iter(DataLoader(TensorDataset(torch.ones(3)))), next),
    "a profiler": (lambda: torch.profiler.profile(), lambda held: held.step() or 1),
    "an optimizer": (lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), lambda held: held.step() or 1),
    "an object with a __del__": (
        type("Deleting", (), {"__del__": lambda self: None, "count": 0}),
        lambda held: increased(held, "count"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_copy_raises_when_it_is_used(name: str) -> None:
    make, change = REFUSED[name]
    with opened(make) as held:
        module = Holder(held, change)
        with undisturbed(module) as twin, torch.no_grad():
            with pytest.raises(TypeError, match="cannot be copied, so it cannot be used while the model is explained"):
                twin.module(torch.zeros(1, 2))
            twin.module.change = lambda _: 1.0  # what does not use it runs
            assert twin.module(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]


def test_nothing_is_deleted_with_a_twin() -> None:
    deleted = []

    class Deleting(nn.Linear):
        def __del__(self) -> None:
            deleted.append(self)

    module = nn.Sequential(Deleting(2, 2))
    with undisturbed(module) as twin:
        twin.module(torch.zeros(1, 2))
    del twin
    assert deleted == []


class Keyed(nn.Module):
    """Dictionaries keyed by modules and parameters, weak ones, attributes of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.linear.weight.scale = [2.0]  # type: ignore[attr-defined]
        self.of_module = {self.linear: [1.0]}
        self.of_parameter = {self.linear.weight: [3.0]}
        self.weak: Any = weakref.WeakKeyDictionary({self.linear: [5.0]})
        self.reference = weakref.ref(self.linear)
        self.proxy = weakref.proxy(self.linear)

    def forward(self, inputs: Tensor) -> Tensor:
        weight: Any = self.linear.weight
        held = (self.of_module[self.linear], self.of_parameter[weight], self.weak[self.linear], weight.scale)
        for values in held:
            values[0] += 1
        assert self.reference() is self.linear
        return self.linear(inputs) * sum(values[0] for values in held) + self.proxy(inputs)


def test_keys_that_are_modules_or_parameters_are_those_of_the_twin() -> None:
    torch.manual_seed(0)
    module = Keyed()
    inputs = torch.ones(1, 2)
    with undisturbed(module) as twin, torch.no_grad():
        found = [twin.module(inputs) for _ in range(2)]
    assert list(module.of_module.values()) == [[1.0]]
    assert module.weak[module.linear] == [5.0]
    weight: Any = module.linear.weight
    assert weight.scale == [2.0]
    with torch.no_grad():
        assert all(one.equal(module(inputs)) for one in found)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(4))
        self.view = self.get_buffer("counts")[1:3]
        self.register_buffer("wide", torch.ones(1).expand(1 << 32))
        self.slice = torch.arange(1 << 22)[5:9]

    def forward(self, inputs: Tensor) -> Tensor:
        self.get_buffer("counts").add_(1)
        return inputs + self.view + self.slice[:2] + self.get_buffer("wide")[:2]


def test_views_of_one_memory_are_views_of_one_copy() -> None:
    module, other = Views(), Views()
    with undisturbed(module) as twin, torch.no_grad():
        found = [twin.module(torch.zeros(2)) for _ in range(2)]
        assert twin.module.wide.untyped_storage().nbytes() <= 8  # not 16 GiB
        assert twin.module.slice.untyped_storage().nbytes() < 1 << 20
    assert module.get_buffer("counts").tolist() == [0] * 4
    assert torch.cat(found).equal(torch.cat([other(torch.zeros(2)) for _ in range(2)]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_scripted_parts_are_copied_and_evaluated(way: str) -> None:
    part = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    example = torch.randn(4, 2)
    scripted: Any = torch.jit.script(part) if way == "script" else torch.jit.trace(part.eval(), example)
    scripted.train()
    module = nn.Sequential(nn.Linear(2, 2), scripted).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with undisturbed(module) as twin, torch.no_grad():
        found = [twin.module(example) for _ in range(2)]
    assert found[0].equal(found[1])
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    assert scripted.training
    if way == "script":
        assert found[0].equal(module.eval()(example))


class Trained(nn.Module):
    """Sets more than flags when it changes its mode, and writes to a weight, as LoRA that is merged does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.merged = False

    def train(self, mode: bool = True) -> Trained:
        if not mode and not self.merged:
            self.weight.data += 1
        if mode and self.merged:
            self.weight.data -= 1
        self.merged = not mode
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.weight * (1 if self.merged else 100)


def test_an_overridden_train_is_called_on_the_twin_alone() -> None:
    module: Any = nn.Sequential(Trained()).train()
    with undisturbed(module) as twin, torch.no_grad():
        assert twin.module(torch.zeros(2)).tolist() == [2.0, 2.0]
    assert module[0].weight.tolist() == [1.0, 1.0]
    assert (module[0].training, module[0].merged) == (True, False)


class Marked(nn.Parameter):
    """A parameter as quantised ones are: of a class of its own, with attributes that the forward needs."""


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight: Any = Marked(torch.ones(2, dtype=torch.int8), requires_grad=False)
        weight.scale = torch.full((2,), 0.5)
        self.weight = weight

    def forward(self, inputs: Tensor) -> Tensor:
        weight: Any = self.weight
        assert type(weight) is Marked
        scale: Tensor = vars(weight)["scale"]
        return inputs + weight.data.float() * scale


def test_parameters_of_other_classes_keep_what_they_hold() -> None:
    module = Quantised()
    with undisturbed(module) as twin:
        assert twin.module(torch.zeros(2)).tolist() == [0.5, 0.5]
        assert twin.module.weight.data_ptr  # of the same class


@pytest.mark.parametrize("call", [2, 3, 5])
def test_a_write_to_a_parameter_in_a_later_pass_is_the_twins_own(call: int) -> None:
    class Warming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == call:
                nn.functional.normalize(self.weight.data, dim=0, out=self.weight.data)
            return inputs * self.weight

    module = Warming()
    with undisturbed(module) as twin, torch.no_grad():
        found = [twin.module(torch.ones(2)) for _ in range(call)]
    assert module.weight.tolist() == [1.0, 1.0]
    assert found[-2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(found[-1], torch.full((2,), 0.5**0.5))


def test_only_what_is_asked_for_is_copied_of_what_is_borrowed() -> None:
    class Root(nn.Module):
        scale = 2.0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.records = [{"n": i} for i in range(3)]
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
            self.count = 0

        @property
        def doubled(self) -> int:
            return 2 * self.count

        def extra(self) -> float:
            return self.scale

        def forward(self, inputs: Tensor) -> Tensor:
            self.count += 1
            self.records.append({"n": self.count})
            assert isinstance(self, Root)
            assert super().extra_repr() == ""
            return self.linear(inputs) * self.doubled * self.extra() + len(self.records)

    root, other = Root(), Root()
    other.load_state_dict(root.state_dict())
    twin = Twin(lambda twin, value: twin.borrowed(value) if value is root else None)
    made = twin.copy(root)
    assert made is not root
    assert vars(made) == {"training": False}
    with torch.no_grad():
        found = [made(torch.ones(1, 2)) for _ in range(2)]
        assert torch.cat(found).equal(torch.cat([other(torch.ones(1, 2)) for _ in range(2)]))
    assert (root.count, len(root.records)) == (0, 3)
    assert (made.count, len(made.records)) == (2, 5)
    assert "file" not in vars(made)
    root.file.close()
    other.file.close()


class Slotted(nn.Module):
    __slots__ = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen = [0]

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen[0] += 1
        return inputs + self.weight * self.seen[0]


class Frozen(nn.Module):
    """May not be changed once it is made, and cleans up at its end."""

    deleted: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "is_made", False) and name != "training":
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __del__(self) -> None:
        self.deleted.append(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.weight


@pytest.mark.parametrize("kind", [Slotted, Frozen])
def test_a_module_may_keep_its_attributes_in_another_way(kind: Any) -> None:
    module, other = kind(), kind()
    with undisturbed(module) as twin, torch.no_grad():
        found = twin.module(torch.zeros(2))
    del twin
    assert found.equal(other(torch.zeros(2)))
    assert getattr(module, "seen", [0]) == [0]
    assert Frozen.deleted == []


class Sampling(nn.Module):
    """Holds a distribution of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.ones(2))
        self.noise = torch.distributions.Normal(self.mean, torch.ones(2))

    def forward(self, inputs: Tensor) -> Any:
        return inputs + self.noise.mean + self.noise.sample()


def test_a_distribution_is_one_of_the_twins_weights() -> None:
    module = Sampling()
    torch.manual_seed(3)
    with torch.no_grad():
        expected = module(torch.zeros(2))
    torch.manual_seed(3)
    with undisturbed(module) as twin, torch.no_grad():
        found = twin.module(torch.zeros(2))
        assert twin.module.noise.loc is twin.module.mean
    assert found.equal(expected)
