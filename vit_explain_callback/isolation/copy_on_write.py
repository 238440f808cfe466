"""Redirect every write to a parameter to a copy of its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

_ALIASES = {"__get__", "detach"}
_HANDS_OUT = {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "_typed_storage"}


class CopyOnWrite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that gives memory of its own to a parameter that an operation is about to write to.

    It costs some microseconds for each operation.

    Args:
        parameters: Those that are not to be written to, by the address of their memory.
        moved: Takes the memory that a parameter was given, by the address of what it had.
    """

    supports_higher_order_operators = True

    def __init__(
        self, parameters: Mapping[int, Sequence[nn.Parameter]], moved: dict[int, torch.UntypedStorage]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters, self._moved = parameters, moved
        self._aliases: Any = WeakIdKeyDictionary()  # `weight.data` and the like, of the twin's own parameters
        self._export_guard = _ExportGuard(self._unshare, self._note_alias)

    def __enter__(self) -> CopyOnWrite:
        self._export_guard.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._export_guard.__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func)
        if written:
            args = tuple(self._unshare(arg) if place in written else arg for place, arg in enumerate(args))
            kwargs = {name: self._unshare(arg) if name in written else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)

    def _unshare(self, arg: Any) -> Any:
        if isinstance(arg, list | tuple):
            return type(arg)(map(self._unshare, arg))
        if not isinstance(arg, Tensor) or address(arg) not in self._parameters:
            return arg
        place = address(arg)
        with torch.utils._python_dispatch._disable_current_modes():
            if place not in self._moved:
                self._moved[place] = arg.untyped_storage().clone()  # type: ignore[no-untyped-call]
                for parameter in self._parameters[place]:
                    parameter.data = owned_view(self._moved[place], parameter)
            view = owned_view(self._moved[place], arg)
            if arg in self._aliases:
                arg.data = view  # as `weight.data += 1` gives the tensor itself back
            return view

    def _note_alias(self, source: Any, alias: Any) -> None:
        """Know a tensor that shares the memory of a parameter of the twin; one of the model's own is never changed."""
        if isinstance(alias, Tensor) and isinstance(source, Tensor):
            twins = self._parameters.get(address(source), ())
            if source in self._aliases or any(source is parameter for parameter in twins):
                self._aliases[alias] = True


class _ExportGuard(TorchFunctionMode):
    """Gives a parameter memory of its own before it is exported to code that torch does not see, such as NumPy."""

    def __init__(self, unshare: Callable[[Any], Any], note_alias: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._unshare, self._note_alias = unshare, note_alias

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _HANDS_OUT and args:
            args = (self._unshare(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if name in _ALIASES:
            self._note_alias(args[0], result)
        return result


@functools.cache
def _written(func: Any) -> frozenset[int | str]:
    """Places and names of the arguments that an operation writes to."""
    schema = getattr(func, "_schema", None)  # operators of a higher order have none
    arguments = enumerate(schema.arguments) if schema is not None and schema.is_mutable else ()
    return frozenset(
        key
        for place, argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for key in (place, argument.name)
    )


def owned_view(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """A tensor over some memory, laid out like another one."""
    view = torch.empty(0, dtype=like.dtype, device=like.device)
    return view.set_(storage, like.storage_offset(), like.size(), like.stride())


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins, the same for all of its views; 0 where it has none of its own."""
    try:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass that wraps other tensors
        return 0
