"""What a model says of its classes, as probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def class_probabilities(logits: Tensor, multilabel: bool = False) -> Tensor:
    """Probabilities of classes, in float64; on the CPU where the logits are on MPS, which has no float64.

    Args:
        logits: (…, C).
        multilabel: Whether each class is a question of its own: the sigmoid of its logit, and else the softmax of all.

    Returns:
        (…, C), in [0, 1].

    Example:
        >>> class_probabilities(torch.zeros(1, 4))[0, 0].item()
        0.25
    """
    exact = (logits.cpu() if logits.device.type == "mps" else logits).to(torch.float64)
    return exact.sigmoid() if multilabel else exact.softmax(dim=-1)
