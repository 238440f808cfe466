"""The token layout of a ViT: prefix tokens, the grid of patches, and the tokens that the classifier reads.

`TokenLayout` is the layout for one image size, `StatedLayout` what the user states about it, and `Memory` keeps the
layouts found for a model.

Shapes: B images, N tokens, P patches, n tokens that remain.
"""

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
        first_patch: Index of the first patch; all patches follow it, row by row.
        grid: Patches as (grid_h, grid_w).
        class_token: Index of the class token, or None. If observed, a token that the classifier reads.
        readout: Weight of each token in what the classifier reads, (N,) summing to 1; None if an attention-pooling
            head reads the tokens.
        observed: Whether the layout was found by experiment.
    """

    tokens: int
    first_patch: int
    grid: tuple[int, int]
    class_token: int | None
    readout: Tensor | None
    observed: bool = False

    @property
    def patches(self) -> slice:
        """Indices of the patches among the tokens."""
        return slice(self.first_patch, self.first_patch + self.grid[0] * self.grid[1])

    def to_grid(self, row: Tensor) -> Tensor:
        """Select the patches of token rows: (B, N) to (B, grid_h, grid_w)."""
        return row[:, self.patches].reshape(-1, *self.grid)

    def remaining(self, removed: Tensor) -> Tensor:
        """(B, n) indices of the tokens that remain without some patches, (B, P) boolean, equally many per image."""
        remains = torch.ones(len(removed), self.tokens, dtype=torch.bool, device=removed.device)
        remains[:, self.patches] = ~removed
        return remains.nonzero()[:, 1].view(len(removed), -1)


@dataclass(frozen=True)
class StatedLayout:
    """What the user states about a model's tokens; the prefix tokens then precede the patches.

    Attributes:
        prefix_tokens: Number of prefix tokens.
        grid_size: Patches as (grid_h, grid_w).
    """

    prefix_tokens: int | None = None
    grid_size: tuple[int, int] | None = None

    def first_patch_and_grid(self, tokens: int, height: int, width: int) -> tuple[int, tuple[int, int]] | None:
        """Index of the first patch, and the grid, for `tokens` N and an image size; None if nothing is stated.

        Raises:
            ValueError: If the numbers do not add up to N, or leave the grid open.
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
    """The readout, (N,), that averages the tokens in `rows`."""
    readout = torch.zeros(tokens, dtype=torch.float64)
    readout[rows.start : rows.stop] = 1 / len(rows)
    return readout


@dataclass
class Memory:
    """The token layouts found for a model, valid until its architecture changes.

    Attributes:
        architecture: Identifies the architecture that the layouts belong to.
        layouts: The layout by image size, number of tokens and recorded calls.
        entries: Where the tokens enter the first block, and their layout, by image size.
    """

    architecture: object = None
    layouts: dict[tuple[int, ...], TokenLayout] = field(default_factory=dict)
    entries: dict[tuple[int, ...], tuple[Site, TokenLayout]] = field(default_factory=dict)

    def of(self, model: nn.Module) -> Memory:
        """This memory, emptied if `model` has another architecture."""
        architecture = _architecture(model)
        if architecture != self.architecture:
            self.architecture = architecture
            self.layouts.clear()
            self.entries.clear()
        return self


_SETTING_TYPES = (str, bool, int, type(None))


def _architecture(model: nn.Module) -> object:
    """The type and the plain public attributes of each module; no weights."""
    return tuple(
        (
            name,
            type(module),
            *[
                (attribute, setting)
                for attribute, setting in vars(module).items()
                if attribute[:1] != "_" and attribute != "training" and isinstance(setting, _SETTING_TYPES)
            ],
        )
        for name, module in model.named_modules()
    )
