"""What the model's own head makes of the tokens after each block, and its gradient at that block's attention.

The logit s of a block is what the model would give the target if its final norm, pooling and head read the tokens that
leave this block instead of those that leave the last: its class token in a model that reads the class token, the mean
of its patches in one that averages them.

Shapes: B images, K of the L blocks, H heads, N tokens, M keys and Q queries of a pool, D channels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.adapter import Subject
from vit_explain_callback.vit.capture import AttentionCall, AttentionRecorder
from vit_explain_callback.vit.stack import Stack


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

    It takes one more forward pass, in which the rest of the model sees the tokens of all K blocks as one batch of K · B
    images. The gradients run back through that rest, and through each block from its output to its attention.

    Args:
        subject: The model, in evaluation mode.
        stack: Its attention in a pass before, with a pool only if the logits depend on it.
        images: (B, C, H, W).
        targets: Classes, (B,) each.
        layers: Numbers of the K blocks, counted from 1.

    Raises:
        ValueError: If the blocks are no modules that turn (B, N, D) tokens into (B, N, D) tokens, or if the logits are
            cut off from them.
    """
    # The hooks stay until the gradients are there: a checkpointed block runs again for them.
    with torch.enable_grad(), _EarlyReading(subject.vit, stack, layers, len(images)) as early:
        with AttentionRecorder(subject.vit, through_no_grad=True) as recorder:
            logits = subject.logits(images.detach().repeat(len(layers), 1, 1, 1))
        chosen = [logits.gather(1, target.repeat(len(layers))[:, None]).sum() for target in targets]
        calls = {call.module: call for call in recorder.calls}
        if stack.pool is not None:
            return _at_pool(chosen, calls[stack.pool.module], layers, len(images))
        found = _at_blocks(chosen, {layer: calls[stack.calls[layer - 1].module] for layer in layers}, early)
        return {layer: BlockLogit(stack.calls[layer - 1], gradients) for layer, gradients in found.items()}


class _EarlyReading(ExitStack):
    """Context in which what follows the blocks is given the tokens of several blocks as one batch.

    A model that is given K · B images, B of them K times over, computes its blocks for the first B alone. Behind the
    blocks it sees K · B images again.

    Args:
        vit: The model that holds the blocks.
        stack: Its attention in a pass before.
        layers: Numbers of the K blocks, counted from 1.
        count: B.

    Attributes:
        leaving: The tokens (B, N, D) that left each of the blocks, in the autograd graph.
        together: The same as one leaf (K · B, N, D), which the logits depend on.

    Raises:
        ValueError: If the blocks are no modules that are called one after another.
    """

    together: Tensor

    def __init__(self, vit: nn.Module, stack: Stack, layers: Sequence[int], count: int) -> None:
        super().__init__()
        self._blocks = _blocks(vit, stack)
        self._tokens = stack.tokens
        self._layers = layers
        self._count = count
        self.leaving: dict[int, Tensor] = {}

    def __enter__(self) -> _EarlyReading:
        for layer, block in enumerate(self._blocks, start=1):
            if layer in self._layers:
                self._hook(block.register_forward_hook(self._keep_as(layer)))
        self._hook(self._blocks[0].register_forward_pre_hook(self._narrow, with_kwargs=True))
        self._hook(self._blocks[-1].register_forward_hook(self._widen))
        return self

    def _hook(self, handle: Any) -> None:
        self.callback(handle.remove)

    def _narrow(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first B images alone enter the first block, as a leaf, so that the blocks have a graph."""
        entering = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        narrowed = self._checked(block, entering, self._count * len(self._layers))[: self._count]
        narrowed = narrowed.detach().requires_grad_()
        args = tuple(narrowed if value is entering else value for value in args)
        return args, {name: narrowed if value is entering else value for name, value in kwargs.items()}

    def _keep_as(self, layer: int) -> Any:
        def keep(block: nn.Module, _args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            self.leaving.setdefault(layer, self._checked(block, tokens, self._count))

        return keep

    def _widen(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        if not hasattr(self, "together"):
            self.together = torch.cat([self.leaving[layer].detach() for layer in self._layers]).requires_grad_()
        return (self.together, *output[1:]) if isinstance(output, tuple) else self.together

    def _checked(self, block: nn.Module, tokens: Any, count: int) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[:2] != (count, self._tokens):
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"Expected tokens of shape ({count}, {self._tokens}, D) at {type(block).__name__}, so that the logit "
                f"of each block can be had, but got {got}. Leave out the methods that need it, such as LeGrad."
            )
        return tokens


def _blocks(vit: nn.Module, stack: Stack) -> list[nn.Module]:
    """The blocks as modules, first block first."""
    for container in vit.modules():
        blocks = list(container.children()) if isinstance(container, nn.ModuleList | nn.Sequential) else []
        if len(blocks) == len(stack.calls) and blocks[0] is stack.entry and blocks[-1] is stack.exit:
            return blocks
    raise ValueError(
        f"Expected the blocks of {type(vit).__name__} to be modules that are called one after another, so that the "
        "logit of each can be had, but they are not. Leave out the methods that need it, such as LeGrad."
    )


def _at_blocks(
    chosen: Sequence[Tensor], calls: Mapping[int, AttentionCall], early: _EarlyReading
) -> dict[int, list[Tensor]]:
    """∂s/∂O of blocks whose tokens the classifier reads, for each target."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in calls}
    for place, logit in enumerate(chosen):
        retain = place < len(chosen) - 1
        upstream = _gradient(logit, early.together, "the last block", retain).chunk(len(calls))
        for (layer, call), of_layer in zip(calls.items(), upstream, strict=True):
            found[layer].append(_gradient(early.leaving[layer], call.output, f"`{call.module}`", retain, of_layer))
    return found


def _at_pool(chosen: Sequence[Tensor], pool: AttentionCall, layers: Sequence[int], count: int) -> dict[int, BlockLogit]:
    """The logits of blocks whose tokens an attention-pooling head reads, all in one call of K · B images."""
    found = [
        _gradient(logit, pool.output, f"`{pool.module}`", place < len(chosen) - 1).chunk(len(layers))
        for place, logit in enumerate(chosen)
    ]
    return {
        layer: BlockLogit(_part(pool, place * count, count), [of_target[place] for of_target in found])
        for place, layer in enumerate(layers)
    }


def _part(call: AttentionCall, start: int, count: int) -> AttentionCall:
    """The attention of `count` images of a call."""

    def attention(images: slice, heads: slice) -> Tensor:
        first, last, _ = images.indices(count)
        return call.attention(slice(start + first, start + last), heads)

    part = slice(start, start + count)
    return replace(
        call,
        output=call.output[part].detach(),
        value=call.value[part].detach(),
        attention=attention,
        shape=(count, *call.shape[1:]),
    )


def _gradient(of: Tensor, at: Tensor, where: str, retain: bool, upstream: Tensor | None = None) -> Tensor:
    """∂of/∂at, weighted by `upstream` where `of` is no scalar."""
    if of.requires_grad and at.requires_grad:
        (gradient,) = torch.autograd.grad(of, at, upstream, retain_graph=retain, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError(
        f"Expected gradients of a block's logit to reach {where}, but it is cut off from the logits. Take "
        "`detach()` out of the model's forward, or leave out the methods that need that logit, such as LeGrad."
    )
