"""Turn the attention of a stack into one row of relevance for each method.

Rollouts are folded from the last block to the first; attention flow needs all blocks of an image at once.

Shapes: B images, b of them at a time, H heads, N query tokens, M key tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Method
from vit_explain_callback.methods.flow import maximum_flow, row_normalised
from vit_explain_callback.methods.rollout import HeadFuser, discard_lowest, rollout_step
from vit_explain_callback.metrics.attention import BlockMeter
from vit_explain_callback.vit.capture import AttentionCall
from vit_explain_callback.vit.stack import Stack
from vit_explain_callback.vit.tokens import TokenLayout

# Attention entries alive at once, and as many again for their gradients, but at least those of one head: on a CPU few
# enough to stay in its cache, elsewhere 128 MiB in float32.
CHUNK_ENTRIES = 2**18
ACCELERATOR_CHUNK_ENTRIES = 2**25


def fold(
    methods: Sequence[Method],
    stack: Stack,
    gradients: list[Tensor | None],
    layout: TokenLayout,
    meter: BlockMeter | None = None,
) -> dict[Method, Tensor]:
    """Relevance of every token by method, (B, N); of the patches only for attention flow, NaN elsewhere.

    Args:
        methods: Any number of variants; those that fuse heads alike share the work.
        stack: The blocks' attention, and that of an attention pool.
        gradients: ∂y/∂O of each block's attention output, and of the pool's if there is one; None where no method
            needs them. Like the calls of `stack`, it is emptied on the way, so that a block's tensors are let go once
            it is done.
        layout: The tokens.
        meter: Shown every block's attention on the way.
    """
    pool_gradient = gradients.pop() if stack.pool is not None else None
    last = stack.calls[-1]
    rows = {method: _start_row(method, layout, last, stack.pool, pool_gradient) for method in methods}
    del last
    flows = {method: _flow(method, rows.pop(method), stack, layout) for method in methods if method.kind == "flow"}
    _fold(rows, stack.calls, gradients, layout.class_token, meter)
    found = rows | flows
    return {method: found[method] for method in methods}


def _start_row(
    method: Method, layout: TokenLayout, last: AttentionCall, pool: AttentionCall | None, gradient: Tensor | None
) -> Tensor:
    """(B, N) relevance of the last block's output tokens."""
    example = last.attention(slice(0, 1), slice(0, 1))
    if pool is None:
        assert layout.readout is not None
        return layout.readout.to(example).repeat(last.shape[0], 1)
    fused = _fused(pool, gradient, slice(None), {method})[method].mean(dim=1)
    row = fused.new_zeros(fused.shape[0], layout.tokens)
    row[:, layout.patches if fused.shape[1] < layout.tokens else slice(None)] = fused / fused.sum(dim=1, keepdim=True)
    return row


def _flow(method: Method, row: Tensor, stack: Stack, layout: TokenLayout) -> Tensor:
    """(B, N) maximum flow from `row` (B, N) to the patches."""
    found = torch.full_like(row, torch.nan)
    sinks = range(*layout.patches.indices(layout.tokens))
    for index in range(len(row)):
        image = slice(index, index + 1)
        matrices = []
        for call in stack.calls[method.start_layer - 1 :]:
            fused = _fused(call, None, image, {method})[method]
            matrices.append(row_normalised(discard_lowest(fused, method.discard_ratio, layout.class_token))[0])
        found[index, layout.patches] = maximum_flow(matrices, row[index], sinks).values.to(row)
    return found


def _fold(
    rows: dict[Method, Tensor],
    calls: list[AttentionCall],
    gradients: list[Tensor | None],
    class_token: int | None,
    meter: BlockMeter | None,
) -> None:
    """Carry `rows` (B, N) from the last block to the first, in place; a block's tensors are let go once it is done."""
    while calls:
        layer = len(calls)
        call, gradient = calls.pop(), gradients.pop()
        active = {method for method in rows if method.start_layer <= layer}
        if not active and meter is None:
            continue
        batch, heads, tokens, _ = call.shape
        step = max(1, _chunk_entries(call) // (heads * tokens * tokens))
        for start in range(0, batch, step):
            images = slice(start, min(start + step, batch))
            show = None if meter is None else partial(meter.add, layer - 1, images)
            for method, fused in _fused(call, gradient, images, active, show).items():
                kept = discard_lowest(fused, method.discard_ratio, class_token)
                rows[method][images] = rollout_step(rows[method][images], kept)


def _fused(
    call: AttentionCall,
    gradient: Tensor | None,
    images: slice,
    methods: set[Method],
    show: Callable[[Tensor], None] | None = None,
) -> dict[Method, Tensor]:
    """F of some images for each method, (b, N, M); methods that differ only later share one tensor."""
    fusers = {(method.weighted, method.head_fusion): HeadFuser(method.head_fusion) for method in methods}
    _, heads, queries, keys = call.shape
    step = max(1, _chunk_entries(call) // (queries * keys))
    for start in range(0, heads, step):
        chunk = slice(start, min(start + step, heads))
        attention = call.attention(images, chunk)
        if show is not None:
            show(attention)
        for (weighted, _), fuser in fusers.items():
            if not weighted:
                fuser.add(attention)
        if any(weighted for weighted, _ in fusers):
            assert gradient is not None
            product = call.attention_gradient(gradient, images, chunk).mul_(attention)
            for (weighted, _), fuser in fusers.items():
                if weighted:
                    fuser.add(product)
    fused = {
        (weighted, fusion): fuser.result().relu_() if weighted else fuser.result()
        for (weighted, fusion), fuser in fusers.items()
    }
    return {method: fused[method.weighted, method.head_fusion] for method in methods}


def _chunk_entries(call: AttentionCall) -> int:
    return CHUNK_ENTRIES if call.value.device.type == "cpu" else ACCELERATOR_CHUNK_ENTRIES
