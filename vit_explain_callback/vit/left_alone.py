"""Leave a model alone while code of the user's runs on its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def left_alone(model: nn.Module) -> Iterator[list[str]]:
    """Put gradients, hooks, flags and buffers of a model back on leaving, also after an error.

    Parameters need not be put back where a guarded twin is run inside: what writes to their memory writes to a copy.

    Yields:
        A list that holds, once the context is left, what had been changed, in words.
    """
    modules = [(name or type(model).__name__, module) for name, module in model.named_modules()]
    flags = [(module.training, [dict(getattr(module, kind)) for kind in _HOOKS]) for _, module in modules]
    parameters = [(name, part, part.grad, part.requires_grad) for name, part in model.named_parameters()]
    buffers = [(name, part, part.detach().clone()) for name, part in model.named_buffers()]
    for _, part, _, _ in parameters:
        part.grad = None  # put aside, as a backward pass would add to it in place
    changed: list[str] = []
    try:
        yield changed
    finally:
        for (name, module), (training, hooks) in zip(modules, flags, strict=True):
            changed += _put_back_module(name, module, training, hooks)
        for name, part, gradient, asks in parameters:
            _note(changed, part.grad is not None, f"`{name}.grad`")
            _note(changed, part.requires_grad != asks, f"`{name}.requires_grad`")
            part.requires_grad_(asks)
            part.grad = gradient
        for name, buffer, value in buffers:
            if not _equal(buffer, value):
                changed.append(f"the buffer `{name}`")
                with torch.no_grad():
                    buffer.copy_(value)


def _put_back_module(
    name: str, module: nn.Module, training: bool, hooks: list[dict[int, Callable[..., Any]]]
) -> list[str]:
    changed: list[str] = []
    _note(changed, module.training != training, f"`{name}.training`")
    module.training = training
    for kind, before in zip(_HOOKS, hooks, strict=True):
        now: dict[int, Callable[..., Any]] = getattr(module, kind)
        _note(changed, list(now) != list(before), f"hooks on `{name}`")
        if list(now) != list(before):
            now.clear()
            now.update(before)
    return changed


def _equal(buffer: Tensor, value: Tensor) -> bool:
    """Whether two buffers are the same, NaN included; of a subclass it cannot be asked."""
    if type(buffer) not in (Tensor, nn.Buffer):
        return True
    return bool(((buffer == value) | ((buffer != buffer) & (value != value))).all())


def _note(changed: list[str], is_changed: bool, what: str) -> None:
    if is_changed:
        changed.append(what)
