"""Logits that the model's own head gives the tokens after each block, and their gradient at its attention.

The logit s of a block is what the model would give the target if its final norm, pooling and head read the tokens that
leave this block instead of those that leave the last: its class token in a model that reads the class token, the mean
of its patches in one that averages them.

Shapes: B images, H heads, N tokens, M keys and Q queries of a pool, D channels, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.adapter import Subject
from vit_explain_callback.vit.capture import AttentionCall, AttentionRecorder
from vit_explain_callback.vit.stack import Stack

_CURE = "Leave out the methods that need the logit of each block, such as LeGrad."


@dataclass(frozen=True)
class BlockLogit:
    """The gradient of a block's logit at the attention that the logit depends on.

    Attributes:
        call: The block's attention, (B, H, N, N); or where an attention-pooling head does the reading, that head's
            attention over the block's tokens, (B, H, Q, M).
        gradients: ∂s/∂O for each target, shaped like the output O of `call`.
    """

    call: AttentionCall
    gradients: Sequence[Tensor]


def block_logits(
    subject: Subject, stack: Stack, images: Tensor, targets: Sequence[Tensor], layers: Sequence[int]
) -> dict[int, BlockLogit]:
    """The logit of some blocks, and its gradient, by the block's number.

    It takes one more forward pass, and for each of the blocks one that leaves out all blocks. The gradients run back
    through what follows the blocks, and through each block from its output to its attention.

    Args:
        subject: The model.
        stack: Its attention in a pass before, with a pool only if the logits depend on it.
        images: (B, C, H, W), as the model is given them.
        targets: Classes, (B,) each.
        layers: Numbers of the blocks, counted from 1.

    Raises:
        ValueError: If the blocks are no modules that turn (B, N, D) tokens into (B, N, D) tokens, or if the logits are
            cut off from them.
    """
    blocks = _blocks(subject.vit, stack)
    found: dict[int, BlockLogit] = {}
    with torch.enable_grad():
        outputs: list[Any] = []
        with _noting(blocks, outputs):
            _, calls = _run(subject, images)
        for layer in layers:
            tokens = _tokens_of(blocks[layer - 1], outputs[layer - 1], len(images), stack.tokens)
            read = tokens.detach().requires_grad_()
            with _skipping(blocks, outputs, read):
                logits, calls_behind = _run(subject, images)
            chosen = [logits.gather(1, target[:, None]).sum() for target in targets]
            if stack.pool is not None:
                pool = calls_behind[stack.pool.module]
                gradients = _gradients(chosen, [None] * len(chosen), pool.output, pool.module)
                found[layer] = BlockLogit(replace(pool, output=pool.output.detach()), gradients)
            else:
                call = calls[stack.calls[layer - 1].module]
                upstream = _gradients(chosen, [None] * len(chosen), read, call.module)
                gradients = _gradients([tokens] * len(chosen), upstream, call.output, call.module)
                found[layer] = BlockLogit(replace(call, output=call.output.detach()), gradients)
    return found


def _run(subject: Subject, images: Tensor) -> tuple[Tensor, dict[str, AttentionCall]]:
    """Logits (B, C) in the autograd graph, and the attention seen, by the path of its module."""
    with AttentionRecorder(subject.vit, True, subject.twin.state) as recorder, subject.fed(True):
        logits = subject.logits(images)
    return logits, {call.module: call for call in recorder.calls}


def _blocks(vit: nn.Module, stack: Stack) -> list[nn.Module]:
    """The blocks as modules, first block first: of the modules round each attention, the outermost with no other."""
    paths = [call.module for call in (*stack.calls, *([stack.pool] if stack.pool else []))]

    def block(path: str) -> nn.Module:
        parts = path.split(".")
        outer = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        alone = [name for name in outer if sum(f"{other}.".startswith(f"{name}.") for other in paths) == 1]
        return vit.get_submodule(alone[0])

    blocks = [block(call.module) for call in stack.calls]
    if len(blocks) == 1:
        blocks = [stack.entry]
    if blocks[0] is not stack.entry or blocks[-1] is not stack.exit:
        raise ValueError(
            f"Expected the blocks of {type(vit).__name__} to be modules that are called one after another, so that the "
            f"logit of each can be had, but they are not. {_CURE}"
        )
    return blocks


@contextmanager
def _noting(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Note what each block gives, in order."""
    handles = [block.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipping(blocks: Sequence[nn.Module], outputs: Sequence[Any], tokens: Tensor) -> Iterator[None]:
    """Compute no block: each gives what it gave before, and the last one other tokens, (B, N, D)."""
    last = (tokens, *outputs[-1][1:]) if isinstance(outputs[-1], tuple) else tokens
    forwards = [vars(block).get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, [*outputs[:-1], last], strict=True):
            vars(block)["forward"] = partial(_given, output)
        yield
    finally:
        for block, forward in zip(blocks, forwards, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward


def _given(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return output


def _tokens_of(block: nn.Module, output: Any, images: int, tokens: int) -> Tensor:
    """The tokens (B, N, D) that a block gives."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != (images, tokens):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"Expected tokens of shape ({images}, {tokens}, D) from {type(block).__name__}, so that the logit of the "
            f"block can be had, but got {got}. {_CURE}"
        )
    return found


def _gradients(of: Sequence[Tensor], upstream: Sequence[Tensor | None], at: Tensor, module: str) -> list[Tensor]:
    """∂of/∂at for each target, weighted by `upstream` where `of` is no scalar."""
    found = []
    for place, (one, weight) in enumerate(zip(of, upstream, strict=True)):
        gradient = None
        if one.requires_grad and at.requires_grad:
            retain = place < len(of) - 1
            (gradient,) = torch.autograd.grad(one, at, weight, retain_graph=retain, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"Expected gradients of the block's logit to reach `{module}`, but it is cut off from the logits. Take "
                f"`detach()` out of the model's forward. {_CURE}"
            )
        found.append(gradient)
    return found
