"""The options of methods: what each may be, and how it is written in a name.

A name is the kind, followed by every option that is not at its default, in the order of `OPTIONS`:
`rollout_max_0.9_from7`, `attention_block12_head3`. Blocks and heads are counted from 1; a negative block counts from
the end, so that `from-4` are the last four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from vit_explain_callback.methods.fusion import HEAD_FUSIONS


@dataclass(frozen=True)
class Option:
    """How an option is written and what it may be.

    Attributes:
        pattern: Regular expression of its part of a name, the value as its group.
        read: The value of that group.
        write: The part of the name for a value.
        allows: Whether a value is in range.
        expected: The range in words, as they follow "Expected `option` ".
    """

    pattern: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]
    allows: Callable[[Any], bool]
    expected: str


def _is_block(value: Any) -> bool:
    return isinstance(value, int) and value != 0


OPTIONS = {
    "head_fusion": Option(
        r"([a-z]+)", str, str, lambda value: value in HEAD_FUSIONS, f"to be one of {', '.join(HEAD_FUSIONS)}"
    ),
    "discard_ratio": Option(
        r"(\d*\.?\d+)",
        float,
        lambda value: f"{Decimal(repr(float(value))):f}",  # never 1e-05
        lambda value: 0 <= value < 1,
        "in [0, 1)",
    ),
    "start_layer": Option(
        r"from(-?\d+)",
        int,
        "from{}".format,
        _is_block,
        "of at least 1 (the first block), or negative (-1 is the last block)",
    ),
    "block": Option(
        r"block(-?\d+)",
        int,
        "block{}".format,
        _is_block,
        "of at least 1 (the first block), or negative (-1 is the last block)",
    ),
    "head": Option(
        r"head(\d+)",
        int,
        "head{}".format,
        lambda value: value is None or (isinstance(value, int) and value >= 1),
        "of at least 1 (the first head), or None for all",
    ),
}
"""Every option by the name of its field, in the order in which names have them."""


def check_option(name: str, value: Any) -> None:
    """Refuse a value that an option cannot have.

    Raises:
        ValueError: If it is out of range.
    """
    option = OPTIONS.get(name)
    if option is not None and not option.allows(value):
        raise ValueError(f"Expected `{name}` {option.expected}, but got {value!r}.")


def block_number(name: str, value: int, blocks: int, method: str) -> int:
    """The block that an option names, counted from 1, in a model of `blocks` blocks.

    Raises:
        ValueError: If the model does not have it.

    Example:
        >>> block_number("start_layer", -4, 12, "rollout_from-4")
        9
    """
    number = value if value > 0 else blocks + 1 + value
    if not 1 <= number <= blocks:
        raise ValueError(
            f"Expected `{name}` in 1 … {blocks} (the model's blocks) or -{blocks} … -1 (from the end), but {method} "
            f"has {value}."
        )
    return number
