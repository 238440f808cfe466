"""Make a twin of a module: it computes the same, and what it does to itself the module does not notice.

A twin shares the memory of the parameters and owns everything else that a forward pass may change: buffers, plain
tensors, counters, queues, lists of outputs, metrics, random generators. No parameter of it asks for a gradient, every
module is in evaluation mode, nothing is compiled, and it knows no trainer.
"""

from __future__ import annotations

import collections
import copy
import functools
import random
import types
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from vit_explain_callback.vit.copy_on_write import CopyOnWrite, address
from vit_explain_callback.vit.wrappers import unwrapped

_ATOMS = {type(None), bool, int, float, complex, str, bytes, types.BuiltinFunctionType}
_NOT_YET = object()
# Of every module, and no other module's; most of them are empty.
_BOOKKEEPING = {name for name, part in vars(nn.Module()).items() if isinstance(part, dict | set)}
_CONTAINERS = (dict, list, set, collections.deque)
_PLAIN: list[Any] = [object.__new__, types.SimpleNamespace.__new__]
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_PARTS = {"_parameters", "_buffers", "_modules"}  # dictionaries that no one but the module refers to
# Hooks that run in a backward pass are for the user's own.
_NOT_TAKEN = {"_backward_hooks", "_backward_pre_hooks"}
_NO_ONE = {"_trainer", "_fabric", "_compiled_call_impl"}
# Objects of these libraries reach far beyond the module, or cannot be made without their constructors.
_SHARED = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "logging", "threading", "multiprocessing"}


class Twin:
    """A twin, and what it owns.

    Args:
        module: Stays as it is.
        replaced: What stands in for an object that the module refers to, by `id` of the object.

    Attributes:
        module: The twin.
        parameters: Each parameter of the twin, by the address of its memory.
        state: Addresses of the memory of the buffers and plain tensors, which are the twin's own.
        moved: Memory that parameters were given when they were written to, by the address of the module's.
    """

    def __init__(self, module: nn.Module, replaced: Mapping[int, object] | None = None) -> None:
        self.parameters: dict[int, list[nn.Parameter]] = {}
        self.state: set[int] = set()
        self.moved: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, Any] = dict(replaced or {})
        self._makers: dict[type, Callable[[Twin, Any], Any]] = {}
        self._pickling: dict[type, bool] = {}
        self._kept_alive: list[object] = []  # so that no `id` is given twice
        self.module: nn.Module = self._copy(module)

    @classmethod
    def itself(cls, module: nn.Module) -> Twin:
        """A module that must be run itself."""
        twin = cls(nn.Identity())
        twin.module = module
        return twin

    def owning_what_it_writes(self) -> AbstractContextManager[None]:
        """Inside, a parameter that is written to becomes the twin's own: first-call initialisation, for instance.

        It costs some microseconds for each operation.
        """
        return CopyOnWrite(self.parameters, self.moved)

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        made = self._made.get(id(value), _NOT_YET)
        if made is not _NOT_YET:
            return made
        if kind not in self._makers:
            self._makers[kind] = next((make for kinds, make in _MAKERS if isinstance(value, kinds)), Twin._any_other)
        made = self._makers[kind](self, value)
        if id(value) not in self._made:
            self._remember(value, made)
        return self._made[id(value)]

    def _remember(self, value: object, made: object) -> None:
        self._made[id(value)] = made
        self._kept_alive.append(value)

    def _any_other(self, value: Any) -> Any:
        return self._object(value) if _is_plain(value) else value

    def _module(self, value: nn.Module) -> Any:
        if (inner := unwrapped(value)) is not value:
            return self._copy(inner)
        if isinstance(value, torch.jit.ScriptModule):
            return value
        made = type(value).__new__(type(value))
        self._remember(value, made)
        kind = type(value)
        if kind not in self._pickling:
            self._pickling[kind] = _pickles_itself(kind)
        if self._pickling[kind] and not is_parametrized(value):
            own: dict[str, Any] = kind.__getstate__(value)  # type: ignore[no-untyped-call]
            kept = {name: part for name, part in vars(value).items() if name in _NO_ONE}
            # A torchmetrics' `update` is bound to the metric again.
            made.__setstate__(self._attributes(own | kept))  # type: ignore[no-untyped-call]
        else:
            made.__dict__.update(self._attributes(vars(value)))
        if "_trainer" in made.__dict__:
            made.__dict__ |= {"log": _silent, "log_dict": _silent}
        made.__dict__["training"] = False
        return made

    def _attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of a module's; thousands in a model, most of them constants and empty containers."""
        made: dict[str, Any] = {}
        for name, part in attributes.items():
            kind = type(part)
            if kind in _ATOMS:
                made[name] = part
            elif name in _NOT_TAKEN or (name in _BOOKKEEPING and not part):
                made[name] = kind()
            elif name in _PARTS and kind is dict:
                made[name] = {key: self._copy(value) for key, value in part.items()}
            elif name in _NO_ONE:
                made[name] = self._made.get(id(part))
            else:
                made[name] = self._copy(part)
        return made

    def _parameter(self, value: nn.Parameter) -> Any:
        if isinstance(value, UninitializedParameter):
            return _uninitialised(value, requires_grad=False)
        made = nn.Parameter(value.detach(), requires_grad=False)
        if place := address(made):  # 0 would stand for every tensor without memory of its own
            self.parameters.setdefault(place, []).append(made)
        return made

    def _tensor(self, value: Tensor) -> Any:
        if isinstance(value, UninitializedBuffer):
            return _uninitialised(value)
        made = value.detach().clone()
        self.state |= {address(made)} - {0}
        return made

    def _container(self, value: Any) -> Any:
        made = copy.copy(value)  # keeps a subclass, a default factory, a greatest length
        self._remember(value, made)
        if isinstance(made, dict):
            for key in list(made):
                dict.__setitem__(made, key, self._copy(made[key]))
        elif isinstance(made, set):
            items = [self._copy(item) for item in made]
            made.clear()
            made.update(items)
        else:
            for index, item in enumerate(list(made)):
                made[index] = self._copy(item)
        return made

    def _tuple(self, value: Any) -> Any:
        items = [self._copy(item) for item in value]
        if all(one is other for one, other in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _method(self, value: types.MethodType) -> Any:
        return types.MethodType(value.__func__, self._copy(value.__self__))

    def _partial(self, value: functools.partial[Any]) -> Any:
        kwargs = {name: self._copy(given) for name, given in value.keywords.items()}
        return functools.partial(self._copy(value.func), *map(self._copy, value.args), **kwargs)

    def _function(self, value: types.FunctionType) -> Any:
        """The function with copies of the variables that it closes over, or itself if there are none to copy."""
        cells = value.__closure__ or ()
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, (*cells,))
        self._remember(value, made)
        copied = tuple(self._cell(cell) for cell in cells)
        defaults = self._copy(value.__defaults__)
        if all(one is other for one, other in zip(copied, cells, strict=True)) and defaults is value.__defaults__:
            self._made[id(value)] = value
            return value
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, copied)
        made.__kwdefaults__ = self._copy(value.__kwdefaults__)
        made.__dict__.update(value.__dict__)
        self._made[id(value)] = made
        return made

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # an empty one
            return cell
        made = self._copy(content)
        return cell if made is content else types.CellType(made)

    def _handle(self, value: RemovableHandle) -> RemovableHandle:
        made = copy.copy(value)
        hooks = value.hooks_dict_ref()
        if hooks is not None:
            made.hooks_dict_ref = weakref.ref(self._copy(hooks))
        return made

    def _reference(self, value: weakref.ReferenceType[Any]) -> Any:
        target = value()
        return weakref.ref(self._copy(target)) if isinstance(target, nn.Module) else value

    def _torch_generator(self, value: torch.Generator) -> torch.Generator:
        return torch.Generator(value.device).set_state(value.get_state())

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        made = kind.__new__(kind)
        self._remember(value, made)
        made.__dict__.update({name: self._copy(part) for name, part in vars(value).items()})
        return made


_MAKERS: list[tuple[Any, Callable[[Twin, Any], Any]]] = [
    ((int, float, complex, str, bytes, type, types.ModuleType), lambda _, value: value),
    (nn.Module, Twin._module),
    (nn.Parameter, Twin._parameter),
    (Tensor, Twin._tensor),
    (_CONTAINERS, Twin._container),
    (tuple, Twin._tuple),
    (types.MethodType, Twin._method),
    (functools.partial, Twin._partial),
    (types.FunctionType, Twin._function),
    (RemovableHandle, Twin._handle),
    (weakref.ReferenceType, Twin._reference),
    (torch.Generator, Twin._torch_generator),
    (np.ndarray, lambda _, value: value.copy()),
    (_GENERATORS, lambda _, value: copy.deepcopy(value)),
]


def shallow_twin(value: Any) -> Any:
    """A copy of any object whose attributes are copied as a twin's are."""
    made, twin = copy.copy(value), Twin(nn.Identity())
    made.__dict__.update({name: twin._copy(part) for name, part in vars(value).items()})
    return made


def _uninitialised(value: Any, **options: Any) -> Any:
    return type(value)(device=value.device, dtype=value.dtype, **options)


def _pickles_itself(kind: Any) -> bool:
    own = getattr(kind, "__getstate__", None)
    return own is not None and all(own is not getattr(base, "__getstate__", None) for base in (object, nn.Module))


def _is_plain(value: Any) -> bool:
    """Whether an object is no more than its attributes: copied one by one, they make another."""
    kind: Any = type(value)
    return (
        hasattr(value, "__dict__")
        and kind.__new__ in _PLAIN
        and kind.__reduce_ex__ is object.__reduce_ex__
        and not _pickles_itself(kind)
        and not isinstance(value, torch.utils.data.Dataset | torch.utils.data.DataLoader)
        and not any(base.__module__.split(".")[0] in _SHARED for base in kind.__mro__)
        and not callable(getattr(value, "__enter__", None))
    )


def _silent(*_args: Any, **_kwargs: Any) -> None:
    """What a twin logs goes nowhere."""
