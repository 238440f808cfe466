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
        """Concatenate statistics along the batch dimension."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def cpu(self) -> BlockStatistics:
        """A copy on the CPU."""
        return BlockStatistics(*(getattr(self, field.name).cpu() for field in fields(self)))


class BlockMeter:
    """Takes in attention matrices, some images, heads and query rows of a block at a time, and gives their statistics.

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
        self._distance, self._class_self = (like.new_zeros(images, blocks) for _ in range(2))
        self._entropy = like.new_zeros(images, blocks, max(heads))

    def add(self, block: int, images: slice, heads: slice, queries: slice, attention: Tensor) -> None:
        """Take in (b, h, n, N) of a block, counted from 0, for some of its images, heads and query rows."""
        patches, class_token, tokens = self._layout.patches, self._layout.class_token, attention.shape[3]
        self._rows[images, block] += (self._readout[queries] @ attention)[..., patches].sum(dim=1)
        entropy = -torch.xlogy(attention, attention).sum(dim=(2, 3)) / (tokens * math.log(tokens))
        self._entropy[images, block, heads] += entropy
        if class_token is not None and queries.start <= class_token < queries.stop:
            to_itself = attention[:, :, class_token - queries.start, class_token]
            self._class_self[images, block] += to_itself.sum(dim=1)
        first, last = max(queries.start, patches.start), min(queries.stop, patches.stop)
        if first < last:
            among = attention[:, :, first - queries.start : last - queries.start, patches]
            share = 1 / among.sum(dim=3)
            self._columns[images, block] += (share[:, :, None] @ among)[:, :, 0].sum(dim=1)
            distances = self._distances[first - patches.start : last - patches.start]
            distance = torch.einsum("bhij,ij->bhi", among, distances) * share
            self._distance[images, block] += distance.sum(dim=(1, 2)) / among.shape[3]

    def result(self) -> BlockStatistics:
        """The statistics of everything added."""
        maps = (*self._distance.shape, *self._layout.grid)
        columns = self._columns / self._heads[:, None]
        count = max(1, round(columns.shape[2] / 100))
        no_class_token = math.nan if self._layout.class_token is None else 0.0
        return BlockStatistics(
            rows=(self._rows / self._heads[:, None]).view(maps),
            columns=columns.view(maps),
            entropy=self._entropy.sum(dim=2) / self._heads,
            lowest_head_entropy=self._lowest(),
            distance=self._distance / self._heads,
            class_self=self._class_self / self._heads + no_class_token,
            sink_share=columns.topk(count, dim=2).values.sum(dim=2) / columns.shape[2],
        )

    def _lowest(self) -> Tensor:
        """(B, L) entropy of the head that has the least, of those that a block has."""
        heads = torch.arange(self._entropy.shape[2], device=self._entropy.device)
        missing = heads >= self._heads[:, None]
        return self._entropy.masked_fill(missing, math.inf).amin(dim=2)
