"""One batch through the model: a forward pass, a backward pass for each target, and the maps folded from both.

Shapes: B images, C channels of the image or classes of the logits, N tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit_explain_callback._checks import check_layers, check_target
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.base import Method
from vit_explain_callback.methods.fold import Blocks, fold
from vit_explain_callback.metrics.attention import BlockMeter
from vit_explain_callback.vit.adapter import Subject
from vit_explain_callback.vit.capture import AttentionCall, AttentionRecorder
from vit_explain_callback.vit.stack import Stack, find_stack
from vit_explain_callback.vit.tokens import TokenLayout


@dataclass(frozen=True)
class _Forward:
    """What a forward pass gave.

    Attributes:
        images: (B, C, H, W), as the ViT was fed them.
        logits: (B, C), in the autograd graph if there is one.
        targets: Classes to explain, (B,) each.
        stack: The attention of the blocks.
    """

    images: Tensor
    logits: Tensor
    targets: list[Tensor]
    stack: Stack


def explain_batch(
    subject: Subject,
    images: Tensor,
    methods: Sequence[Method],
    wanted: Sequence[Tensor | None],
    block_statistics: bool,
) -> list[Explanation]:
    """Explain a batch, (B, C, H, W), for each wanted target, (B,), None for the predicted class.

    The model is in evaluation mode already. Methods that do not depend on the class are folded once for all targets.

    Raises:
        TypeError: If the model's output is of the wrong type.
        ValueError: If a target or `start_layer` is out of range, or if the model's attention cannot be rolled out.
    """
    with_gradients = any(method.needs_target for method in methods)
    forward = _forward(subject, images, methods, wanted, with_gradients)
    gradients = _gradients(forward)
    # After the backward pass: its memory is free again, and sharded parameters expect one for each forward pass.
    images, logits, targets, stack = images.detach(), forward.logits.detach(), forward.targets, forward.stack
    layout = subject.layout(stack, images)
    if layout.observed and layout.readout is not None and stack.pool is not None:
        stack = replace(stack, pool=None)  # no logit depends on it
        gradients = [of_target[:-1] for of_target in gradients]
    _check_tokens(stack, layout)
    if with_gradients:
        _check_reached(stack, gradients[0])
    meter = _meter(stack, layout, images) if block_statistics else None
    blocks = Blocks(stack, gradients)
    del forward, stack, gradients  # the iterator lets go of each block once nobody else holds it
    found = _maps(methods, blocks, layout, meter)
    found += found[:1] * (len(targets) - len(found))
    statistics = None if meter is None else meter.result()
    return [Explanation(maps, logits, target, statistics) for maps, target in zip(found, targets, strict=True)]


def _forward(
    subject: Subject,
    images: Tensor,
    methods: Sequence[Method],
    wanted: Sequence[Tensor | None],
    with_gradients: bool,
) -> _Forward:
    with (
        torch.set_grad_enabled(with_gradients),
        AttentionRecorder(subject.vit, with_gradients, subject.twin.state) as recorder,
        subject.fed(with_gradients) as fed,
    ):
        logits = subject.logits(images)
    stack = find_stack(subject.vit, recorder, len(images))
    images = fed[0] if fed else images
    check_layers(methods, len(stack.calls))
    predicted = logits.detach().argmax(dim=1)
    targets = [predicted if target is None else target.to(logits.device) for target in wanted]
    for target in targets:
        check_target(target, logits.shape[1])
    return _Forward(images, logits, targets, stack)


def _gradients(forward: _Forward) -> list[list[Tensor | None]]:
    """∂y_c/∂O of each block and then of the pool for each target, None where y_c does not depend on it.

    Without a graph, of one target alone: the maps are the same for all.
    """
    outputs = [call.output for call in _with_pool(forward.stack)]
    attached = [index for index, output in enumerate(outputs) if output.requires_grad]
    gradients: list[list[Tensor | None]] = [[None] * len(outputs) for _ in forward.targets]
    if not forward.logits.requires_grad or not attached:
        return gradients[:1]
    # Images do not mix in evaluation mode, so one pass serves the whole batch.
    with torch.enable_grad():
        chosen = [forward.logits.gather(1, target[:, None]).sum() for target in forward.targets]
    for place, logit in enumerate(chosen):
        found = torch.autograd.grad(
            logit,
            [outputs[index] for index in attached],
            retain_graph=place < len(chosen) - 1,
            allow_unused=True,
        )
        for index, gradient in zip(attached, found, strict=True):
            gradients[place][index] = gradient
    return gradients


def _maps(
    methods: Sequence[Method], blocks: Blocks, layout: TokenLayout, meter: BlockMeter | None
) -> list[dict[str, Tensor]]:
    """Maps (B, grid_h, grid_w) by name for each target that there are gradients of."""
    with torch.no_grad():
        folded = fold(methods, blocks, layout, meter)
    return [{method.name: layout.to_grid(row) for method, row in rows.items()} for rows in folded]


def _meter(stack: Stack, layout: TokenLayout, images: Tensor) -> BlockMeter:
    like = images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[2:]
    return BlockMeter(layout, (height, width), len(images), [call.shape[1] for call in stack.calls], like)


def _check_tokens(stack: Stack, layout: TokenLayout) -> None:
    patches = layout.grid[0] * layout.grid[1]
    if stack.tokens != layout.tokens:
        raise ValueError(
            f"Expected `{stack.calls[0].module}` to attend over all {layout.tokens} tokens ({layout.tokens - patches} "
            f"prefix + {layout.grid[0]}x{layout.grid[1]} patches), but its attention is {stack.tokens}x{stack.tokens}: "
            "there is no global attention to roll out."
        )
    if (stack.pool is None) == (layout.readout is None) or (
        stack.pool is not None and stack.pool.shape[3] not in (layout.tokens, patches)
    ):
        seen = "none" if stack.pool is None else f"`{stack.pool.module}` with {stack.pool.shape[3]} keys"
        raise ValueError(
            f"Expected {'an' if layout.readout is None else 'no'} attention-pooling head over the tokens after the "
            f"blocks, but saw {seen}."
        )


def _with_pool(stack: Stack) -> list[AttentionCall]:
    return stack.calls if stack.pool is None else [*stack.calls, stack.pool]


def _check_reached(stack: Stack, gradients: Sequence[Tensor | None]) -> None:
    for call, gradient in zip(_with_pool(stack), gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"Expected gradients to reach `{call.module}`, but its output is cut off from the logits. Take "
                "`detach()` out of the model's forward (freeze parameters with `requires_grad` instead), or leave out "
                "gradient rollout."
            )
