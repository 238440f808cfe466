"""Statistics of what each block attends to, gathered while its attention exists.

Shapes: B images, b of them at a time, L blocks, h heads at a time, N tokens, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vit_explain_callback.metrics.maps import patch_places
from vit_explain_callback.vit.tokens import TokenLayout


@dataclass(frozen=True)
class BlockStatistics:
    """Attention of every block, first block first, averaged over heads unless it says otherwise.

    Attributes:
        rows: What the classifier's tokens attend to among the patches, (B, L, grid_h, grid_w): the readout's row of the
            attention matrix. All patches count alike where an attention pool does the reading.
        columns: Attention that each patch receives from all patches, (B, L, grid_h, grid_w); 1 is uniform, and large
            values are attention sinks.
        entropy: −Σ A ln A / ln N averaged over the queries, (B, L), in [0, 1]; 1 is uniform.
        lowest_head_entropy: The same of the head where it is lowest.
        distance: Mean distance in pixels between a patch and the patches it attends to, (B, L) (Dosovitskiy et al.
            2020, arXiv:2010.11929).
        class_self: The class token's attention to itself, (B, L), in [0, 1]; NaN where the model has none.
        sink_share: Share of the attention among patches that the strongest hundredth of the patches receive, at least
            one of them, (B, L), in [0, 1].
    """

    rows: Tensor
    columns: Tensor
    entropy: Tensor
    lowest_head_entropy: Tensor
    distance: Tensor
    class_self: Tensor
    sink_share: Tensor

    @classmethod
    def joined(cls, parts: Sequence[BlockStatistics]) -> BlockStatistics:
        """Those of all images of several, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def cpu(self) -> BlockStatistics:
        """A copy on the CPU."""
        return BlockStatistics(*(getattr(self, field.name).cpu() for field in fields(self)))


class BlockMeter:
    """Takes in attention matrices, some images and heads of a block at a time, and gives their statistics.

    Args:
        layout: The tokens.
        image_size: (height, width) in pixels.
        images: B.
        heads: H of each block, first block first.
        like: A tensor with the device and dtype to gather in.
    """

    def __init__(
        self, layout: TokenLayout, image_size: tuple[int, int], images: int, heads: Sequence[int], like: Tensor
    ) -> None:
        self._layout = layout
        self._heads = like.new_tensor(heads)
        patches = layout.grid[0] * layout.grid[1]
        readout = layout.readout
        if readout is None:
            readout = torch.zeros(layout.tokens)
            readout[layout.patches] = 1 / patches
        self._readout = readout.to(like)
        pixels = [size / count for size, count in zip(image_size, layout.grid, strict=True)]
        places = patch_places(layout.grid).mul(torch.tensor(pixels, dtype=torch.float64))
        self._distances = torch.cdist(places, places).to(like)
        blocks = len(heads)
        self._rows = like.new_zeros(images, blocks, patches)
        self._columns = like.new_zeros(images, blocks, patches)
        self._entropy, self._distance, self._class_self = (like.new_zeros(images, blocks) for _ in range(3))
        self._lowest = like.new_full((images, blocks), math.inf)

    def add(self, block: int, images: slice, attention: Tensor) -> None:
        """Take in (b, h, N, N) of a block, counted from 0, for the images b."""
        patches = self._layout.patches
        self._rows[images, block] += (self._readout @ attention)[..., patches].sum(dim=1)
        entropy = -torch.xlogy(attention, attention).sum(dim=(2, 3)) / (
            attention.shape[2] * math.log(attention.shape[3])
        )
        self._entropy[images, block] += entropy.sum(dim=1)
        self._lowest[images, block] = torch.minimum(self._lowest[images, block], entropy.amin(dim=1))
        among = attention[:, :, patches, patches]
        share = 1 / among.sum(dim=3)
        self._columns[images, block] += (share[:, :, None] @ among)[:, :, 0].sum(dim=1)
        distance = torch.einsum("bhij,ij->bhi", among, self._distances) * share
        self._distance[images, block] += distance.mean(dim=2).sum(dim=1)
        if self._layout.class_token is not None:
            self._class_self[images, block] += attention[:, :, self._layout.class_token, self._layout.class_token].sum(
                dim=1
            )

    def result(self) -> BlockStatistics:
        """The statistics of everything added."""
        maps = (*self._entropy.shape, *self._layout.grid)
        columns = self._columns / self._heads[:, None]
        count = max(1, round(columns.shape[2] / 100))
        no_class_token = math.nan if self._layout.class_token is None else 0.0
        return BlockStatistics(
            rows=(self._rows / self._heads[:, None]).view(maps),
            columns=columns.view(maps),
            entropy=self._entropy / self._heads,
            lowest_head_entropy=self._lowest,
            distance=self._distance / self._heads,
            class_self=self._class_self / self._heads + no_class_token,
            sink_share=columns.topk(count, dim=2).values.sum(dim=2) / columns.shape[2],
        )
