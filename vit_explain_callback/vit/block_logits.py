"""Logits that the model's own head computes from the tokens after each block, and their gradient at its attention.

The logit s of a block is the target's logit if the final norm, pooling and head read the tokens that leave this block
instead of those that leave the last: the class token in a model that reads the class token, the mean of the patches in
one that averages them. Its gradients run back through what follows the blocks, and through the block from its output to
its attention.

Shapes: B images, H heads, N tokens, M keys and Q queries of a pool, D channels, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.blocks import Stack
from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.recorder import AttentionRecorder
from vit_explain_callback.vit.session import Session

ModuleCall: TypeAlias = tuple[str, int]
"""Path of a module, and how often it had run before in the pass."""
ModuleCalls: TypeAlias = dict[ModuleCall, tuple[Tensor | None, Any]]
"""First tensor argument and output of each call of a module."""

_CURE = "Leave out the methods that need the logit of each block, such as LeGrad."


@dataclass(frozen=True)
class BlockLogit:
    """The gradient of a block's logit at the attention that the logit depends on.

    Attributes:
        call: The block's attention, (B, H, N, N); with an attention-pooling head, that head's attention over the
            block's tokens, (B, H, Q, M).
        gradients: ∂s/∂O for each target, shaped like the output O of `call`.
    """

    call: AttentionCall
    gradients: Sequence[Tensor]


def block_logits(
    session: Session, stack: Stack, images: Tensor, targets: Sequence[Tensor], layers: Sequence[int]
) -> dict[int, BlockLogit]:
    """Compute the gradient of the logit of some blocks, by the block's number.

    It takes one more forward pass, and for each of these blocks one that skips all blocks.

    Args:
        session: The model.
        stack: Its attention in an earlier pass, with a pool only if the logits depend on it.
        images: (B, C, H, W), as the model is given them.
        targets: Classes, (B,) each.
        layers: Numbers of the blocks, counted from 1.

    Raises:
        ValueError: If the blocks are not modules from (B, N, D) tokens to (B, N, D) tokens, or if the logits are
            detached from them.
    """
    logits_of_blocks: dict[int, BlockLogit] = {}
    with torch.enable_grad():
        _, calls, module_calls = _run(session, images)
        blocks = _blocks(session.vit, [calls[place] for place in stack.places], module_calls)
        outputs = [module_calls[block][1] for block in blocks]
        _check_chain(session.vit, blocks, module_calls, images, stack)
        for layer in layers:
            tokens = _tokens_of(blocks[layer - 1], outputs[layer - 1], len(images), stack.tokens)
            read = tokens.detach().requires_grad_()
            with _skipping(session.vit, blocks, outputs, read):
                logits, calls_behind, _ = _run(session, images)
            chosen = [logits.gather(1, target[:, None]).sum() for target in targets]
            if stack.pool is not None:
                call = next(call for call in calls_behind if call.module == stack.pool.module)
                gradients = _gradients(chosen, [None] * len(chosen), call.output, call.module)
            else:
                call = calls[stack.places[layer - 1]]
                call = call if call.shape == stack.calls[layer - 1].shape else call.with_heads(len(images))
                upstream = _gradients(chosen, [None] * len(chosen), read, call.module)
                gradients = _gradients([tokens] * len(chosen), upstream, call.output, call.module)
            logits_of_blocks[layer] = BlockLogit(replace(call, output=call.output.detach()), gradients)
    return logits_of_blocks


def _run(session: Session, images: Tensor) -> tuple[Tensor, list[AttentionCall], ModuleCalls]:
    """Logits, (B, C), in the autograd graph, the attention, and the calls of modules that hold others."""
    module_calls: ModuleCalls = {}
    runs: dict[str, int] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        argument = next((part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), None)
        module_calls[names[module], runs.get(names[module], 0)] = (argument, output)
        runs[names[module]] = runs.get(names[module], 0) + 1

    names = {module: name for name, module in session.vit.named_modules() if module._modules}
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in names]
    try:
        with AttentionRecorder(session.vit, True, session.twin.state) as recorder, session.fed(True):
            logits = session.logits(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, recorder.calls, module_calls


def _blocks(vit: nn.Module, calls: Sequence[AttentionCall], module_calls: ModuleCalls) -> list[ModuleCall]:
    """The blocks, first block first: the outermost module call around each attention that contains no other."""
    trails = [step for call in calls for step in call.trail]
    unshared = [[step for step in call.trail if trails.count(step) == 1 and step in module_calls] for call in calls]
    if not all(unshared):
        raise ValueError(_not_modules(vit))
    if len(calls) > 1:
        return [steps[0] for steps in unshared]
    # All modules around a single block hold one attention: the block is the first one from tokens to tokens.
    shaped = [step for step in unshared[0] if _is_block(*module_calls[step], calls[0])]
    if not shaped:
        raise ValueError(_not_modules(vit))
    return shaped[:1]


def _is_block(argument: Tensor | None, output: Any, call: AttentionCall) -> bool:
    """Whether a module turns (B, N, D) tokens into tokens of the same shape."""
    output = output[0] if isinstance(output, tuple) else output
    return (
        argument is not None
        and isinstance(output, Tensor)
        and argument.shape == output.shape
        and argument.ndim == 3
        and argument.shape[:2] == (call.shape[0], call.shape[2])
    )


def _check_chain(
    vit: nn.Module, blocks: Sequence[ModuleCall], module_calls: ModuleCalls, images: Tensor, stack: Stack
) -> None:
    """Refuse blocks unless each reads the output of the one before."""
    for before, after in pairwise(blocks):
        argument = module_calls[after][0]
        output = _tokens_of(before, module_calls[before][1], len(images), stack.tokens)
        if argument is output:  # nearly always; comparing the elements would make the CPU wait for the device
            continue
        if argument is None or argument.shape != output.shape or not argument.equal(output):
            raise ValueError(_not_modules(vit))


def _not_modules(vit: nn.Module) -> str:
    return (
        f"Expected the blocks of {type(vit).__name__} to be modules that are called one after another, so that the "
        f"logit of each can be computed, but they are not. {_CURE}"
    )


@contextmanager
def _skipping(vit: nn.Module, blocks: Sequence[ModuleCall], outputs: Sequence[Any], tokens: Tensor) -> Iterator[None]:
    """Skip all blocks: each returns its earlier output, and the last one returns `tokens`, (B, N, D)."""
    last = (tokens, *outputs[-1][1:]) if isinstance(outputs[-1], tuple) else tokens
    outputs_of: dict[str, list[Any]] = {}
    for (path, _), output in zip(blocks, [*outputs[:-1], last], strict=True):
        outputs_of.setdefault(path, []).append(output)
    modules = {path: vit.get_submodule(path) for path in outputs_of}
    forwards = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            vars(module)["forward"] = partial(_next_of, iter(outputs_of[path]))
        yield
    finally:
        for path, module in modules.items():
            del vars(module)["forward"]
            if forwards[path] is not None:
                vars(module)["forward"] = forwards[path]


def _next_of(outputs: Iterator[Any], *_args: Any, **_kwargs: Any) -> Any:
    return next(outputs)


def _tokens_of(block: ModuleCall, output: Any, images: int, tokens: int) -> Tensor:
    """The tokens, (B, N, D), in the output of a block."""
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != (images, tokens):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"Expected tokens of shape ({images}, {tokens}, D) from `{block[0]}`, so that the logit of the "
            f"block can be computed, but got {got}. {_CURE}"
        )
    return output


def _gradients(of: Sequence[Tensor], upstream: Sequence[Tensor | None], at: Tensor, module: str) -> list[Tensor]:
    """∂of/∂at for each target, weighted by `upstream` unless `of` is a scalar."""
    gradients = []
    for place, (one, weight) in enumerate(zip(of, upstream, strict=True)):
        gradient = None
        if one.requires_grad and at.requires_grad:
            retain = place < len(of) - 1
            (gradient,) = torch.autograd.grad(one, at, weight, retain_graph=retain, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"Expected gradients of the block's logit to reach `{module}`, but it is detached from the logits. "
                f"Remove `detach()` from the model's forward. {_CURE}"
            )
        gradients.append(gradient)
    return gradients
