"""Describe options in words that are the same in every process, to tell callbacks apart."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_explain_callback.methods.base import Method

_DEPTH = 4
_MOST_ITEMS = 1000


def changed_options(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The options that differ from their defaults, in words; empty if none does."""
    changed = {name: value for name, value in options.items() if in_words(value) != in_words(defaults[name])}
    words = {name: _short(name, value) for name, value in changed.items()}
    return repr(words) if words else ""


def _short(name: str, value: Any) -> Any:
    """An option as the keys of older checkpoints have it."""
    if name == "methods" and isinstance(value, Sequence) and not isinstance(value, str):
        return [_short("", method) for method in value]
    return value if value is None or isinstance(value, str) else in_words(value)


def in_words(value: Any, depth: int = _DEPTH) -> str:
    """Describe a value in words that differ if values differ, without addresses or the order of sets.

    Tensors and the code of functions are described by a hash, what is nested too deep by its class.

    Example:
        >>> in_words({"b": (1, 2.0), "a": None})
        "{'a': None, 'b': [1, 2.0]}"
    """
    inner = partial(in_words, depth=depth - 1)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _of_array(value)
    if isinstance(value, Method) and type(value).__module__.startswith("vit_explain_callback."):
        return value.name
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        items = (f"{inner(key)}: {inner(part)}" for key, part in islice(value.items(), _MOST_ITEMS))
        return f"{{{', '.join(sorted(items))}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(inner, value[:_MOST_ITEMS]))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"{value.__func__.__qualname__} of {inner(value.__self__)}"
    if isinstance(value, types.FunctionType):
        return _of_function(value, inner)
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return f"{type(value).__qualname__}({inner(_attributes(value))})"


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, slots included."""
    attributes = dict(getattr(value, "__dict__", {}))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return attributes | {
        name: getattr(value, name) for name in slots if name not in attributes and hasattr(value, name)
    }


def _of_array(value: Any) -> str:
    """A number as it is; other arrays by a hash of type, shape and content."""
    if value.ndim == 0 and not getattr(value, "is_meta", False):
        return repr(value.item())
    if not isinstance(value, Tensor):
        value = torch.from_numpy(np.ascontiguousarray(value)) if np.asarray(value).dtype.kind in "biufc" else None
    if value is None or value.is_meta:
        return "array"
    plain = value.detach().cpu().to_dense() if value.layout is not torch.strided else value.detach().cpu()
    digest = hashlib.sha256(repr((plain.dtype, tuple(plain.shape))).encode())
    digest.update(plain.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _of_function(function: types.FunctionType, inner: Callable[[Any], str]) -> str:
    """Name of a function, and a hash of its code, its defaults and its closure."""
    enclosed = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    parts = [_of_code(function.__code__), inner(function.__defaults__), inner(function.__kwdefaults__), inner(enclosed)]
    digest = hashlib.sha256("\n".join(parts).encode("utf-8", "backslashreplace"))
    return f"{function.__module__}.{function.__qualname__}:{digest.hexdigest()[:16]}"


def _of_code(code: types.CodeType) -> str:
    """The code of a function, without its line numbers."""
    constants = [_of_code(part) if isinstance(part, types.CodeType) else in_words(part) for part in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names} {code.co_freevars}"


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
