"""Rules for copying each kind of object, in the form of `object.__reduce__`: constructor, arguments, state, setter.

Constructors and setters get the twin as their first argument.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import struct
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.managers import BaseProxy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.hooks import RemovableHandle

from vit_explain_callback.isolation.borrowed import Uncopied
from vit_explain_callback.isolation.copy_on_write import address, owned_view
from vit_explain_callback.isolation.wrappers import unwrapped

if TYPE_CHECKING:
    from vit_explain_callback.isolation.twin import Twin

ATOMIC_TYPES = {type(None), bool, int, float, complex, str, bytes}
BACKWARD_HOOKS = {"_backward_hooks", "_backward_pre_hooks"}  # for the user's own backward pass
TRAINING_REFERENCES = {"_trainer", "_fabric", "_compiled_call_impl"}
_LEFT_OUT = BACKWARD_HOOKS | TRAINING_REFERENCES
# Of every module, and no other module's; most of them are empty.
_BOOKKEEPING = {name: type(part) for name, part in vars(nn.Module()).items() if isinstance(part, dict | set)}
# Objects of these libraries reach far beyond the module, and a forward pass does not change them.
_LIBRARIES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning"}
_COPIED = ("torch.distributions.", "torch.quasirandom", "torch.utils.weak")  # but these hold what may be changed
_POINTER, _MANAGED_WEAKREF, _MANAGED_DICT = struct.calcsize("P"), 1 << 3, 1 << 4
_SLACK = 1 << 20  # bytes of memory around a tensor that are copied with it, for the sake of other views of them


def _shared(twin: Twin, value: Any) -> Any:
    return twin.register(value, value)


def _refused(twin: Twin, value: Any) -> Any:
    return twin.register(value, Uncopied(type(value).__name__))


def module_way(twin: Twin, value: nn.Module) -> Any:
    """A module by its attributes, whatever it says of its state; without what wraps it."""
    if (inner := unwrapped(value)) is not value:
        return _same, (inner,)
    if isinstance(value, torch.jit.ScriptModule):
        return twin.register(value, value.__deepcopy__({}).eval())
    attributes = vars(value)
    # Empty ones are made anew, as there are thousands in a model.
    state = {
        name: part for name, part in attributes.items() if name not in _LEFT_OUT and (name not in _BOOKKEEPING or part)
    }
    state |= {name: twin.stand_in(twin, attributes[name]) for name in TRAINING_REFERENCES if name in attributes}
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return object.__new__, (type(value),), (state, slots), None, None, _fill_module


def _fill_module(twin: Twin, module: nn.Module, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes = vars(module)
    attributes.update(state[0])
    _fill(twin, module, state[1])
    for name, kind in _BOOKKEEPING.items():
        if name not in attributes:
            attributes[name] = kind()
    if "_trainer" in attributes:
        attributes.update(log=discard_log, log_dict=discard_log)
    twin.modules.append(module)


def _tensor(twin: Twin, value: Tensor) -> Any:
    if isinstance(value, nn.Parameter):
        clone: Any = _parameter(twin, value)
    elif isinstance(value, UninitializedBuffer):
        clone = _uninitialised(value)
    else:
        clone = _tensor_copy(twin, value)
    way = twin.register(value, clone)
    return (*way, dict(vars(value)), None, None, _fill) if getattr(value, "__dict__", None) else way


def _parameter(twin: Twin, value: nn.Parameter) -> nn.Parameter:
    if isinstance(value, UninitializedParameter):
        clone: nn.Parameter = _uninitialised(value, requires_grad=False)
        return clone
    if type(value) is not nn.Parameter and issubclass(type(value), nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            clone = Tensor._make_subclass(type(value), value.detach(), False)
    else:
        clone = nn.Parameter(value.detach(), requires_grad=False)
    if place := address(clone):  # 0 would stand for every tensor without memory of its own
        twin.parameters.setdefault(place, []).append(clone)
    return clone


def _uninitialised(value: Any, **options: Any) -> Any:
    return type(value)(device=value.device, dtype=value.dtype, **options)


def _tensor_copy(twin: Twin, value: Tensor) -> Tensor:
    """A tensor with memory of its own, which it shares with the copies of other views of the same memory."""
    place = address(value)
    if place in twin.parameters:
        return value.detach()  # its memory is guarded
    clone = value.detach()
    if type(value) is not Tensor or not place or value.layout is not torch.strided or value.is_conj() or value.is_neg():
        clone = clone.clone()
    else:
        span = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
        span = span if value.numel() else 0
        memory = value.untyped_storage()
        if memory.nbytes() > 2 * span * value.element_size() + _SLACK:
            clone = clone.as_strided((span,), (1,)).clone().as_strided(value.shape, value.stride(), 0)
        else:
            if place not in twin.storages:
                twin.storages[place] = memory.clone()  # type: ignore[no-untyped-call]
            clone = owned_view(twin.storages[place], value)
    twin.state |= {address(clone)} - {0}
    return clone


def _torch_generator(twin: Twin, value: torch.Generator) -> Any:
    return twin.register(value, torch.Generator(value.device).set_state(value.get_state()))


def _function(twin: Twin, value: types.FunctionType) -> Any:
    """A function of its own where it holds anything that can change: what it closes over, defaults, attributes."""
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    holds = value.__closure__ or vars(value) or any(type(default) not in ATOMIC_TYPES for default in defaults)
    if not holds or _is_global(value):
        return twin.register(value, value)
    twin.functions[id(value)] = value
    state = (value.__defaults__, value.__kwdefaults__, dict(vars(value)))
    return _function_like, (id(value), value.__closure__), state, None, None, _fill_function


def _function_like(twin: Twin, place: int, closure: Any) -> types.FunctionType:
    value = twin.functions[place]
    clone = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure)
    clone.__qualname__, clone.__module__ = value.__qualname__, value.__module__
    return clone


def _fill_function(_: Twin, clone: types.FunctionType, state: tuple[Any, Any, dict[str, Any]]) -> None:
    clone.__defaults__, clone.__kwdefaults__, attributes = state
    clone.__dict__.update(attributes)


def _cell(_: Twin, value: types.CellType) -> Any:
    try:
        content = value.cell_contents
    except ValueError:  # an empty one
        return types.CellType, ()
    return types.CellType, (), content, None, None, _fill_cell


def _fill_cell(_: Twin, clone: types.CellType, content: Any) -> None:
    clone.cell_contents = content


def _builtin(twin: Twin, value: Any) -> Any:
    """A method of an object is one of its copy."""
    owner = getattr(value, "__self__", None)
    return (
        _shared(twin, value) if owner is None or isinstance(owner, types.ModuleType | type) else _reduced(twin, value)
    )


def _cached(twin: Twin, value: Any) -> Any:
    """A function that remembers its results remembers others."""
    if _is_global(value):
        return _shared(twin, value)
    return _cached_again, (value.__wrapped__, *value.cache_parameters().values())


def _cached_again(_: Twin, function: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _reference(twin: Twin, value: Any) -> Any:
    target = value()
    return _shared(twin, value) if target is None else (_refer, (target,))


def _refer(twin: Twin, target: Any) -> Any:
    twin.alive.append(target)
    return weakref.ref(target)


def _proxy(_: Twin, value: Any) -> Any:
    return _refer_by_proxy, (value.__repr__.__self__,)


def _refer_by_proxy(twin: Twin, target: Any) -> Any:
    twin.alive.append(target)
    return weakref.proxy(target)


def object_way(twin: Twin, value: Any) -> Any:
    """An object by its attributes where it is no more than these, or else as it is pickled."""
    kind: Any = type(value)
    of_library = kind.__module__.partition(".")[0] in _LIBRARIES and not kind.__module__.startswith(_COPIED)
    if of_library and not isinstance(value, tuple | dict | RemovableHandle):
        return _shared(twin, value)
    if isinstance(getattr(kind, "__del__", None), types.FunctionType):
        return _refused(twin, value)  # what it does at its end, a copy would do before
    if not _is_plain(kind):
        return _reduced(twin, value)
    state = dict(getattr(value, "__dict__", ()))
    for name in _slots(kind):
        if name not in state and hasattr(value, name):
            state[name] = getattr(value, name)
    return object.__new__, (kind,), state, None, None, _fill


def _slots(kind: type) -> list[str]:
    names: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return names


def _is_plain(kind: Any) -> bool:
    """Whether an object is no more than its attributes and slots, as pickle tells it, and has no way of its own."""
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return False
    size: int = object.__basicsize__ + _POINTER * len(_slots(kind))
    size += _POINTER * (kind.__dictoffset__ != 0 and not kind.__flags__ & _MANAGED_DICT)
    size += _POINTER * (kind.__weakrefoffset__ != 0 and not kind.__flags__ & _MANAGED_WEAKREF)
    return kind not in copyreg.dispatch_table and kind.__basicsize__ <= size and kind.__itemsize__ == 0


def _fill(_: Twin, clone: Any, state: dict[str, Any]) -> None:
    for name, part in state.items():
        object.__setattr__(clone, name, part)


def _reduced(twin: Twin, value: Any) -> Any:
    """Copy by the object's own `__reduce_ex__`, as pickle does."""
    try:
        way = copyreg.dispatch_table.get(type(value))
        with warnings.catch_warnings() if type(value).__module__ == "itertools" else nullcontext():
            if type(value).__module__ == "itertools":
                warnings.simplefilter("ignore")  # later Pythons do not copy iterators
            reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL) if way is None else way(value)
    except Exception:  # as open files, sockets and running generators
        return _refused(twin, value)
    return _shared(twin, value) if isinstance(reduced, str) else reduced


def _same(_: Twin, value: Any) -> Any:
    return value


def copy_by_id(twin: Twin, place: int) -> object:
    """Return the copy of an object by the `id` of the original."""
    return twin.copies[place]


def discard_log(*_args: Any, **_kwargs: Any) -> None:
    """Replace `log` and `log_dict` on a twin, which logs nothing."""


def _is_global(value: Any) -> bool:
    resolved: Any = sys.modules.get(getattr(value, "__module__", ""))
    for name in getattr(value, "__qualname__", "").split("."):
        resolved = getattr(resolved, name, None)
    return resolved is value


# Pickled by name, and called with the twin.
RECONSTRUCTORS = {_cached_again, _fill, _fill_cell, _fill_function, _fill_module, _function_like, _same, copy_by_id}
RECONSTRUCTORS |= {_refer, _refer_by_proxy}
_BEYOND: tuple[type, ...] = (
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.utils.data.DataLoader,
    torch.utils.data.dataloader._BaseDataLoaderIter,
    torch.profiler.profile,
    BaseProxy,
)
_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
COPY_RULES: list[tuple[Any, Callable[[Twin, Any], Any]]] = [
    (nn.Module, module_way),
    (Tensor, _tensor),
    ((type, types.ModuleType, types.CodeType, property, types.MethodDescriptorType), _shared),
    (types.FunctionType, _function),
    (types.CellType, _cell),
    (types.MethodType, lambda _, value: (types.MethodType, (value.__func__, value.__self__))),
    (types.BuiltinFunctionType, _builtin),
    (type(functools.lru_cache(len)), _cached),
    (weakref.ReferenceType, _reference),
    ((weakref.ProxyType, weakref.CallableProxyType), _proxy),
    (torch.Generator, _torch_generator),
    (_LOCK, lambda twin, value: twin.register(value, threading.Lock())),
    (_RLOCK, lambda twin, value: twin.register(value, threading.RLock())),
    (torch.UntypedStorage, lambda twin, value: twin.register(value, value.clone())),
    (_BEYOND, _refused),
]
