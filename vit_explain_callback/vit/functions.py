"""Tell torch's functions by name, also where somebody put a function of their own in the place of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

SCALED_DOT_PRODUCT: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention
"""The kernel itself, whatever `torch.nn.functional` calls by its name."""

# These are written in Python and look themselves up by name, so what was put in their place is what a mode is given.
_LOOKED_UP = ("softmax", "log_softmax", "dropout", "multi_head_attention_forward")
_ORIGINALS: dict[str, Callable[..., Any]] = {name: getattr(F, name) for name in _LOOKED_UP}


def named(func: Callable[..., Any]) -> str:
    """Name of a function seen by a `TorchFunctionMode`; of the getter of a property, that of the property."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return next((known for known in _LOOKED_UP if func is getattr(F, known)), name)


def original(func: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own function where another stands in its place, which has been called already."""
    return next((_ORIGINALS[known] for known in _LOOKED_UP if func is getattr(F, known)), func)
