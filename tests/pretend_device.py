"""A device that is not there: its tensors lie in the CPU's memory, and torch takes them for those of an accelerator.

What an accelerator refuses fails here too: an operation on tensors of two devices, a tensor of the device as a NumPy
array, a random generator of another device. So a machine without a GPU can tell whether code keeps tensors together,
how often it waits for an answer of the device, and what it leaves there. It tells nothing of an accelerator's kernels,
their precision, or their time.

It changes torch for good, and so belongs in a process of its own.
"""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
_CPU = torch.device("cpu")
_ACROSS = {"copy_", "_to_copy"}
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index"}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class OnDevice(Tensor):
    """A tensor of the device; `near` has its values."""

    near: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor, requires_grad: bool = False) -> OnDevice:
        """Wrap it."""
        if near.dtype == torch.float64 and not Pretend.has_float64:
            raise TypeError("the device has no float64")
        make: Any = Tensor._make_wrapper_subclass
        like = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made: OnDevice = make(cls, near.size(), device=f"{NAME}:0", requires_grad=requires_grad, **like)
        made.near = near
        return made

    def __init__(self, near: Tensor, requires_grad: bool = False) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Context manager in which the device is there.

    Args:
        float64: Whether the device has float64; Apple's has not.

    Attributes:
        operations: How often each operation ran on the device, by name.
        waits: How often each operation ran that makes the CPU wait for the device.
    """

    has_float64 = True

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        _register()
        Pretend.has_float64 = float64
        self.operations, self.waits = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs))):
            self.operations[name] += 1
            if name in _WAITING or (name == "_to_copy" and torch.device(kwargs.get("device") or NAME) == _CPU):
                self.waits[name] += 1
        return _run(func, args, kwargs)


def tensors_on_device() -> int:
    """How many tensors of the device there are."""
    gc.collect()
    return sum(issubclass(type(each), OnDevice) for each in gc.get_objects())


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; what it gives is on the device if its operands are, or if it is asked for there."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_on_device = any(isinstance(operand, OnDevice) for operand in operands)
    name = func.overloadpacket.__name__
    if is_on_device:
        _check(name, args, operands)
    device = kwargs.get("device")
    if device is not None:
        is_on_device = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": _CPU}
        generator = kwargs.get("generator")
        if is_on_device and generator is not None and generator.device == _CPU:
            raise RuntimeError(f"{name}: expected a generator of the device, but got one of the CPU")
    if name == "copy_":
        is_on_device = isinstance(args[0], OnDevice)
    given = tree_map(_near, (args, kwargs))
    found = func(*given[0], **given[1])
    if name == "copy_":
        return args[0]
    if not is_on_device:
        return found
    found = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _check(name: str, args: tuple[Any, ...], operands: list[Tensor]) -> None:
    """Refuse operands of two devices, but for numbers as tensors, copies, and indices."""
    if name in _INDEXED and isinstance(args[0], OnDevice):
        operands = [operand for operand in (args[0], *args[2:]) if isinstance(operand, Tensor)]
    elsewhere = [operand for operand in operands if not isinstance(operand, OnDevice) and operand.ndim > 0]
    if elsewhere and name not in _ACROSS:
        raise RuntimeError(f"{name}: expected all tensors on one device, but {len(elsewhere)} are on the CPU")


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, OnDevice) else leaf


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_registered: list[torch.library.Library] = []


def _register() -> None:
    if _registered:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch.__future__.set_swap_module_params_on_conversion(True)
    # For what torch itself does below any mode, as `new_tensor`.
    library = torch.library.Library("aten", "IMPL")
    _registered.append(library)
    library.impl(
        "empty_strided", lambda *size, dtype=None, **_: OnDevice(torch.empty_strided(*size, dtype=dtype)), _KEY
    )
    library.impl("empty.memory_format", lambda size, dtype=None, **_: OnDevice(torch.empty(size, dtype=dtype)), _KEY)
    library.impl("_copy_from", lambda source, to, _=False: (_near(to).copy_(_near(source)), to)[1], _KEY)


_KEY = "PrivateUse1"
