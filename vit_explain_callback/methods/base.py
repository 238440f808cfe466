"""The interface of a method: its options, the matrix that it needs of each block, and its step over the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, ClassVar

from torch import Tensor

from vit_explain_callback.methods.heads import HEAD_FUSIONS, Fusion, HeadFusion, discard_lowest
from vit_explain_callback.vit.tokens import TokenLayout


@dataclass(frozen=True)
class Option:
    """How an option is written in a name, and its range.

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
    "start_block": Option(
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
"""Every option by the name of its field, in their order in a name."""


def check_option(name: str, value: Any) -> None:
    """Refuse a value that is out of an option's range.

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
        >>> block_number("start_block", -4, 12, "rollout_from-4")
        9
    """
    number = value if value > 0 else blocks + 1 + value
    if not 1 <= number <= blocks:
        raise ValueError(
            f"Expected `{name}` in 1 … {blocks} (the model's blocks) or -{blocks} … -1 (from the end), but {method} "
            f"has {value}."
        )
    return number


@dataclass(frozen=True)
class Block:
    """One block, as it is passed to a method's `step`.

    Attributes:
        layer: Its number, counted from 1.
        fused: The matrix that the method's `fusion` asks for, (b, N, N), query rows and key columns. Other methods may
            share it: do not change it in place. Where an attention-pooling head does the reading, a `block_gradient`
            is of that head's attention, (b, Q, N).
        readout: Weights with which the classifier reads the tokens after the last block, (b, N).
        class_token: Index of the class token, or None.
    """

    layer: int
    fused: Tensor
    readout: Tensor
    class_token: int | None


@dataclass(frozen=True)
class Method(ABC):
    """An explanation method: a frozen dataclass whose fields are its options.

    A method of your own is a subclass with a `kind` and a `step`; fields named as in `OPTIONS` are checked likewise:

        >>> import torch
        >>> @dataclass(frozen=True)
        ... class LastBlock(Method):
        ...     kind = "last_block"
        ...     def layers(self, blocks: int) -> range:
        ...         return range(blocks, blocks + 1)
        ...     def step(self, relevance: Tensor, block: Block) -> Tensor:
        ...         return torch.einsum("bi,bij->bj", relevance, block.fused)
        >>> LastBlock().name
        'last_block'

    Raises:
        TypeError: If a subclass has no `step` or no `kind`.
        ValueError: If an option is outside its range.
    """

    kind: ClassVar[str]
    """The beginning of the name."""

    def __post_init__(self) -> None:
        for option in fields(self):
            check_option(option.name, getattr(self, option.name))
        if not hasattr(self, "kind"):
            raise TypeError(
                f"Expected the method {type(self).__name__} to have a `kind`, which its name begins with, but it has "
                'none: write `kind = "…"` in the class.'
            )

    @property
    def name(self) -> str:
        """Key of the maps and TensorBoard tag: the kind, followed by every option that is not at its default."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        changed = {option.name for option in fields(self) if values[option.name] != option.default}
        written = [OPTIONS[name].write(values[name]) for name in OPTIONS if name in changed]
        written += [f"{name}{value}" for name, value in values.items() if name in changed and name not in OPTIONS]
        return "_".join([self.kind, *written])

    @property
    def fusion(self) -> Fusion:
        """The matrix that the method needs of each block; by default the mean of its heads."""
        return Fusion()

    @property
    def needs_target(self) -> bool:
        """Whether the method depends on the class, through the gradient of its logit."""
        return self.fusion.of != "attention"

    def layers(self, blocks: int) -> Sequence[int]:
        """The blocks that take part, counted from 1, of a model that has `blocks` of them.

        By default all, or those from the option `start_block` on.

        Raises:
            ValueError: If the model does not have one that an option names.
        """
        return range(block_number("start_block", getattr(self, "start_block", 1), blocks, self.name), blocks + 1)

    @property
    def pool_fusion(self) -> Fusion:
        """The matrix of a pooling head that says how much it reads of each token; by default its attention."""
        return Fusion()

    def start(self, readout: Tensor, pool: Tensor | None) -> Any:
        """The relevance that the first `step` receives; by default the readout.

        Args:
            readout: What the classifier reads of each token, (b, N) summing to 1.
            pool: Where an attention-pooling head does the reading, its own row of the matrix that `fusion` asks for,
                (b, N), the mean over its queries; None for other models, for one head and for `block_gradient`.
        """
        return readout

    @abstractmethod
    def step(self, relevance: Any, block: Block) -> Any:
        """Carry relevance through a block; called from the last block that takes part to the first."""

    def finish(self, relevance: Any, readout: Tensor, layout: TokenLayout) -> Tensor:
        """Relevance of every token, (b, N), from what the last `step` returned."""
        assert isinstance(relevance, Tensor)
        return relevance


@dataclass(frozen=True)
class FusedMethod(Method):
    """A method that fuses heads, drops the lowest entries and starts at some block.

    Args:
        head_fusion: How the heads of a block are fused: `mean`, `max` or `min`.
        discard_ratio: Share of the smallest entries of each fused matrix set to zero, in [0, 1).
        start_block: First block that takes part, counted from 1, or from the end if negative: -1 is the last.

    Raises:
        ValueError: If an option is outside its range.
    """

    head_fusion: HeadFusion = "mean"
    discard_ratio: float = 0.0
    start_block: int = 1

    @property
    def fusion(self) -> Fusion:
        """F = fuse_h(A)."""
        return Fusion(self.head_fusion)

    @property
    def pool_fusion(self) -> Fusion:
        """A pooling head is fused like the blocks."""
        return self.fusion

    def without_lowest(self, block: Block) -> Tensor:
        """A block's fused matrix without its lowest entries, (b, N, N)."""
        return discard_lowest(block.fused, self.discard_ratio, block.class_token)


def check_layers(methods: Sequence[Method], blocks: int) -> None:
    """Refuse methods whose options name a block that the model does not have.

    Raises:
        ValueError: If there is one.
    """
    for method in methods:
        method.layers(blocks)


def check_heads(methods: Sequence[Method], heads: Sequence[int]) -> None:
    """Refuse methods whose options name a head that a block does not have.

    Args:
        methods: Methods.
        heads: H of each block, first block first.

    Raises:
        ValueError: If there is one.
    """
    for method in methods:
        layers, head = method.layers(len(heads)), method.fusion.head
        for layer, count in enumerate(heads, start=1):
            if layer in layers and head is not None and head > count:
                raise ValueError(f"Expected `head` in 1 … {count} (the heads of block {layer}), but got {method.name}.")
