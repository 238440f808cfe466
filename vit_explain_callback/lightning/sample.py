"""Tell whether a module's weights were replaced, from a sample of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def sample(module: nn.Module) -> Tensor:
    """The bytes of a few of each parameter's values, which are others when its weights are replaced."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *map(_bytes_of, module.parameters())])


def _bytes_of(parameter: Tensor) -> Tensor:
    """Of a parameter whose values cannot be had, as of some quantised ones or on the device `meta`, there are none."""
    own: Any = getattr(parameter, "to_local", lambda: parameter)()
    try:
        if own.layout is torch.sparse_coo:
            own = own.detach().coalesce()
        if own.layout is not torch.strided:
            own = own.detach().values()
        if own.is_quantized:
            own = own.dequantize()
        few: Tensor = own.detach().flatten()[:16].cpu().contiguous().view(torch.uint8)
    except Exception:  # what a subclass of the user's raises
        return torch.empty(0, dtype=torch.uint8)
    return few
