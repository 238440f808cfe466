"""Class probabilities from logits."""

from __future__ import annotations

from torch import Tensor


def class_probabilities(logits: Tensor, multilabel: bool = False) -> Tensor:
    """Probabilities of classes, in float64; on the CPU where the logits are on MPS, which has no float64.

    Args:
        logits: (…, C).
        multilabel: Whether each class is a question of its own: the sigmoid of its logit, and else the softmax of all.

    Returns:
        (…, C), in [0, 1].

    Example:
        >>> import torch
        >>> class_probabilities(torch.zeros(1, 4))[0, 0].item()
        0.25
    """
    try:
        exact = logits.double()
    except TypeError:  # MPS has none
        exact = logits.cpu().double()
    return exact.sigmoid() if multilabel else exact.softmax(dim=-1)
