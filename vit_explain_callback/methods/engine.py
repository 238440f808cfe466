"""Carry relevance through the attention of a stack, from the last block to the first, for any number of methods.

Shapes: B images, b of them at a time, H heads, h at a time, N query tokens, n at a time, M key tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vit_explain_callback.methods.base import Block, Method
from vit_explain_callback.methods.heads import Fusion, HeadFuser
from vit_explain_callback.metrics.attention import BlockMeter
from vit_explain_callback.vit.block_logits import BlockLogit
from vit_explain_callback.vit.blocks import Stack
from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.tokens import TokenLayout

# Attention entries alive at once, and as many again for their gradients. On a CPU they fit into its cache, but are at
# least those of one head, as fewer rows at a time only slow it down; elsewhere they take 128 MiB in float32.
CHUNK_ENTRIES = 2**20
ACCELERATOR_CHUNK_ENTRIES = 2**25
# A head with more entries than this, 8 MiB in float32, is computed a few query rows at a time.
HEAD_ENTRIES = 2**21


Show: TypeAlias = Callable[[slice, slice, Tensor], None]
"""Called with some heads and queries and their attention, (b, h, n, M)."""
Request: TypeAlias = tuple[Fusion, int]
"""A matrix that a method needs of each block: how it is fused, and the place of the target among all."""


@dataclass(frozen=True)
class Recorded:
    """The attention of a block or of a pooling head.

    Attributes:
        call: The attention.
        gradients: For each target, ∂y/∂O of its output, None where no method asks for it.
        logit: The block's own logit; None where no method asks for it.
    """

    call: AttentionCall
    gradients: Sequence[Tensor | None]
    logit: BlockLogit | None


class Blocks(Iterator[tuple[int, Recorded]]):
    """Yields the blocks of a stack with their numbers, the last block first, and drops its reference to each.

    Their memory is freed only if nothing else refers to the stack and the gradients.

    Args:
        stack: The blocks' attention, and that of an attention pool.
        gradients: For each target, ∂y/∂O of each block's attention output, and of the pool's if there is one; None
            where no method needs them.
        logits: The logits of some blocks by their numbers.

    Attributes:
        count: L.
        targets: Number of targets, at least 1.
        images: B.
        pool: The attention pool, or None.
        chunks: The images to take at once.
        like: An empty tensor with the device and dtype of the attention.
    """

    def __init__(
        self, stack: Stack, gradients: Sequence[Sequence[Tensor | None]], logits: Mapping[int, BlockLogit]
    ) -> None:
        calls = stack.calls if stack.pool is None else [*stack.calls, stack.pool]
        by_call = zip(calls, zip(*gradients, strict=True), strict=True)
        recorded = [
            Recorded(call, of_call, logits.get(layer)) for layer, (call, of_call) in enumerate(by_call, start=1)
        ]
        self.pool = None if stack.pool is None else recorded.pop()
        self.count = len(recorded)
        self.targets = len(gradients)
        last = stack.calls[-1]
        self.images = last.shape[0]
        heads = max(call.shape[1] for call in stack.calls)
        self.chunks = _parts(self.images, _chunk_entries(last) // (heads * stack.tokens**2))
        self.like = last.attention(slice(0, 1), slice(0, 1), slice(0, 1)).new_empty(0)
        self._left = recorded

    def __next__(self) -> tuple[int, Recorded]:
        if not self._left:
            raise StopIteration
        return len(self._left), self._left.pop()


class _Run:
    """A method on its way through the blocks, for one target.

    Args:
        method: The method.
        target: Place of the target among all.
        blocks: The attention of the stack.
        layout: The tokens.
    """

    def __init__(self, method: Method, target: int, blocks: Blocks, layout: TokenLayout) -> None:
        self.method = method
        self.target = target
        self.layers = method.layers(blocks.count)
        self._layout = layout
        readout, pool = self._read(blocks)
        self._readouts = [readout[images] for images in blocks.chunks]
        self._states: list[Any] = [
            method.start(readout[images], None if pool is None else pool[images]) for images in blocks.chunks
        ]

    def step(self, layer: int, chunk: int, fused: Tensor) -> None:
        """Take in a block's matrix, (b, N, N), or the pooling head's (b, Q, M), of a chunk of images."""
        block = Block(layer, self._to_tokens(fused), self._readouts[chunk], self._layout.class_token)
        self._states[chunk] = self.method.step(self._states[chunk], block)

    def result(self) -> Tensor:
        """(B, N) relevance after the last block."""
        finished = zip(self._states, self._readouts, strict=True)
        return torch.cat([self.method.finish(state, readout, self._layout) for state, readout in finished])

    def _read(self, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        """What the classifier reads of each token, (B, N), and the pooling head's own row, (B, N), or None."""
        if blocks.pool is None:
            assert self._layout.readout is not None
            return self._layout.readout.to(blocks.like).repeat(blocks.images, 1), None
        fusions = {self.method.fusion, self.method.pool_fusion}
        # The pool has no logit of a block, nor the head of a block that a method names.
        of_pool = [fusion for fusion in fusions if fusion.of != "block_gradient" and fusion.head is None]
        requests = {(fusion, self.target) for fusion in of_pool}
        fused = _fuse(blocks.pool, slice(None), None, requests)
        rows = {fusion: self._to_tokens(matrix.mean(dim=1)) for (fusion, _), matrix in fused.items()}
        read = rows[self.method.pool_fusion]
        return read / read.sum(dim=1, keepdim=True), rows.get(self.method.fusion)

    def _to_tokens(self, matrix: Tensor) -> Tensor:
        """Columns for all tokens, (…, N), where there are only those of the patches."""
        if matrix.shape[-1] == self._layout.tokens:
            return matrix
        wide = matrix.new_zeros(*matrix.shape[:-1], self._layout.tokens)
        wide[..., self._layout.patches] = matrix
        return wide


def fold(
    methods: Sequence[Method], blocks: Blocks, layout: TokenLayout, meter: BlockMeter | None = None
) -> list[dict[Method, Tensor]]:
    """Relevance of every token by method, (B, N), for each target; of the patches only for attention flow.

    Args:
        methods: Any number of variants. Those that need the same matrix share it, and targets share the methods that
            depend on none.
        blocks: The attention of the stack; it is used up.
        layout: The tokens.
        meter: Takes in every block's attention on the way.

    Raises:
        ValueError: If an option of a method names a block that the model does not have.
    """
    of_target = [method for method in methods if method.needs_target]
    runs = [
        _Run(method, target, blocks, layout)
        for target in range(blocks.targets)
        for method in (methods if target == 0 else of_target)
    ]
    for layer, block in blocks:
        active = [run for run in runs if layer in run.layers]
        if not active and meter is None:
            continue
        for place, images in enumerate(blocks.chunks):
            show = None if meter is None else partial(meter.add, layer - 1, images)
            for run, fused in _fused(block, images, show, active).items():
                run.step(layer, place, fused)
    rows = {(run.method, run.target): run.result() for run in runs}
    return [
        {method: rows[method, target if method.needs_target else 0] for method in methods}
        for target in range(blocks.targets)
    ]


def _fused(block: Recorded, images: slice, show: Show | None, runs: Collection[_Run]) -> dict[_Run, Tensor]:
    """The matrix (b, N, M) that each run needs, of some images; runs that need the same one share a tensor."""
    requests = {run: (run.method.fusion, run.target) for run in runs}
    of_logit = {key for key in requests.values() if key[0].of == "block_gradient"}
    fused = _fuse(block, images, show, set(requests.values()) - of_logit)
    if of_logit:
        assert block.logit is not None
        fused |= _fuse(Recorded(block.logit.call, block.logit.gradients, None), images, None, of_logit)
    return {run: fused[key] for run, key in requests.items()}


def _fuse(block: Recorded, images: slice, show: Show | None, requests: Collection[Request]) -> dict[Request, Tensor]:
    """The requested matrices (b, N, M) of some images, computed a few query rows at a time where heads are large."""
    _, heads, queries, keys = block.call.shape
    rows = _parts(queries, HEAD_ENTRIES // keys)
    step = _chunk_entries(block.call) // ((rows[0].stop - rows[0].start) * keys)
    if len(rows) == 1:
        return _fuse_rows(block, images, _parts(heads, step), rows[0], show, requests)
    fused: dict[Request, Tensor] = {}
    for part in rows:
        for key, row_part in _fuse_rows(block, images, _parts(heads, step), part, show, requests).items():
            whole = fused.setdefault(key, row_part.new_empty(row_part.shape[0], queries, keys))
            whole[:, part] = row_part
    return fused


def _fuse_rows(
    block: Recorded,
    images: slice,
    heads: Sequence[slice],
    queries: slice,
    show: Show | None,
    requests: Collection[Request],
) -> dict[Request, Tensor]:
    """Some query rows of the requested matrices, (b, n, M), computed a few heads at a time."""
    fusers = {key: HeadFuser(key[0].head_fusion) for key in requests}
    sources = sorted({(fusion.of, target) for fusion, target in requests})
    for few in heads:
        for source, matrix in _matrices(block, (images, few, queries), show, sources):
            for (fusion, target), fuser in fusers.items():
                if (fusion.of, target) != source or not _takes(fusion, few.start, matrix.shape[1]):
                    continue
                part = matrix if fusion.head is None else matrix[:, fusion.head - 1 - few.start][:, None]
                fuser.add(part.clamp(min=0) if fusion.positive == "before" else part)
    results = {key: fuser.result() for key, fuser in fusers.items()}
    return {key: result.relu_() if key[0].positive == "after" else result for key, result in results.items()}


def _parts(count: int, step: int) -> list[slice]:
    """Slices of at most `step`, at least 1, that cover `count`."""
    step = max(1, step)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _matrices(
    block: Recorded, part: tuple[slice, slice, slice], show: Show | None, sources: Sequence[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Each of `sources`, A, A ⊙ ∂y/∂A or ∂s/∂A, of some images, heads and queries, (b, h, n, M), with the source.

    Attention is computed only where it is needed: ∂s/∂A, which is never requested together with others, needs none.
    """
    attention = None
    if show is not None or any(of != "block_gradient" for of, _ in sources):
        attention = block.call.attention(*part)
    if show is not None and attention is not None:
        show(*part[1:], attention)
    for of, target in sources:
        if of == "attention":
            assert attention is not None
            yield (of, target), attention
            continue
        gradient = block.gradients[target]
        assert gradient is not None
        matrix = block.call.attention_gradient(gradient, *part)
        yield (of, target), matrix if attention is None else matrix.mul_(attention)


def _takes(fusion: Fusion, first: int, count: int) -> bool:
    """Whether a fusion reads any of the `count` heads that follow the first `first`."""
    return fusion.head is None or first < fusion.head <= first + count


def _chunk_entries(call: AttentionCall) -> int:
    return CHUNK_ENTRIES if call.value.device.type == "cpu" else ACCELERATOR_CHUNK_ENTRIES
