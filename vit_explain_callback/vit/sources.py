"""Track what tensors are computed from, with or without gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# They return the values of their argument in another form.
_SAME_VALUES = {
    *("to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "detach", "cpu", "cuda", "long"),
    *("squeeze", "unsqueeze", "view", "view_as", "reshape", "flatten", "unflatten", "as_subclass"),
}
# They use the shape and precision of a tensor, but not its values.
_ONLY_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
_ONLY_LIKE |= {"new_zeros", "new_ones", "new_full", "new_empty", "size", "dim", "numel"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}


class Flow:
    """Knows from which sources tensors were computed, without keeping them alive.

    A source is a bit of an integer, so a set of sources is an integer.
    """

    def __init__(self) -> None:
        self._sources: Any = WeakIdKeyDictionary()
        self._lasting: dict[int, int] = {}  # of weights, by `id`: a weak reference would keep them from being swapped
        self._names: Any = WeakIdKeyDictionary()
        self._numbers = itertools.count(1)

    def mark(self, value: object, sources: int) -> None:
        """Add sources to every tensor in a value of any form."""
        if sources:
            for tensor in tensors_in(value):
                if id(tensor) in self._lasting:
                    self._lasting[id(tensor)] |= sources
                else:
                    self._sources[tensor] = self._sources.get(tensor, 0) | sources

    def mark_lasting(self, tensors: Iterable[Tensor], sources: int) -> None:
        """Add sources to tensors that outlive this object."""
        for tensor in tensors:
            self._lasting[id(tensor)] = self._lasting.get(id(tensor), 0) | sources

    def of(self, *values: object) -> int:
        """The sources of all tensors in some values."""
        sources = 0
        for tensor in tensors_in(values):
            lasting = self._lasting.get(id(tensor))
            sources |= self._sources.get(tensor, 0) if lasting is None else lasting
        return sources

    def name(self, tensor: Tensor) -> int:
        """A number that identifies the values of a tensor, also in another shape or precision."""
        if id(tensor) in self._lasting:
            return -id(tensor)
        if tensor not in self._names:
            self._names[tensor] = next(self._numbers)
        return int(self._names[tensor])

    def computed(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        """Note the result of a function of torch."""
        name = getattr(function, "__name__", "")
        if name in _ONLY_LIKE:
            return
        sources = self.of(args[0]) if name == "__getitem__" and is_mask_of_rows(args[1]) else self.of(args, kwargs)
        self.mark(result, sources)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            self.mark(first, sources)
            if id(first) not in self._lasting:
                self._names.pop(first, None)
        elif (
            isinstance(result, Tensor)
            and id(result) not in self._lasting  # as `weight.float()` may be the weight itself
            and result.numel() == first.numel()
            and _keeps_values(name, args)
        ):
            self._names[result] = self.name(first)


def _keeps_values(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a function returns the values of its argument, in their order."""
    if name != "__getitem__":
        return name in _SAME_VALUES
    if is_mask_of_rows(args[1]):
        return True  # it leaves none out, as there are as many values
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(part is None or part is ... or isinstance(part, int | slice) for part in index)


def is_mask_of_rows(index: object) -> bool:
    """Whether an index selects whole rows."""
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == 1


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in a value: itself, or those in tuples, lists, mappings and attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
