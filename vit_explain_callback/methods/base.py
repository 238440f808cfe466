"""The explanation methods: small frozen objects whose stable names are keys and TensorBoard tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from vit_explain_callback.methods.flow import require_solver
from vit_explain_callback.methods.rollout import HEAD_FUSIONS, HeadFusion


@dataclass(frozen=True)
class Method:
    """What attention rollout, gradient rollout and attention flow share; use one of these.

    Args:
        head_fusion: How the heads of a block are fused: `mean`, `max` or `min`.
        discard_ratio: Share of the smallest entries of each fused matrix set to zero, in [0, 1).
        start_layer: First block that takes part, counted from 1.

    Raises:
        ValueError: If an option is outside its range.
    """

    head_fusion: HeadFusion = "mean"
    discard_ratio: float = 0.0
    start_layer: int = 1

    kind: ClassVar[str]
    weighted: ClassVar[bool] = False
    """Whether attention is weighted by its gradient, so that the method depends on the class."""

    def __post_init__(self) -> None:
        if self.head_fusion not in HEAD_FUSIONS:
            raise ValueError(
                f"Expected `head_fusion` to be one of {', '.join(HEAD_FUSIONS)}, but got {self.head_fusion!r}."
            )
        if not 0 <= self.discard_ratio < 1:
            raise ValueError(f"Expected `discard_ratio` in [0, 1), but got {self.discard_ratio}.")
        if self.start_layer < 1:
            raise ValueError(f"Expected `start_layer` of at least 1 (the first block), but got {self.start_layer}.")

    @property
    def name(self) -> str:
        """The kind, followed by every option that is not at its default."""
        parts = [self.kind]
        if self.head_fusion != "mean":
            parts.append(self.head_fusion)
        if self.discard_ratio:
            parts.append(f"{self.discard_ratio:g}")
        if self.start_layer != 1:
            parts.append(f"from{self.start_layer}")
        return "_".join(parts)


class Rollout(Method):
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): where information flows from, whatever the class.

    Example:
        >>> Rollout(head_fusion="max", discard_ratio=0.9).name
        'rollout_max_0.9'
    """

    kind = "rollout"


class GradRollout(Method):
    """Gradient rollout: attention weighted by the gradient of the target's logit, so it depends on the class.

    Example:
        >>> GradRollout(start_layer=4).name
        'grad_rollout_from4'
    """

    kind = "grad_rollout"
    weighted = True


class AttentionFlow(Method):
    """Attention flow (Abnar & Zuidema 2020, arXiv:2005.00928): how much can flow to a patch, whatever the class.

    Exact, and slow: see `vit_explain_callback.methods.flow`, which also says why it hardly differs from the attention
    that a patch receives in the first block. `start_layer` makes that another block.

    Raises:
        ImportError: If OR-Tools is not installed.
        ValueError: If an option is outside its range.

    Example:
        >>> AttentionFlow(start_layer=9).name
        'flow_from9'
    """

    kind = "flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_solver()


_KINDS: dict[str, type[Method]] = {method.kind: method for method in (Rollout, GradRollout, AttentionFlow)}
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
