"""Look through what is wrapped around a module, and tell what cannot be looked through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(module: nn.Module) -> nn.Module:
    """What `torch.compile`, `DistributedDataParallel`, `DataParallel` or Fabric was wrapped around, or the module."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    inner: Any = module.module if isinstance(module, DataParallel | DistributedDataParallel) else None
    for name in ("_orig_mod", "_original_module"):
        inner = module._modules.get(name, inner)
    return module if inner is None else unwrapped(inner)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are spread over processes, as by FSDP, DeepSpeed or tensor parallelism.

    Such a module has no twin: every process must take part in its own forward pass.
    """
    modules = list(module.modules())
    if any("FullyShardedDataParallel" in kind.__name__ for kind in {type(child) for child in modules}):
        return True
    # Read off dictionaries, as asking thousands of times for what is not there takes milliseconds.
    if any("_fsdp_wrapped_module" in child._modules for child in modules):
        return True
    parameters = [part for child in modules for part in child._parameters.values() if part is not None]
    return any(
        "ds_id" in vars(part) or (type(part) is not nn.Parameter and hasattr(part, "device_mesh"))
        for part in parameters
    )


def has_twin(module: nn.Module) -> bool:
    """Whether a twin can be made of a module: not of one that is sharded, nor of one that is scripted as a whole."""
    return not is_sharded(module) and not isinstance(unwrapped(module), torch.jit.ScriptModule)
