"""`torch.einsum` of an attention with its values, read as the product A v."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ValueProduct:
    """How the dimensions of an einsum are to be ordered.

    Attributes:
        value: Those of the values, to be (B, H, M, d), or (B, M, d) without heads.
        output: Those of the result, to be (B, H, N, d) or (B, N, d).
    """

    value: tuple[int, ...]
    output: tuple[int, ...]


def value_product(equation: object, place: int) -> ValueProduct | None:
    """How an einsum of two operands multiplies attention, (B, H, N, M) or (B, N, M), with values; None if it does not.

    Args:
        equation: As `torch.einsum` takes it.
        place: Of the attention among the operands, 0 or 1.

    Example:
        >>> value_product("bhij, bjhd -> bihd", 0)
        ValueProduct(value=(0, 2, 1, 3), output=(0, 2, 1, 3))
        >>> value_product("bhij, bhjd -> bhjd", 0) is None
        True
    """
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        return None
    *batch, query, key = list(operands[place])
    value = operands[1 - place]
    width = set(value) - set(operands[place])
    if len(width) != 1:
        return None
    wanted_value, wanted_output = [*batch, key, *width], [*batch, query, *width]
    if sorted(value) != sorted(wanted_value) or sorted(output) != sorted(wanted_output):
        return None
    return ValueProduct(tuple(map(value.index, wanted_value)), tuple(map(output.index, wanted_output)))
