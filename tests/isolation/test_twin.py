"""A twin computes the same, and nothing that it does to itself reaches the module."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from tests.models import random_images, tiny_vit
from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.isolation.undisturbed import undisturbed

WAYS: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "data.copy_": lambda weight, new: weight.data.copy_(new),
    "no_grad copy_": lambda weight, new: weight.copy_(new),
    "a view": lambda weight, new: weight[1:].copy_(new[1:]),
    "one item": lambda weight, new: weight.__setitem__(0, new[0]),
    "out=": lambda weight, new: torch.add(new, 0, out=weight.data),
    "foreach": lambda weight, new: torch._foreach_add_([weight.data], [new]),
    "init": lambda weight, new: nn.init.constant_(weight, 7.0),
    "numpy": lambda weight, new: weight.detach().numpy().__setitem__(slice(None), new.numpy()),
    "numpy of a view": lambda weight, new: np.asarray(weight.data[1:]).__setitem__(slice(None), new[1:]),
    "dlpack": lambda weight, new: torch.utils.dlpack.from_dlpack(weight.data.__dlpack__()).copy_(new),
    "storage": lambda weight, new: weight.untyped_storage().copy_(new.untyped_storage()),
    "data +=": lambda weight, new: weight.__setattr__("data", weight.data.__iadd__(new)),
    "detach +=": lambda weight, new: weight.detach().__iadd__(new),
    "another tensor": lambda weight, new: setattr(weight, "data", new),
}


class Writing(nn.Module):
    """Writes to its parameter when it is called, as first-call initialisation does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.tied = self.weight
        self.way = way

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            WAYS[self.way](self.weight, inputs.mean(dim=0) + 1)
        return inputs * self.tied


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_is_written_to_becomes_the_twins_own(way: str) -> None:
    module, copied = Writing(way), Writing(way)
    inputs = torch.arange(6.0).view(2, 3)
    before = module.weight.clone()
    with undisturbed(module) as twin:
        found = [twin.module(inputs) for _ in range(2)]
    expected = [copied(inputs).detach() for _ in range(2)]
    assert module.weight.equal(before)
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert twin.module.get_parameter("weight").equal(copied.weight)


# The others give the model another tensor, which is no writing to memory.
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("another tensor", "data +=")])
def test_the_models_own_parameter_is_not_written_to_from_outside(way: str) -> None:
    """As a function of the user's does that holds on to his model."""
    module = Writing(way)
    before, storage = module.weight.clone(), module.weight.untyped_storage().data_ptr()
    with undisturbed(module) as twin, torch.no_grad():
        WAYS[way](module.weight, torch.full((3,), 5.0))
        twin.module(torch.ones(2, 3))
    assert module.weight.equal(before)
    assert module.weight.untyped_storage().data_ptr() == storage


def test_parameters_are_shared_where_nothing_writes_to_them() -> None:
    module = tiny_vit().train()
    images = random_images(2)
    with undisturbed(module) as twin, torch.no_grad():
        assert twin.module(images).equal(module.eval()(images))
    assert not twin.moved
    assert not any(child.training for child in twin.module.modules())
    for name, parameter in module.named_parameters():
        own = twin.module.get_parameter(name)
        assert own.data_ptr() == parameter.data_ptr()
        assert (own.requires_grad, parameter.requires_grad) == (False, True)


class Busy(nn.Module):
    """Changes everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.linear = nn.Linear(3, 3)
        self.metric = torchmetrics.MeanMetric()
        self.calls, self.plain, self.array = 0, torch.zeros(2), np.zeros(2)
        self.outputs: list[Tensor] = []
        self.queue: deque[int] = deque([1, 2], maxlen=2)
        self.state: dict[str, Any] = {"seen": [0], "nested": {"names": {"a"}}}
        self.notes = SimpleNamespace(count=0, history=[])
        self.generator, self.random = torch.Generator(), random.Random(3)
        self.bound, self.partial = self.note, functools.partial(self.note, 2)
        self.closure = lambda: self.note(4)
        self.linear.register_forward_hook(self.hook)

    def note(self, by: int = 1) -> None:
        self.calls += by

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.outputs.append(output)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.linear(inputs)
        with torch.no_grad():
            self.get_buffer("mean").mul_(0.9).add_(output.mean(dim=0))
        self.metric.update(output.mean())
        self.bound()
        self.partial()
        self.closure()
        self.plain += 1
        self.array += 1
        self.queue.append(self.calls)
        self.state["seen"].append(self.calls)
        self.state["nested"]["names"].add("b")
        self.notes.count += 1
        self.notes.history.append(self.calls)
        torch.rand(1, generator=self.generator)
        self.random.random()
        return output


def held(module: Any) -> list[Any]:
    return [
        module.mean.tolist(),
        float(module.metric.mean_value),
        module.metric._update_count,
        module.calls,
        module.plain.tolist(),
        module.array.tolist(),
        len(module.outputs),
        list(module.queue),
        repr(module.state),
        repr(module.notes),
        module.generator.get_state().tolist(),
        module.random.getstate(),
    ]


def test_what_has_no_memory_of_its_own_stands_for_nothing_else() -> None:
    """Else an operation that writes to one empty tensor would be taken for one that writes to another."""
    module = nn.Module()
    module.weight, module.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))
    module.register_buffer("nothing", torch.ones(0))
    twin = Twin()
    twin.copy(module)
    assert twin.parameters.keys() == {module.weight.untyped_storage().data_ptr()}
    assert twin.state == set()


def test_nothing_that_a_forward_does_to_itself_reaches_the_module() -> None:
    module, other = Busy(), Busy()
    other.load_state_dict(module.state_dict())
    before = held(module)
    with undisturbed(module) as twin:
        for _ in range(2):
            twin.module(torch.ones(4, 3))
    assert held(module) == before
    for _ in range(2):
        other(torch.ones(4, 3))
    made: Any = twin.module
    assert held(made) == held(other)  # and the twin has done all of it
    assert made.calls == 14
    assert made.queue.maxlen == 2


def test_what_wraps_a_module_is_taken_off() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    compiled: Any = torch.compile(module)
    assert type(Twin().copy(compiled)) is nn.Sequential
    assert type(Twin().copy(nn.DataParallel(module))) is nn.Sequential


def test_objects_that_refer_to_each_other_do_so_in_the_twin() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.itself = [module]  # type: ignore[assignment]
    twin: Any = Twin().copy(module)
    assert twin.itself[0] is twin
    shared = SimpleNamespace(one=[1], other=None)
    shared.other = shared.one
    made = Twin().copy(shared)
    assert made.one is made.other
    assert made.one is not shared.one


def test_what_stands_in_for_an_object_is_what_the_twin_refers_to() -> None:
    module, outside, stand_in = nn.Linear(1, 1), SimpleNamespace(), SimpleNamespace()
    module.refers = {"to": outside}  # type: ignore[assignment]
    twin: Any = Twin(lambda _, value: stand_in if value is outside else None).copy(module)
    assert twin.refers["to"] is stand_in
