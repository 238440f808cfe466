"""Products of attention with its values, expressed by the letters of an einsum.

Shapes: B images, H heads, N query tokens, M key tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from torch import Tensor


@dataclass(frozen=True)
class Letters:
    """The dimensions of A, v and O = A v, one letter each.

    Attributes:
        attention: Letters of A.
        value: Letters of v.
        output: Letters of O.
    """

    attention: tuple[str, ...]
    value: tuple[str, ...]
    output: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """The order of the dimensions of A, v and O.

    Attributes:
        attention: Permutation of A to (B, …, N, M).
        value: Permutation of v to (B, …, M, d); None for a dimension that v lacks, for example if heads share values.
        output: Permutation of O to (B, …, N, d).
    """

    attention: tuple[int, ...]
    value: tuple[int | None, ...]
    output: tuple[int, ...]

    def ordered_value(self, value: Tensor, attention: Tensor) -> Tensor:
        """V as (B, …, M, d), with the images and heads of the ordered attention."""
        present = [dim for dim in self.value if dim is not None]
        ordered = value.permute(present)
        for place, dim in enumerate(self.value):
            if dim is None:
                ordered = ordered.unsqueeze(place)
        return ordered.expand(*attention.shape[:-2], *ordered.shape[-2:])


def read(letters: Letters, key: int) -> Product | None:
    """How attention that is normalised over its dimension `key` is multiplied with values; None if it is not.

    Example:
        >>> read(Letters((*"bhij",), (*"bjhd",), (*"bihd",)), key=3)
        Product(attention=(0, 1, 2, 3), value=(0, 2, 1, 3), output=(0, 2, 1, 3))
        >>> read(Letters((*"bhij",), (*"bhjd",), (*"bhid",)), key=2) is None
        True
    """
    attention, value, output = letters.attention, letters.value, letters.output
    if any(len(set(part)) != len(part) for part in (attention, value, output)):
        return None
    summed = [letter for letter in attention if letter in value and letter not in output]
    query = [letter for letter in attention if letter not in value and letter in output]
    width = [letter for letter in value if letter not in attention and letter in output]
    # Heads that share values have a letter that the values lack; the last of several such letters is the query.
    batch = [letter for letter in attention if letter in output and letter not in query[-1:]]
    if not query or len(width) != 1 or summed != [attention[key]]:
        return None
    letters_used = {*batch, query[-1], *summed, *width}
    if letters_used != {*attention, *value, *output}:
        return None
    value_order = [*batch, *summed, *width]
    return Product(
        tuple(map(attention.index, [*batch, query[-1], *summed])),
        tuple(value.index(letter) if letter in value else None for letter in value_order),
        tuple(map(output.index, [*batch, query[-1], *width])),
    )


def of_matmul(left: int, right: int, attention_is_left: bool) -> Letters | None:
    """The letters of `left @ right`, from their numbers of dimensions; one of them is attention."""
    most = max(left, right)
    if min(left, right) < 2:
        return None
    batch = [f"b{place}" for place in range(most - 2)]
    one, other = [*batch[most - left :], "row", "sum"], [*batch[most - right :], "sum", "column"]
    output = (*batch, "row", "column")
    if not attention_is_left:
        one, other = other, one
    return Letters(tuple(one), tuple(other), output)


def of_einsum(equation: str, dims: tuple[int, int], place: int) -> Letters | None:
    """The letters of an einsum of two operands, from their numbers of dimensions; one of them is attention.

    Args:
        equation: As `torch.einsum` takes it; an ellipsis and an implicit output are allowed.
        dims: Numbers of dimensions of the operands.
        place: Index of the attention among them, 0 or 1.

    Example:
        >>> of_einsum("...ij, ...jd", (4, 4), 0).output
        ('…1', '…0', 'd', 'i')
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2:
        return None
    spelled = [tuple(_spelled(operand, dim)) for operand, dim in zip(operands, dims, strict=True)]
    dots = max(([letter for letter in operand if letter[0] == "…"] for operand in spelled), key=len)
    if arrow:
        before, ellipsis, after = result.partition("...")
        output = [*before, *(dots if ellipsis else ()), *after]
    else:
        every = [letter for operand in spelled for letter in operand]
        output = [*dots, *sorted(letter for letter in set(every) - set(dots) if every.count(letter) == 1)]
    return Letters(spelled[place], spelled[1 - place], tuple(output))


def _spelled(operand: str, dims: int) -> Iterator[str]:
    """One letter per dimension; the dimensions of an ellipsis are counted from its end."""
    before, ellipsis, after = operand.partition("...")
    hidden = dims - len(before) - len(after) if ellipsis else 0
    yield from before
    yield from (f"…{place}" for place, _ in zip(count(hidden - 1, -1), range(hidden), strict=False))
    yield from after
