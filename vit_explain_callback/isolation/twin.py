"""Make a twin of a module: it computes the same outputs, and nothing that it changes reaches the module.

A twin shares the memory of the parameters and owns everything else that a forward pass may change: buffers, plain
tensors, counters, queues, lists of outputs, metrics, random generators. No parameter of it asks for a gradient, every
module is in evaluation mode, nothing is compiled, and it knows no trainer.

The copying is pickle's: it follows every reference, and what is shared in the original is shared in the copy. What
pickle cannot copy, or would copy by running the user's code, has a rule in `copying`: modules, tensors, functions and
plain objects. An object that cannot be copied is never shared: its stand-in raises when it is used.
"""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode_temporarily

from vit_explain_callback.isolation import copying
from vit_explain_callback.isolation.borrowed import Borrowed
from vit_explain_callback.isolation.copy_on_write import CopyOnWrite
from vit_explain_callback.isolation.copying import (
    ATOMIC_TYPES,
    BACKWARD_HOOKS,
    COPY_RULES,
    RECONSTRUCTORS,
    TRAINING_REFERENCES,
    copy_by_id,
    discard_log,
    module_way,
    object_way,
)

StandIn: TypeAlias = "Callable[[Twin, object], object]"


class Twin:
    """Copies objects, and knows what the copies own.

    Args:
        stand_in: Gives this twin what takes the place of an object; None for one that is to be copied.

    Attributes:
        module: The twin of the module in question, once it was made.
        state: Addresses of the memory of the buffers and plain tensors, which are the twin's own.
        moved: Memory that parameters were given when they were written to, by the address of the module's.
    """

    def __init__(self, stand_in: StandIn = lambda _twin, _value: None) -> None:
        self.module: Any = None
        self.state: set[int] = set()
        self.parameters: dict[int, list[nn.Parameter]] = {}
        self.moved: dict[int, torch.UntypedStorage] = {}
        self.stand_in = stand_in
        self.copies: dict[int, Any] = {}  # what pickle does not make, by the `id` of the original
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.functions: dict[int, types.FunctionType] = {}
        self.modules: list[nn.Module] = []
        self.alive: list[object] = []  # so that no `id` is given twice, and what is referred to weakly stays
        self._stream = io.BytesIO()
        self._pickler, self._unpickler = _Pickler(self._stream, self), _Unpickler(self._stream, self)

    def guarding(self) -> CopyOnWrite:
        """Inside, a parameter that is written to becomes the twin's own: first-call initialisation, for instance."""
        return CopyOnWrite(self.parameters, self.moved)

    def borrowed(self, value: Any) -> Any:
        """What passes for `value` in its own methods, and copies each of its attributes when that is asked for."""
        if id(value) not in self.copies:
            clone = Borrowed(self, value)
            self.register(value, clone)
            if "_trainer" in vars(value):
                vars(clone).update(log=discard_log, log_dict=discard_log)
            if isinstance(value, nn.Module) and _sets_more_than_flags(type(value)):
                clone.train(False)
        return self.copies[id(value)]

    def attribute(self, name: str, part: Any) -> Any:
        """A copy of one attribute of an object that is borrowed."""
        if name in TRAINING_REFERENCES:
            return self.stand_in(self, part)
        return type(part)() if name in BACKWARD_HOOKS else self.copy(part)

    def copy(self, value: Any) -> Any:
        """A copy of any object; of what was copied before, the same one.

        Raises:
            RuntimeError: If an object in it has a way of its own of being copied, and that fails.
        """
        if type(value) in ATOMIC_TYPES:
            return value
        self._stream.seek(0)
        self._stream.truncate()
        before = len(self.modules)
        try:
            with _without_function_modes():  # which would note what is copied as computed
                self._pickler.dump(value)
                self._stream.seek(0)
                clone = self._unpickler.load()
            self._evaluate(self.modules[before:])
        except Exception as error:
            raise RuntimeError(
                f"Expected an object that can be copied, but copying {type(value).__name__} failed: {error!r}."
            ) from error
        return clone

    def register(self, value: object, clone: object) -> tuple[Any, ...]:
        """Register `clone` as the copy of `value`."""
        self.copies[id(value)] = clone
        self.alive.append(value)
        return copy_by_id, (id(value),)

    def close(self) -> None:
        """Release all copies without waiting for the garbage collector or running a user's `__del__`."""
        for module in self.modules:
            if hasattr(type(module), "__del__"):
                with suppress(TypeError):  # one with slots
                    object.__setattr__(module, "__class__", nn.Module)
        for container in (self.modules, self.alive, self.copies, self.functions):
            container.clear()
        del self._pickler, self._unpickler

    def _evaluate(self, modules: list[nn.Module]) -> None:
        """Put new modules into evaluation mode, outermost first: an overridden `train` may set more than a flag."""
        told: set[nn.Module] = set()
        for module in reversed(modules):
            if _sets_more_than_flags(type(module)) and module not in told:
                told.update(module.modules())
                with self.guarding():
                    module.train(False)
        for module in modules:
            vars(module)["training"] = False


class _Pickler(pickle.Pickler):
    """Says of all but the plainest objects how they are copied, in the form of `object.__reduce__`."""

    def __init__(self, stream: io.BytesIO, twin: Twin) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._twin = twin
        self._ways: dict[type, Callable[[Twin, Any], Any]] = {}

    def reducer_override(self, value: Any) -> Any:
        twin, kind = self._twin, type(value)
        if kind is types.FunctionType and value in RECONSTRUCTORS:
            return NotImplemented  # by its name
        if id(value) in twin.copies:
            return copy_by_id, (id(value),)
        if kind not in self._ways:
            self._ways[kind] = next((way for kinds, way in COPY_RULES if issubclass(kind, kinds)), object_way)
        way = self._ways[kind]
        if way in (object_way, module_way) and (clone := twin.stand_in(twin, value)) is not None:
            return twin.register(value, clone)
        return way(twin, value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, twin: Twin) -> None:
        super().__init__(stream)
        self._twin = twin

    def find_class(self, module: str, name: str) -> Any:
        return functools.partial(getattr(copying, name), self._twin)


@contextmanager
def _without_function_modes() -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(_len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        yield


def _sets_more_than_flags(kind: type[nn.Module]) -> bool:
    return kind.train is not nn.Module.train
