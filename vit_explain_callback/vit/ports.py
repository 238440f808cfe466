"""Find by data flow where tokens enter and leave the blocks, and check that attention alone mixes them in between.

A rollout multiplies the attention of the blocks, each with the identity for its residual connection. That is the
model's own path of information only if every attention reads what the one before gave and what passed it by, if the
rows of each belong to the tokens in their order, and if no token reaches another past the recorded attention. All of
this is asked of the autograd graph of one pass, in which the output of each attention is a leaf.

Shapes: B images, H heads, N tokens, D channels, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.vit.sites import NO_ATTENTION_NEEDED, Site, Trace, Visit, leaf_of, reach, trace_of

SEEN = "`scaled_dot_product_attention`, `nn.MultiheadAttention` and a softmax times the values"


@dataclass(frozen=True)
class Ports:
    """Where tokens enter the first block and leave the last one.

    Attributes:
        entry: Everything that the blocks know of the image goes by here.
        exit: Everything that the logits know of the last attention goes by here.
        pooled: Whether they know it from an attention pool over these tokens alone.
    """

    entry: Site
    exit: Site
    pooled: bool = False


def find_ports(
    forward: Callable[[Tensor], Tensor],
    vit: nn.Module,
    places: Sequence[int],
    tokens: int,
    images: Tensor,
    state: Collection[int],
    pool: int | None = None,
) -> Ports | None:
    """Where tokens enter and leave a stack of blocks, whose attention is then known to be all that mixes them.

    Args:
        forward: Turns images into logits; gradients of these reach the images.
        vit: The module that was recorded.
        places: Of the blocks' attention among all that the recorder sees, in order.
        tokens: N.
        images: Two different ones, (2, C, H, W).
        state: As for the recorder.
        pool: Place of an attention pool's attention, if there is one.

    Returns:
        The places; None if the logits are detached from the last attention.

    Raises:
        ValueError: If there are no such places, or if tokens are mixed in another way.
    """
    with torch.enable_grad():
        return _ports(trace_of(forward, vit, places, tokens, images, state, pool), places)


def _ports(trace: Trace, places: Sequence[int]) -> Ports | None:
    leaves = [leaf_of(call.output) for call in trace.calls]
    reached = reach([trace.logits], None)
    of_pool = [trace.logits]
    pooled = trace.pool is not None and leaf_of(trace.pool.output) in reached and leaves[-1] not in reached
    if trace.pool is not None and leaf_of(trace.pool.output) in reached:
        of_pool.append(trace.pool.value.grad_fn)
    if leaves[-1] not in reach(of_pool, None):
        return None
    _check_chain(trace, leaves)
    exits = [visit for visit in _after(trace, places) if leaves[-1] not in reach(of_pool, visit.node)]
    if not exits:
        raise ValueError(
            f"Expected the classifier of {trace.name} to read the tokens that leave the last block, ({trace.images}, "
            f"{trace.tokens}, D), but what it reads of `{trace.calls[-1].module}` is never among tokens of that shape. "
            f"{NO_ATTENTION_NEEDED}"
        )
    ends = [exits[-1].tokens.grad_fn, *[call.value.grad_fn for call in trace.calls]]
    begins = [visit for visit in reversed(trace.visits) if visit.calls_before <= places[0]]
    entry = next((visit for visit in begins if not _begins(reach(ends, visit.node), leaves, trace)), None)
    if entry is None:
        raise ValueError(
            f"Expected all that the blocks of {trace.name} know of the image to enter the first one as {trace.tokens} "
            f"tokens, ({trace.images}, {trace.tokens}, D), but part of it reaches them past these. "
            f"{NO_ATTENTION_NEEDED}"
        )
    _check_values(trace, leaves, entry)
    if pooled:
        _check_pool(trace, entry)
    return Ports(entry.site, _last_unmixed(trace, entry, exits).site, pooled)


def _last_unmixed(trace: Trace, entry: Visit, exits: Sequence[Visit]) -> Visit:
    """The last place behind the blocks where the rows are still those of the tokens: pooling begins after it."""
    # Between modules first: after a norm, say, and not after the powers of a pooling that is no mean.
    ordered = sorted(exits, key=lambda visit: visit.site.kind == "operation")
    for exit_ in ordered:
        try:
            _check_exit(trace, entry, exit_)
        except ValueError:
            if exit_ is ordered[-1]:
                raise
        else:
            return exit_
    raise AssertionError


def _after(trace: Trace, places: Sequence[int]) -> Iterable[Visit]:
    return (visit for visit in reversed(trace.visits) if visit.calls_before > places[-1])


def _check_chain(trace: Trace, leaves: Sequence[Any]) -> None:
    """Refuse attention that does not read what the one before gave, as in two towers, or in two runs of one."""
    for layer in range(1, len(leaves)):
        if leaves[layer - 1] in reach([trace.calls[layer].value.grad_fn], None):
            continue
        before, after = trace.calls[layer - 1].module, trace.calls[layer].module
        paths = [call.module for call in trace.calls]
        outer, other, around = _apart(before, after)
        of_each = [sum(_within(path, one) for path in paths) for one in (outer, other)]
        again = after in paths[:layer]
        if outer != other and min(of_each) > 1 and not again:
            what = f"one stack of blocks in {trace.name}, but found {outer}, {other}"
            cure = f"Where it holds several models, name the one to explain, as in `vit={outer!r}`"
        else:
            block = after.rpartition(".")[0] if again else around
            captured = sum(_within(path, block) for path in paths)
            what = f"one attention operation in `{block}` of {trace.name}, but captured {captured}"
            cure = (
                "Where the model runs its blocks several times, say which run counts: "
                "`forward=lambda module, images: …`"
            )
        raise ValueError(
            f"Expected {what}: what attention {layer} gives, `{before}`, never reaches attention {layer + 1}, "
            f"`{after}`. {cure}."
        )


def _check_exit(trace: Trace, entry: Visit, exit_: Visit) -> None:
    streams = [entry.tokens, *[call.output for call in trace.calls]]
    for image, token in ((0, 0), *_sample(trace)):
        at = exit_.site.tokens(exit_.tokens)[image, token]
        _check_row(trace, at, streams, entry, (image, token), "the classifier reads")


def _check_values(trace: Trace, leaves: Sequence[Any], entry: Visit) -> None:
    """Refuse tokens that are mixed between two attentions, or whose rows in one are not theirs."""
    streams = [entry.tokens, *[call.output for call in trace.calls]]
    for layer, call in enumerate(trace.calls):
        if layer and not _passes(entry, call.value, leaves[:layer]):
            raise ValueError(
                f"Expected tokens of {trace.name} to pass each attention by a residual connection, but what "
                f"`{call.module}` reads does not depend on what came before attention {layer}: these are not tokens on "
                f"their way through blocks, as in a soft mixture's slots. {NO_ATTENTION_NEEDED}"
            )
        for image, token in _sample(trace):
            at = call.value[image, :, token]
            before = streams[max(0, layer - 1) : layer + 1]
            _check_row(trace, at, before, entry, (image, token), f"`{call.module}` reads")


def _check_pool(trace: Trace, entry: Visit) -> None:
    """Refuse a pool whose values are not those of the tokens, in their order, with the last of them at the end."""
    assert trace.pool is not None
    streams = [entry.tokens, *[call.output for call in trace.calls]]
    before = trace.tokens - trace.pool.shape[3]
    for image, token in _sample(trace):
        at = trace.pool.value[image, :, token - before]
        _check_row(trace, at, streams, entry, (image, token), f"`{trace.pool.module}` reads")


def _passes(entry: Visit, value: Tensor, leaves: Sequence[Any]) -> bool:
    """Whether values depend on what entered the block before, past its attention."""
    return (entry.node if len(leaves) == 1 else leaves[-2]) in reach([value.grad_fn], None)


def _check_row(
    trace: Trace, at: Tensor, streams: Sequence[Tensor], entry: Visit, place: tuple[int, int], reader: str
) -> None:
    """Refuse what is read of one token of one image if it depends on another in any of the streams."""
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(1)).to(at)
    found = torch.autograd.grad((at * direction).sum(), streams, retain_graph=True, allow_unused=True)
    image, token = place
    for stream, gradient in zip(streams, found, strict=True):
        if gradient is None:
            continue
        if stream is entry.tokens:
            rows = entry.site.tokens(gradient).abs().sum(dim=2)
        else:
            rows = gradient.reshape(trace.images, -1, trace.tokens, gradient.shape[-1]).abs().sum(dim=(1, 3))
        rows = rows.detach().clone()
        rows[image, token] = 0
        if rows.any():
            raise ValueError(
                f"Expected attention alone to mix the tokens of {trace.name}, row by row, but what {reader} of token "
                f"{token} depends on {int(rows.count_nonzero())} others past the attention that was seen. Only {SEEN} "
                "can be seen; what also mixes tokens is a convolution between blocks, `flex_attention` and the like, "
                f"and heads folded into the batch before the images. {NO_ATTENTION_NEEDED}"
            )


def _sample(trace: Trace) -> list[tuple[int, int]]:
    return [(1, trace.tokens - 1), (0, trace.tokens // 2)]


def _begins(reached: Collection[Any], leaves: Sequence[Any], trace: Trace) -> bool:
    """Whether a leaf of the graph is reached that is neither attention nor a parameter: the image."""
    ends = [node for node in reached if not node.next_functions and node not in leaves]
    return any(id(getattr(node, "variable", None)) not in trace.parameters for node in ends)


def _apart(one: str, other: str) -> tuple[str, str, str]:
    """The outermost modules in which two paths differ, and the one around both."""
    ones, others = one.split("."), other.split(".")
    same = next((place for place, (a, b) in enumerate(zip(ones, others, strict=False)) if a != b), None)
    same = min(len(ones), len(others)) if same is None else same
    return ".".join(ones[: same + 1]), ".".join(others[: same + 1]), ".".join(ones[:same])


def _within(path: str, outer: str) -> bool:
    return outer == "" or f"{path}.".startswith(f"{outer}.")
