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
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.blocks import Stack
from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.recorder import AttentionRecorder
from vit_explain_callback.vit.session import Session

Seen: TypeAlias = dict[tuple[str, int], tuple[Tensor | None, Any]]
"""What a module was first given, and what it gave, by its path and how often it had run before."""

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
    session: Session, stack: Stack, images: Tensor, targets: Sequence[Tensor], layers: Sequence[int]
) -> dict[int, BlockLogit]:
    """The logit of some blocks, and its gradient, by the block's number.

    It takes one more forward pass, and for each of the blocks one that leaves out all blocks. The gradients run back
    through what follows the blocks, and through each block from its output to its attention.

    Args:
        session: The model.
        stack: Its attention in a pass before, with a pool only if the logits depend on it.
        images: (B, C, H, W), as the model is given them.
        targets: Classes, (B,) each.
        layers: Numbers of the blocks, counted from 1.

    Raises:
        ValueError: If the blocks are no modules that turn (B, N, D) tokens into (B, N, D) tokens, or if the logits are
            cut off from them.
    """
    found: dict[int, BlockLogit] = {}
    with torch.enable_grad():
        _, calls, inputs_and_outputs = _run(session, images)
        blocks = _blocks(session.vit, [calls[place] for place in stack.places], inputs_and_outputs)
        outputs = [inputs_and_outputs[block][1] for block in blocks]
        _check_chain(session.vit, blocks, inputs_and_outputs, images, stack)
        for layer in layers:
            tokens = _tokens_of(blocks[layer - 1], outputs[layer - 1], len(images), stack.tokens)
            read = tokens.detach().requires_grad_()
            with _skipping(session.vit, blocks, outputs, read):
                logits, calls_behind, _ = _run(session, images)
            chosen = [logits.gather(1, target[:, None]).sum() for target in targets]
            if stack.pool is not None:
                pool = next(call for call in calls_behind if call.module == stack.pool.module)
                gradients = _gradients(chosen, [None] * len(chosen), pool.output, pool.module)
                found[layer] = BlockLogit(replace(pool, output=pool.output.detach()), gradients)
            else:
                call = calls[stack.places[layer - 1]]
                call = call if call.shape == stack.calls[layer - 1].shape else call.with_heads(len(images))
                upstream = _gradients(chosen, [None] * len(chosen), read, call.module)
                gradients = _gradients([tokens] * len(chosen), upstream, call.output, call.module)
                found[layer] = BlockLogit(replace(call, output=call.output.detach()), gradients)
    return found


def _run(session: Session, images: Tensor) -> tuple[Tensor, list[AttentionCall], Seen]:
    """Logits (B, C) in the autograd graph, the attention, and what each call of a module was given and gave."""
    seen: Seen = {}
    runs: dict[str, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), None)
        seen[names[module], runs.get(names[module], 0)] = (given, output)
        runs[names[module]] = runs.get(names[module], 0) + 1

    names = {module: name for name, module in session.vit.named_modules() if module._modules}
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in names]
    try:
        with AttentionRecorder(session.vit, True, session.twin.state) as recorder, session.fed(True):
            logits = session.logits(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, recorder.calls, seen


def _blocks(vit: nn.Module, calls: Sequence[AttentionCall], seen: Seen) -> list[tuple[str, int]]:
    """The blocks as calls of modules, first block first: the outermost round each attention with no other in it."""
    steps = [step for call in calls for step in call.trail]
    alone = [[step for step in call.trail if steps.count(step) == 1 and step in seen] for call in calls]
    if not all(alone):
        raise ValueError(_not_modules(vit))
    if len(calls) > 1:
        return [those[0] for those in alone]
    # Of a single block all modules round it hold one attention: it is the first that tokens of its output's size enter.
    shaped = [step for step in alone[0] if _is_block(seen[step], calls[0])]
    if not shaped:
        raise ValueError(_not_modules(vit))
    return shaped[:1]


def _is_block(seen: tuple[Tensor | None, Any], call: AttentionCall) -> bool:
    given, output = seen
    output = output[0] if isinstance(output, tuple) else output
    return (
        given is not None
        and isinstance(output, Tensor)
        and given.shape == output.shape
        and given.ndim == 3
        and given.shape[:2] == (call.shape[0], call.shape[2])
    )


def _check_chain(vit: nn.Module, blocks: Sequence[tuple[str, int]], seen: Seen, images: Tensor, stack: Stack) -> None:
    """Refuse blocks of which one is not given what the one before gave."""
    for before, after in pairwise(blocks):
        given, output = seen[after][0], _tokens_of(before, seen[before][1], len(images), stack.tokens)
        if given is output:  # as nearly always; to compare values, the CPU would wait for the device
            continue
        if given is None or given.shape != output.shape or not given.equal(output):
            raise ValueError(_not_modules(vit))


def _not_modules(vit: nn.Module) -> str:
    return (
        f"Expected the blocks of {type(vit).__name__} to be modules that are called one after another, so that the "
        f"logit of each can be had, but they are not. {_CURE}"
    )


@contextmanager
def _skipping(
    vit: nn.Module, blocks: Sequence[tuple[str, int]], outputs: Sequence[Any], tokens: Tensor
) -> Iterator[None]:
    """Compute no block: each gives what it gave before, and the last one other tokens, (B, N, D)."""
    last = (tokens, *outputs[-1][1:]) if isinstance(outputs[-1], tuple) else tokens
    given: dict[str, list[Any]] = {}
    for (path, _), output in zip(blocks, [*outputs[:-1], last], strict=True):
        given.setdefault(path, []).append(output)
    modules = {path: vit.get_submodule(path) for path in given}
    forwards = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            vars(module)["forward"] = partial(_next_of, iter(given[path]))
        yield
    finally:
        for path, module in modules.items():
            del vars(module)["forward"]
            if forwards[path] is not None:
                vars(module)["forward"] = forwards[path]


def _next_of(outputs: Iterator[Any], *_args: Any, **_kwargs: Any) -> Any:
    return next(outputs)


def _tokens_of(block: tuple[str, int], output: Any, images: int, tokens: int) -> Tensor:
    """The tokens (B, N, D) that a block gives."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != (images, tokens):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"Expected tokens of shape ({images}, {tokens}, D) from `{block[0]}`, so that the logit of the "
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
