"""What an option may be, and the one form in which other values are refused.

A rule is declared beside the option, `Annotated[int, COUNT]`, in the class that holds it.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """The values that an option may have.

    Attributes:
        expected: The values in words, to follow "Expected `option` to be ".
        read: Converts a value to what is used. Raises TypeError for a wrong type, ValueError for a value out of range.
    """

    expected: str
    read: Callable[[Any], Any]

    def __or__(self, other: Rule) -> Rule:
        """A rule that allows what either rule allows."""

        def read(value: Any) -> Any:
            try:
                return other.read(value)
            except (TypeError, ValueError):
                return self.read(value)

        return Rule(f"{self.expected} or {other.expected}", read)


class _PartRefused(Exception):
    """One part of an option, at `place` in it, is refused."""

    def __init__(self, kind: type[Exception], place: str, expected: str, value: object) -> None:
        super().__init__(kind, place, expected, value)


def rules_of(kind: Any) -> dict[str, Rule]:
    """The rules of a class whose fields are options, each declared as `Annotated[type, rule]`, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def checked(name: str, value: Any, rule: Rule) -> Any:
    """Check the value of an option and convert it: lists to tuples, numpy's integers to Python's.

    Raises:
        TypeError: If it has the wrong type.
        ValueError: If it is out of range.

    Example:
        >>> checked("grid_size", [4, 4], GRID_SIZE)
        (4, 4)
    """
    kind: type[Exception]
    kind, place, expected = TypeError, "", rule.expected
    try:
        return rule.read(value)
    except _PartRefused as refused:
        kind, place, expected, value = refused.args
    except ValueError:
        kind = ValueError
    except Exception:  # a value of the user's may raise anything when it is looked at
        pass
    raise kind(f"Expected `{name}{place}` to be {expected}, but got {_in_words(value)}.")


def checked_options(options: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Check and convert options by name; see `checked`.

    Raises:
        TypeError: If one has the wrong type or does not exist.
        ValueError: If one is out of range.
    """
    refuse_unknown(options, rules)
    return {name: checked(name, value, rules[name]) for name, value in options.items()}


def refuse_unknown(options: Iterable[str], known_names: Iterable[str], within: str = "") -> None:
    """Refuse options that do not exist; one that has been renamed is refused with its new name.

    Raises:
        TypeError: If there is one.
    """
    for name in options:
        if name in known_names:
            continue
        if name in _RENAMED:
            raise TypeError(f"Expected `{_RENAMED[name]}`, the new name of `{name}`, but got `{name}`.")
        where = f" of `{within}`" if within else ""
        raise TypeError(f"Expected options{where} out of {', '.join(known_names)}, but got `{name}`.")


def class_index(target: object) -> int | None:
    """A class index of any integer type (Python, numpy, or a tensor without dimensions), else None.

    A boolean is not a class index.
    """
    scalar = not isinstance(target, Tensor | np.ndarray) or target.ndim == 0
    truth = isinstance(target, bool) or getattr(target, "dtype", None) in (torch.bool, np.dtype(bool))
    try:
        return operator.index(target) if scalar and not truth else None  # type: ignore[arg-type]
    except TypeError:
        return None


def integer(least: int, most: int = _LARGEST) -> Rule:
    """An integer of any library, in a range."""

    def read(value: Any) -> int:
        index = class_index(value)
        if index is None:
            raise TypeError
        if not least <= index <= most:
            raise ValueError
        return index

    bound = "" if most == _LARGEST else f" and at most {most}"
    return Rule(f"an integer of at least {least}{bound}", read)


def _number(value: Any) -> float:
    """A number of Python, numpy or torch; not a boolean, not text."""
    scalar = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    if isinstance(scalar, bool) or not isinstance(scalar, int | float):
        raise TypeError
    return float(scalar)


def _above_zero(value: Any) -> float:
    number = _number(value)
    if not number > 0:
        raise ValueError
    return number


def _items(value: Any) -> list[Any]:
    """The items of a list, a tuple, or a one-dimensional array."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 1:
        return list(value.tolist())
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError
    if not value:
        raise ValueError
    return list(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _word(words: Sequence[str], value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if value not in words:
        raise ValueError
    return value


def one_of(*words: str) -> Rule:
    """One of a few words."""
    return Rule(" or ".join(map(repr, words)), partial(_word, words))


def _numbers(value: Any, above_zero: bool) -> tuple[float, ...]:
    numbers = tuple(map(_number, _items(value)))
    if not all(math.isfinite(number) and (number > 0 or not above_zero) for number in numbers):
        raise ValueError
    return numbers


def _mean_and_std(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(value, Tensor | np.ndarray) or len(_items(value)) != 2:
        raise TypeError
    mean, std = _numbers(value[0], above_zero=False), _numbers(value[1], above_zero=True)
    if len(mean) != len(std):
        raise ValueError
    return mean, std


def _grid(value: Any) -> tuple[int, int]:
    sides = [integer(1, 2**15).read(side) for side in _items(value)]
    if len(sides) != 2:
        raise ValueError
    return sides[0], sides[1]


def _names(value: Any) -> list[str]:
    items = _items(value)
    if not all(isinstance(name, str | int | np.integer) for name in items):
        raise TypeError
    return list(map(str, items))


def _path(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _function(value: Any) -> Any:
    if not callable(value) or isinstance(value, type):
        raise TypeError
    try:
        inspect.signature(value.forward if isinstance(value, nn.Module) else value).bind(None, None)
    except TypeError as error:
        raise ValueError from error  # it takes other arguments
    except ValueError:  # its signature cannot be read
        pass
    return value


def _list_of_methods(value: Any) -> list[Any]:
    """Names or objects, one of them without a list too; the lookup checks what they are."""
    return [value] if isinstance(value, str) or hasattr(value, "name") else _items(value)


def _list_of_metrics(value: Any) -> list[Any]:
    is_empty = isinstance(value, Sequence) and not isinstance(value, str | bytes) and not value
    return [] if is_empty else _list_of_methods(value)


def _regions(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        raise TypeError
    for name, masks in value.items():
        if not isinstance(name, str):
            raise TypeError
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            raise _PartRefused(TypeError, f"[{name!r}]", "a boolean tensor (B, H, W)", masks)
        if not name.strip() or masks.ndim != 3 or not masks.numel():
            raise _PartRefused(ValueError, f"[{name!r}]", "masks (B, H, W) under a name", masks)
    return dict(value)


def _target(value: Any) -> Any:
    return _word(("label", "prediction"), value) if isinstance(value, str) else integer(0).read(value)


def _none(value: Any) -> None:
    if value is not None:
        raise TypeError


NONE = Rule("None", _none)
COUNT = integer(1)
FLAG = Rule("True or False", _flag)
ABOVE_ZERO = Rule("a number above 0", _above_zero)
LEVEL = one_of("brief", "full")
ON_ERROR = one_of("warn", "raise")
METHODS = Rule("a list of names, `Method` or `MapFunction` objects", _list_of_methods)
METRICS = Rule("a list of names or `DriftMetric` objects", _list_of_metrics)
REGIONS = Rule("boolean tensors (B, H, W) by name", _regions) | NONE
TARGET = Rule("'label', 'prediction' or a class index of at least 0", _target)
NORMALISATION = Rule("(mean, std), a finite number and a number above 0 for each channel", _mean_and_std) | NONE
CLASS_NAMES = Rule("a list of names", _names) | NONE
PATH = Rule("the attribute path of a submodule", _path) | NONE
FORWARD = Rule("a function of a module and images", _function) | NONE
GRID_SIZE = Rule("(grid_h, grid_w), two integers of at least 1", _grid) | NONE

_RENAMED = {
    "check_every_n_snapshots": "checks=",
    "check_every": "checks=",
    "removal": "checks=Checks(removal=…)",
    "block_statistics": "detail=Detail(block_statistics=…)",
    "report": "detail=Detail(page=…)",
    "margin_charts": "detail=Detail(margin_charts=…)",
    "max_pictures_mb": "detail=Detail(max_pictures_mb=…)",
    "mean": "normalisation=(mean, std)",
    "std": "normalisation=(mean, std)",
}
"""What to write instead of options that earlier versions had."""


def _in_words(value: Any) -> str:
    """A value in a few words, even if its `repr` is long or fails."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"
