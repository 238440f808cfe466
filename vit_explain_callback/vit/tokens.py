"""Token layout: prefix tokens, the grid of patches, the tokens that the classifier reads, and what is known of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.sites import Site


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The tokens of a Vision Transformer for one size of image.

    Attributes:
        tokens: N, prefix tokens and patches together.
        first_patch: Index of the first patch; the patches follow one another, row by row.
        grid: Patches as (grid_h, grid_w).
        class_token: Index of the class token, or None. Found by experiment, it is one that the classifier reads.
        readout: Weight of each token in what the classifier reads, (N,) summing to 1; None where an attention-pooling
            head does the reading.
        observed: Whether it was found by experiment.
    """

    tokens: int
    first_patch: int
    grid: tuple[int, int]
    class_token: int | None
    readout: Tensor | None
    observed: bool = False

    @property
    def patches(self) -> slice:
        """Where the patches are among the tokens."""
        return slice(self.first_patch, self.first_patch + self.grid[0] * self.grid[1])

    def to_grid(self, row: Tensor) -> Tensor:
        """Keep the patches of a token row: (B, N) to (B, grid_h, grid_w)."""
        return row[:, self.patches].reshape(-1, *self.grid)

    def kept(self, taken: Tensor) -> Tensor:
        """(B, n) indices of the tokens that stay without some patches, (B, P) boolean, as many of each image."""
        kept = torch.ones(len(taken), self.tokens, dtype=torch.bool, device=taken.device)
        kept[:, self.patches] = ~taken
        return kept.nonzero()[:, 1].view(len(taken), -1)


@dataclass(frozen=True)
class StatedLayout:
    """What the user says of a model's tokens; the prefix tokens then stand before the patches.

    Attributes:
        prefix_tokens: Number of prefix tokens.
        grid_size: Patches as (grid_h, grid_w).
    """

    prefix_tokens: int | None = None
    grid_size: tuple[int, int] | None = None

    def first_patch_and_grid(self, tokens: int, height: int, width: int) -> tuple[int, tuple[int, int]] | None:
        """Where the patches begin, and their grid, for `tokens` N and an image size; None if nothing is stated.

        Raises:
            ValueError: If what is stated does not add up to N, or leaves the grid open.
        """
        if self.grid_size is not None:
            grid = (self.grid_size[0], self.grid_size[1])
            prefix = tokens - grid[0] * grid[1] if self.prefix_tokens is None else self.prefix_tokens
        elif self.prefix_tokens is not None:
            prefix = self.prefix_tokens
            rows = round(math.sqrt(max(0, tokens - prefix) * height / width))
            grid = (rows, max(0, tokens - prefix) // max(1, rows))
            if grid[0] * width != grid[1] * height:
                raise ValueError(
                    f"Expected {tokens - prefix} patches in a grid of the image's proportions, {height}x{width}, but "
                    "there is none. State `grid_size=` as well."
                )
        else:
            return None
        if prefix < 0 or min(grid) < 1 or prefix + grid[0] * grid[1] != tokens:
            raise ValueError(
                f"Expected `prefix_tokens` and `grid_size` to add up to the model's {tokens} tokens, but {prefix} + "
                f"{grid[0]}x{grid[1]} do not."
            )
        return prefix, grid


def mean_of(rows: range, tokens: int) -> Tensor:
    """(N,) readout that is the mean of some tokens."""
    readout = torch.zeros(tokens, dtype=torch.float64)
    readout[rows.start : rows.stop] = 1 / len(rows)
    return readout


# What a module says of how it was built is of these types.
_WORDS = (str, bool, int, type(None))


@dataclass
class Memory:
    """What was found out about a model's tokens, as long as the model is built as it was.

    Attributes:
        built: Says how the model was built.
        layouts: The tokens by the size of images and the number of tokens.
        entries: Where the tokens enter the first block, and the tokens, by the size of images.
    """

    built: object = None
    layouts: dict[tuple[int, ...], TokenLayout] = field(default_factory=dict)
    entries: dict[tuple[int, ...], tuple[Site, TokenLayout]] = field(default_factory=dict)

    def of(self, model: nn.Module) -> Memory:
        """This memory, emptied if `model` is built otherwise than what it is of."""
        built = _built(model)
        if built != self.built:
            self.built = built
            self.layouts.clear()
            self.entries.clear()
        return self


def _built(model: nn.Module) -> object:
    """How a model is built: kinds of modules and what they say of themselves, but not their weights."""
    return tuple(
        (
            name,
            type(module),
            *[
                said
                for said in vars(module).items()
                if said[0][:1] != "_" and said[0] != "training" and isinstance(said[1], _WORDS)
            ],
        )
        for name, module in model.named_modules()
    )
