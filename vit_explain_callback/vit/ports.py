"""Find by data flow where tokens enter and leave the blocks, and check that only attention mixes them in between.

A rollout multiplies the attention of the blocks, each with the identity for its residual connection. That is the
model's own path of information only if every attention reads the output of the one before and the residual stream, if
the rows of each belong to the tokens in their order, and if no token reaches another except through the recorded
attention. The autograd graph of one pass, in which the output of each attention is a leaf, answers all of this.

Shapes: B images, H heads, N tokens, D channels, d head width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_explain_callback.vit.sites import NO_ATTENTION_NEEDED, Site, Trace, Visit, leaf_of, reach

SEEN = "`scaled_dot_product_attention`, `nn.MultiheadAttention` and a softmax times the values"


@dataclass(frozen=True)
class Ports:
    """Where tokens enter the first block and leave the last one.

    Attributes:
        entry: Everything that the blocks read of the image passes here.
        exit: Everything that the logits read of the last attention passes here.
        pooled: Whether the logits read it through an attention pool over these tokens only.
    """

    entry: Site
    exit: Site
    pooled: bool = False


def find_ports(trace: Trace, places: Sequence[int]) -> Ports | None:
    """Find where tokens enter and leave a stack of blocks, and check that only its attention mixes them.

    Gradients have to be enabled.

    Args:
        trace: A pass over two different images.
        places: Indices of the blocks' attention among all recorded calls, in order.

    Returns:
        The ports; None if the logits are detached from the last attention.

    Raises:
        ValueError: If there are no such places, or if anything else mixes tokens.
    """
    attention = [leaf_of(call.output) for call in trace.calls]
    before_logits = reach([trace.logits], None)
    pool = trace.pool if trace.pool is not None and leaf_of(trace.pool.output) in before_logits else None
    # The graph is cut at the output of a pool: what it pools is read as well.
    readers = [trace.logits] if pool is None else [trace.logits, pool.value.grad_fn]
    if attention[-1] not in reach(readers, None):
        return None
    _check_chain(trace, attention)
    exits = _exits(trace, places, attention[-1], readers)
    entry = _entry(trace, places, attention, exits[-1])
    _check_values(trace, attention, entry)
    only_pooled = pool is not None and attention[-1] not in before_logits
    if only_pooled:
        _check_pool(trace, entry)
    return Ports(entry.site, _last_unmixed(trace, entry, exits).site, only_pooled)


def _exits(trace: Trace, places: Sequence[int], last_attention: Any, readers: Sequence[Any]) -> list[Visit]:
    """Visits that everything read of the last attention passes, the latest first."""
    behind = [visit for visit in reversed(trace.visits) if visit.calls_before > places[-1]]
    exits = [visit for visit in behind if last_attention not in reach(readers, visit.node)]
    if not exits:
        raise ValueError(
            f"Expected the classifier of {trace.name} to read the tokens that leave the last block, ({trace.images}, "
            f"{trace.tokens}, D), but what it reads of `{trace.calls[-1].module}` is never among tokens of that shape. "
            f"{NO_ATTENTION_NEEDED}"
        )
    return exits


def _entry(trace: Trace, places: Sequence[int], attention: Sequence[Any], earliest_exit: Visit) -> Visit:
    """The latest visit before the first attention that everything passes which the blocks read of the image."""
    readers = [earliest_exit.tokens.grad_fn, *[call.value.grad_fn for call in trace.calls]]
    for visit in reversed(trace.visits):
        if visit.calls_before <= places[0] and not _holds_image(reach(readers, visit.node), attention, trace):
            return visit
    raise ValueError(
        f"Expected everything that the blocks of {trace.name} read of the image to enter the first one as "
        f"{trace.tokens} tokens, ({trace.images}, {trace.tokens}, D), but part of it bypasses them. "
        f"{NO_ATTENTION_NEEDED}"
    )


def _last_unmixed(trace: Trace, entry: Visit, exits: Sequence[Visit]) -> Visit:
    """The last place behind the blocks where rows still belong to tokens: pooling begins after it."""
    # Between modules first: after a norm, for instance, and not after the powers in a generalised-mean pooling.
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


def _check_chain(trace: Trace, attention: Sequence[Any]) -> None:
    """Refuse attention that does not read what the one before gave, as in two towers or two runs of one."""
    for layer in range(1, len(attention)):
        if attention[layer - 1] not in reach([trace.calls[layer].value.grad_fn], None):
            raise _broken_chain(trace, layer)


def _broken_chain(trace: Trace, layer: int) -> ValueError:
    """The error for a model in which attention `layer` never reaches the next."""
    paths = [call.module for call in trace.calls]
    before, after = paths[layer - 1], paths[layer]
    tower, other_tower, parent = _diverging(before, after)
    sizes = [sum(_within(path, outer) for path in paths) for outer in (tower, other_tower)]
    runs_again = after in paths[:layer]
    if tower != other_tower and min(sizes) > 1 and not runs_again:
        expected = f"one stack of blocks in {trace.name}, but found {tower}, {other_tower}"
        cure = f"If it holds several models, name the one to explain, as in `vit={tower!r}`"
    else:
        block = after.rpartition(".")[0] if runs_again else parent
        captured = sum(_within(path, block) for path in paths)
        expected = f"one attention operation in `{block}` of {trace.name}, but captured {captured}"
        cure = "If the model runs its blocks several times, say which run counts: `forward=lambda module, images: …`"
    return ValueError(
        f"Expected {expected}: the output of attention {layer}, `{before}`, never reaches attention {layer + 1}, "
        f"`{after}`. {cure}."
    )


def _check_exit(trace: Trace, entry: Visit, exit_: Visit) -> None:
    streams = [entry.tokens, *[call.output for call in trace.calls]]
    for image, token in ((0, 0), *_sample(trace)):
        at = exit_.site.tokens(exit_.tokens)[image, token]
        _check_row(trace, at, streams, entry, (image, token), "the classifier reads")


def _check_values(trace: Trace, attention: Sequence[Any], entry: Visit) -> None:
    """Refuse tokens that are mixed between two attentions, or that attention reads in another order."""
    streams = [entry.tokens, *[call.output for call in trace.calls]]
    for layer, call in enumerate(trace.calls):
        if layer and not _has_residual(entry, call.value, attention[:layer]):
            raise ValueError(
                f"Expected a residual connection around each attention of {trace.name}, but what `{call.module}` reads "
                f"does not depend on what came before attention {layer}: these are not tokens that pass through "
                f"blocks, but the slots of a soft mixture, for instance. {NO_ATTENTION_NEEDED}"
            )
        for image, token in _sample(trace):
            at = call.value[image, :, token]
            before = streams[max(0, layer - 1) : layer + 1]
            _check_row(trace, at, before, entry, (image, token), f"`{call.module}` reads")


def _check_pool(trace: Trace, entry: Visit) -> None:
    """Refuse a pool whose values are not those of the last tokens, in their order."""
    assert trace.pool is not None
    streams = [entry.tokens, *[call.output for call in trace.calls]]
    before = trace.tokens - trace.pool.shape[3]
    for image, token in _sample(trace):
        at = trace.pool.value[image, :, token - before]
        _check_row(trace, at, streams, entry, (image, token), f"`{trace.pool.module}` reads")


def _has_residual(entry: Visit, value: Tensor, attention: Sequence[Any]) -> bool:
    """Whether values depend on what entered the block before them other than through its attention."""
    return (entry.node if len(attention) == 1 else attention[-2]) in reach([value.grad_fn], None)


def _check_row(
    trace: Trace, at: Tensor, streams: Sequence[Tensor], entry: Visit, place: tuple[int, int], reader: str
) -> None:
    """Refuse a row, read of one token of one image, that depends on another token in any of the streams."""
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(1)).to(at)
    gradients = torch.autograd.grad((at * direction).sum(), streams, retain_graph=True, allow_unused=True)
    image, token = place
    for stream, gradient in zip(streams, gradients, strict=True):
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
                f"{token} depends on {int(rows.count_nonzero())} other tokens without passing any recorded attention. "
                f"Only {SEEN} can be recorded; `flex_attention`, a convolution between blocks, or heads folded into "
                f"the batch before the images also mix tokens. {NO_ATTENTION_NEEDED}"
            )


def _sample(trace: Trace) -> list[tuple[int, int]]:
    return [(1, trace.tokens - 1), (0, trace.tokens // 2)]


def _holds_image(nodes: Collection[Any], attention: Sequence[Any], trace: Trace) -> bool:
    """Whether one of these nodes is a leaf that is neither attention nor a parameter: the image."""
    leaves = [node for node in nodes if not node.next_functions and node not in attention]
    return any(id(getattr(node, "variable", None)) not in trace.parameters for node in leaves)


def _diverging(one: str, other: str) -> tuple[str, str, str]:
    """The outermost modules in which two paths differ, and the module around both."""
    ones, others = one.split("."), other.split(".")
    same = next((place for place, (a, b) in enumerate(zip(ones, others, strict=False)) if a != b), None)
    same = min(len(ones), len(others)) if same is None else same
    return ".".join(ones[: same + 1]), ".".join(others[: same + 1]), ".".join(ones[:same])


def _within(path: str, outer: str) -> bool:
    return outer == "" or f"{path}.".startswith(f"{outer}.")
