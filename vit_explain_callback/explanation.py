"""What an explanation holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_explain_callback.blocks import BlockStatistics


@dataclass(frozen=True)
class Explanation:
    """What `explain` found for a batch.

    Attributes:
        maps: Relevance of each patch by method name, (B, grid_h, grid_w), raw: patches and prefix tokens together sum
            to 1. Float32, or float64 for a float64 model.
        logits: (B, C).
        target: Class whose logit the gradients are of, (B,).
        blocks: What each block attends to, if asked for.
    """

    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor
    blocks: BlockStatistics | None = None

    @classmethod
    def joined(cls, parts: Sequence[Explanation]) -> Explanation:
        """One explanation of all images of several, in order."""
        blocks = [part.blocks for part in parts if part.blocks is not None]
        return cls(
            maps={name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
            logits=torch.cat([part.logits for part in parts]),
            target=torch.cat([part.target for part in parts]),
            blocks=BlockStatistics.joined(blocks) if blocks else None,
        )

    def cpu(self) -> Explanation:
        """A copy on the CPU, with logits in float32 at least."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        maps = {name: maps.cpu() for name, maps in self.maps.items()}
        return Explanation(maps, logits.cpu(), self.target.cpu(), None if self.blocks is None else self.blocks.cpu())
