"""A method: the matrix it wants of each block, and what it does with it.

Shapes: B images, b of them at a time, H heads, N tokens, M keys of an attention pool, Q its queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from vit_explain_callback.methods.fusion import Fusion
from vit_explain_callback.methods.options import OPTIONS, block_number, check_option
from vit_explain_callback.vit.tokens import TokenLayout


@dataclass(frozen=True)
class Block:
    """One block, as a method sees it on the way from the last block to the first.

    Attributes:
        layer: Its number, counted from 1.
        fused: The matrix that the method's `fusion` asks for, (b, N, N), query rows and key columns. Other methods may
            share it: do not change it in place. A `block_gradient` where an attention-pooling head does the reading is
            that head's, (b, Q, N).
        readout: What the classifier reads of the tokens after the last block, (b, N).
        class_token: Index of the class token, or None.
    """

    layer: int
    fused: Tensor
    readout: Tensor
    class_token: int | None


@dataclass(frozen=True)
class Method(ABC):
    """An explanation method: a frozen dataclass whose fields are its options.

    A method of one's own is a subclass with a `kind` and a `step`; options in `OPTIONS` are checked and named alike:

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
    """What the name begins with."""

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
        """The matrix that the method wants of each block; by default the mean of its heads."""
        return Fusion()

    @property
    def needs_target(self) -> bool:
        """Whether the method depends on the class, through the gradient of its logit."""
        return self.fusion.of != "attention"

    def layers(self, blocks: int) -> Sequence[int]:
        """The blocks that take part, counted from 1, of a model that has `blocks` of them.

        By default all, or those from the option `start_layer` on.

        Raises:
            ValueError: If the model does not have one that an option names.
        """
        return range(block_number("start_layer", getattr(self, "start_layer", 1), blocks, self.name), blocks + 1)

    @property
    def pool_fusion(self) -> Fusion:
        """The matrix of a pooling head that says how much it reads of each token; by default its attention."""
        return Fusion()

    def start(self, readout: Tensor, pool: Tensor | None) -> Any:
        """What the first `step` is given; by default the readout.

        Args:
            readout: What the classifier reads of each token, (b, N) summing to 1.
            pool: Where an attention-pooling head does the reading, its own row of the matrix that `fusion` asks for,
                (b, N), the mean over its queries; None for other models, for one head and for `block_gradient`.
        """
        return readout

    @abstractmethod
    def step(self, relevance: Any, block: Block) -> Any:
        """Take in a block: from the last that takes part to the first, what the step before returned is given on."""

    def finish(self, relevance: Any, readout: Tensor, layout: TokenLayout) -> Tensor:
        """Relevance of every token, (b, N), from what the last `step` returned."""
        assert isinstance(relevance, Tensor)
        return relevance
