"""One pass of a model with the outputs of its attention as leaves of the graph, and the tokens that go by in it.

Shapes: B images, H heads, N tokens, D channels, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.capture import AttentionRecorder
from vit_explain_callback.vit.sites import Site, SiteVisitor

NO_ATTENTION_NEEDED = "Explain it with a method that needs no attention: `MapFunction`."


@dataclass(frozen=True)
class Visit:
    """Tokens that went by.

    Attributes:
        site: Where.
        tokens: As they came, in the graph.
        node: The node that leads on from them.
        calls_before: How many attentions had run.
    """

    site: Site
    tokens: Tensor
    node: Any
    calls_before: int


@dataclass(frozen=True)
class Trace:
    """What one pass was seen to do.

    Attributes:
        name: Class of the model.
        calls: The blocks' attention, (2, H, N, N); outputs are leaves, and values are in the graph.
        pool: That of a pool, likewise, or None.
        visits: Tokens that went by, in order.
        logits: The node that gave the logits.
        images: B.
        tokens: N.
        parameters: `id` of each parameter.
    """

    name: str
    calls: Sequence[AttentionCall]
    pool: AttentionCall | None
    visits: Sequence[Visit]
    logits: Any
    images: int
    tokens: int
    parameters: Collection[int]


def trace_of(
    forward: Callable[[Tensor], Tensor],
    vit: nn.Module,
    places: Sequence[int],
    tokens: int,
    images: Tensor,
    state: Collection[int],
    pool: int | None,
) -> Trace:
    """Run the model once with the outputs of its attention as leaves of the graph."""
    visits: list[Visit] = []

    def visit(site: Site, given: Tensor) -> Tensor:
        shape = (tuple(given.shape[:2]), (len(images), tokens))
        if given.ndim != 3 or sorted(shape[0]) != sorted(shape[1]):
            return given
        if not given.requires_grad and not images.is_floating_point():  # the graph begins here
            given = given.detach().requires_grad_()
        if not given.requires_grad:
            return given
        site = replace(site, batch_first=shape[0] == shape[1])
        on = given.clone()  # one node for each place, and safe from what is written in place later
        visits.append(Visit(site, given, on.grad_fn, len(recorder.calls)))
        return on

    recorder = AttentionRecorder(vit, True, state, cut={*places, *([] if pool is None else [pool])})
    try:
        with recorder, SiteVisitor(vit, visit) as visitor:
            logits = forward(images)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected {type(vit).__name__} to run with gradients, which tell whether attention alone mixes its "
            f"tokens, but it does not: {error} {NO_ATTENTION_NEEDED}"
        ) from error
    last = max(places[-1], pool or 0)
    if len(recorder.calls) <= last:
        raise ValueError(
            f"Expected {type(vit).__name__} to run the same attention in every pass, but it ran {last + 1} "
            f"operations in one and {len(recorder.calls)} in another."
        )
    counted = [replace(v, site=replace(v.site, calls=visitor.calls.get(v.site.module, 1))) for v in visits]
    calls = [_with_heads(recorder.calls[place], len(images), tokens) for place in places]
    parameters = {id(parameter) for parameter in vit.parameters()}
    of_pool = None if pool is None else recorder.calls[pool]
    return Trace(type(vit).__name__, calls, of_pool, counted, logits.grad_fn, len(images), tokens, parameters)


def _with_heads(call: AttentionCall, images: int, tokens: int) -> AttentionCall:
    folded = call.shape[0] != images and call.shape[1] == 1 and call.shape[0] % images == 0
    call = call.with_heads(images) if folded else call
    if call.shape[0] != images or call.shape[2:] != (tokens, tokens):
        raise ValueError(
            f"Expected `{call.module}` to attend over all {tokens} tokens of each of {images} images, but its "
            f"attention is (B, H, N, N) = {call.shape}."
        )
    return call


def leaf_of(output: Tensor) -> Any:
    """The node of the graph that stands for a leaf."""
    return output.view_as(output).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def reach(roots: Iterable[Any], stop: Any) -> set[Any]:
    """Nodes of the graph that lead to `roots`, found without passing `stop`."""
    reached: set[Any] = set()
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node in reached or node is stop:
            continue
        reached.add(node)
        waiting.extend(before for before, _ in node.next_functions if before is not None)
    return reached
