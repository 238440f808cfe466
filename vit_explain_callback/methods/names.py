"""Find the method that a name stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vit_explain_callback import methods as package
from vit_explain_callback.methods.base import OPTIONS, Method
from vit_explain_callback.methods.map_function import AnyMethod, MapFunction

METHODS: dict[str, type[Method]] = {
    method.kind: method for method in (getattr(package, name) for name in package.BUILT_IN)
}
"""Every method by its kind."""


def method_from_name(name: str) -> Method:
    """The method that a name stands for; the inverse of `Method.name`.

    Raises:
        ValueError: If the name stands for no method, or for an option that the method does not have.

    Example:
        >>> method_from_name("grad_rollout_max_0.9")
        GradientRollout(head_fusion='max', discard_ratio=0.9, start_block=1)
    """
    kind = max((kind for kind in METHODS if f"{name}_".startswith(f"{kind}_")), key=len, default=None)
    if kind is None:
        raise _misspelt(name)
    method = METHODS[kind]
    options = [field.name for field in fields(method)]
    values: dict[str, Any] = {}
    remaining = list(OPTIONS)
    for part in name.split("_")[len(kind.split("_")) :]:
        matches = {option: re.fullmatch(OPTIONS[option].pattern, part) for option in remaining}
        option, match = next(((option, match) for option, match in matches.items() if match), ("", None))
        if match is None:
            raise _misspelt(name)
        if option not in options:
            raise ValueError(
                f"Expected `{name}` to have options of {kind} ({', '.join(options)}), but `{part}` is none."
            )
        values[option] = OPTIONS[option].read(match[1])
        remaining = remaining[remaining.index(option) + 1 :]
    return method(**values)


def _misspelt(name: str) -> ValueError:
    *kinds, last = (f"`{kind}`" for kind in METHODS)
    return ValueError(
        f"Expected `methods` to name {', '.join(kinds)} or {last}, with options as in `rollout_max_0.9_from2`, but got "
        f"{name!r}."
    )


def resolve_methods(methods: Sequence[str | AnyMethod]) -> tuple[AnyMethod, ...]:
    """Turn names and method objects into method objects.

    Raises:
        TypeError: If an entry is neither.
        ValueError: If there is none, one is misspelt, or two have the same name.
    """
    if isinstance(methods, str):
        methods = [methods]
    resolved: list[AnyMethod] = []
    for method in methods:
        if isinstance(method, str):
            method = method_from_name(method)
        if not isinstance(method, Method | MapFunction):
            raise TypeError(
                "Expected `methods` to hold names, `Method` or `MapFunction` objects, but got "
                f"{method!r:.200}. A function of your own goes in as `MapFunction('name', function)`."
            )
        resolved.append(method)
    names = [method.name for method in resolved]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected `methods` to hold at least one method and each only once, but got {names}.")
    return tuple(resolved)
