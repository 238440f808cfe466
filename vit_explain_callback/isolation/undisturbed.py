"""Context managers that leave no trace: on a model (`undisturbed`, `restored`) and on random streams."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from vit_explain_callback.isolation.twin import StandIn, Twin
from vit_explain_callback.isolation.wrappers import is_sharded

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def undisturbed(model: nn.Module, stand_in: StandIn = lambda _twin, _value: None) -> Iterator[Twin]:
    """Yield a twin of `model` to evaluate in full precision, and restore everything else, also after an error.

    Inside, autocast and inference mode are off, and compiled modules run eagerly. Afterwards autocast, inference and
    gradient modes and all random streams are restored.

    A model whose parameters are sharded over processes has no twin. It is evaluated itself, and every module gets its
    training flag back; what its forward writes to itself, such as buffers, stays written.

    Args:
        model: Any module; it is not changed.
        stand_in: Returns a stand-in for an object on the twin; None for most objects.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(_device(model).type, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_reentrant_checkpoints())
        if is_sharded(model):
            stack.enter_context(_evaluation_mode(model))
            twin = Twin()
            twin.module = model
            yield twin
        else:
            twin = Twin(stand_in)
            stack.callback(twin.close)
            twin.module = twin.copy(model)
            stack.enter_context(twin.guarding())
            yield twin


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random streams of Python, NumPy and torch (CPU, CUDA, MPS) on exit, also after an error.

    Args:
        seed: Seed of all these streams inside; None leaves them where they are.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if cuda_used else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            # Not `torch.manual_seed`: where CUDA is not in use yet, that would seed it for when it is.
            torch.default_generator.manual_seed(seed)
            if cuda_used:
                torch.cuda.manual_seed_all(seed)
            if mps_state is not None:
                torch.mps.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def restored(model: nn.Module) -> Iterator[list[str]]:
    """Restore gradients, hooks, flags and buffers of a model on exit, also after an error.

    Parameters keep their values if a guarded twin runs inside: every write to their memory goes to a copy.

    Yields:
        A list that names every change once the context is left.
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


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # The flag alone, module by module: `model.train()` would not restore a mixed model, and may be overridden.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class _NonReentrant:
    """Replaces torch's reentrant checkpoints, which do not support `torch.autograd.grad`."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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
