"""Sample a module's weights, to tell whether they were replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def sample_weights(module: nn.Module) -> Tensor:
    """The bytes of the first values of each parameter; they change when the weights are replaced."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *map(_bytes_of, module.parameters())])


def _bytes_of(parameter: Tensor) -> Tensor:
    """Empty if the values cannot be read, as of some quantised parameters or on the device `meta`."""
    local: Any = getattr(parameter, "to_local", lambda: parameter)()
    try:
        if local.layout is torch.sparse_coo:
            local = local.detach().coalesce()
        if local.layout is not torch.strided:
            local = local.detach().values()
        if local.is_quantized:
            local = local.dequantize()
        few: Tensor = local.detach().flatten()[:16].cpu().contiguous().view(torch.uint8)
    except Exception:  # what a subclass of the user's raises
        return torch.empty(0, dtype=torch.uint8)
    return few
