"""What an explanation holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Explanation:
    """What `explain` found for a batch.

    Attributes:
        maps: Relevance of each patch by method name, (B, grid_h, grid_w), raw: patches and prefix tokens together sum
            to 1. Float32, or float64 for a float64 model.
        logits: (B, C).
        target: Class whose logit the gradients are of, (B,).
    """

    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Explanation]) -> Explanation:
        """One explanation of all images of several, in order."""
        return cls(
            maps={name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
            logits=torch.cat([part.logits for part in parts]),
            target=torch.cat([part.target for part in parts]),
        )

    def cpu(self) -> Explanation:
        """A copy on the CPU, with logits in float32 at least."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return Explanation({name: maps.cpu() for name, maps in self.maps.items()}, logits.cpu(), self.target.cpu())
