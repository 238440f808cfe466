"""Find the method that a name stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from vit_explain_callback.methods.base import Method
from vit_explain_callback.methods.flow import AttentionFlow
from vit_explain_callback.methods.fused_method import FusedMethod
from vit_explain_callback.methods.fusion import HeadFusion
from vit_explain_callback.methods.grad_rollout import GradRollout
from vit_explain_callback.methods.rollout import Rollout

_KINDS: dict[str, type[FusedMethod]] = {method.kind: method for method in (Rollout, GradRollout, AttentionFlow)}
_NAME = re.compile(
    r"(?P<kind>rollout|grad_rollout|flow)(_(?P<fusion>[a-z]+))??(_(?P<ratio>\d*\.?\d+))?(_from(?P<start>\d+))?"
)


def method_from_name(name: str) -> Method:
    """The method a name stands for; the inverse of its `name`.

    Raises:
        ValueError: If the name stands for no method.

    Example:
        >>> method_from_name("grad_rollout_max_0.9")
        GradRollout(head_fusion='max', discard_ratio=0.9, start_layer=1)
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"Expected `methods` to name `rollout`, `grad_rollout` or `flow`, with options as in "
            f"`rollout_max_0.9_from2`, but got {name!r}."
        )
    fusion = cast(HeadFusion, match["fusion"] or "mean")
    return _KINDS[match["kind"]](fusion, float(match["ratio"] or 0), int(match["start"] or 1))


def resolve_methods(methods: Sequence[str | Method]) -> tuple[Method, ...]:
    """Turn names and method objects into method objects.

    Raises:
        TypeError: If an entry is neither.
        ValueError: If there is none, one is misspelt, or two have the same name.
    """
    if isinstance(methods, str):
        methods = [methods]
    resolved: list[Method] = []
    for method in methods:
        if isinstance(method, str):
            method = method_from_name(method)
        if not isinstance(method, Method):
            raise TypeError(f"Expected `methods` to hold names or `Method` objects, but got {method!r}.")
        resolved.append(method)
    names = [method.name for method in resolved]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected `methods` to hold at least one method and each only once, but got {names}.")
    return tuple(resolved)
