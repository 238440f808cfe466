"""Locate, change and trace the tokens in a forward pass, module by module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vit_explain_callback.vit.calls import AttentionCall
from vit_explain_callback.vit.recorder import AttentionRecorder


@dataclass(frozen=True)
class Site:
    """A place in a forward pass where a tensor passes.

    Attributes:
        module: Path of the module; None for an operation outside every module.
        call: Index of the call among the module's calls in a forward pass.
        calls: Number of the module's calls in a forward pass.
        kind: "input" or "output" of the module, or "operation" in its forward.
        key: Position or name of the input, position of the output, or index of the operation among those with a
            three-dimensional result.
        batch_first: Whether the tokens are (B, N, D) there, and not (N, B, D).
    """

    module: str | None
    call: int
    calls: int
    kind: str
    key: int | str
    batch_first: bool = True

    def tokens(self, tensor: Tensor) -> Tensor:
        """Convert between the layout at this site and (B, N, D), in either direction."""
        return tensor if self.batch_first else tensor.transpose(0, 1)


class SiteVisitor(TorchFunctionMode):
    """Context manager that passes every tensor in a module to a function, which may replace it.

    Enter it after other function modes, so that it counts the operations of the model and not theirs.

    Args:
        module: The module; sites are named relative to it.
        visit: Receives a site, whose `calls` is 0, and the tensor; returns the tensor that the model continues with.
    """

    visiting: ClassVar[bool] = False  # whether what runs is a `visit`, of any visitor, and not the model

    def __init__(self, module: nn.Module, visit: Callable[[Site, Tensor], Tensor]) -> None:
        super().__init__()
        self._names = {child: name for name, child in module.named_modules()}
        self._visit = visit
        self._running: list[tuple[str | None, int]] = [(None, 0)]
        self._operations = [0]
        self._handles: list[RemovableHandle] = []
        self.calls: dict[str | None, int] = {}

    def __enter__(self) -> SiteVisitor:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._enter_module, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave_module))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if SiteVisitor.visiting or not isinstance(output, Tensor) or output.ndim != 3:
            return output  # not counted, as operations on images differ between passes
        self._operations[-1] += 1
        return self._shown("operation", self._operations[-1], output)

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._names[module]
        self._running.append((name, self.calls.get(name, 0)))
        self._operations.append(0)
        self.calls[name] = self.calls.get(name, 0) + 1
        inputs = tuple(self._shown("input", place, part) for place, part in enumerate(args))
        return inputs, {key: self._shown("input", key, part) for key, part in kwargs.items()}

    def _leave_module(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple) and type(output) is tuple:
            output = tuple(self._shown("output", place, part) for place, part in enumerate(output))
        else:
            output = self._shown("output", 0, output)
        self._running.pop()
        self._operations.pop()
        return output

    def _shown(self, kind: str, key: int | str, part: Any) -> Any:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            return part
        name, call = self._running[-1]
        SiteVisitor.visiting = True
        try:
            return self._visit(Site(name, call, 0, kind, key), part)
        finally:
            SiteVisitor.visiting = False


@contextmanager
def changing(module: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the tokens at a site of a module by `change` of them, (B, N, D).

    Raises:
        ValueError: If no tokens passed there.
    """
    reached, place = False, (site.module, site.kind, site.key, site.call)

    def visit(here: Site, tensor: Tensor) -> Tensor:
        nonlocal reached
        if (here.module, here.kind, here.key, here.call % site.calls) != place:
            return tensor
        reached = True
        return site.tokens(change(site.tokens(tensor)))

    with SiteVisitor(module, visit):
        yield
    if not reached:
        raise ValueError(
            f"Expected the forward of {type(module).__name__} to run the same operations in every pass, but what "
            f"{site.module or 'it'!r} computes in one pass it does not in another. Say what runs: "
            "`forward=lambda model, images: …`."
        )


NO_ATTENTION_NEEDED = "Explain it with a method that needs no attention: `MapFunction`."


@dataclass(frozen=True)
class Visit:
    """Tokens that passed a site.

    Attributes:
        site: The site.
        tokens: The tokens, in the graph.
        node: The node of the graph that follows them.
        calls_before: Number of attentions that ran before.
    """

    site: Site
    tokens: Tensor
    node: Any
    calls_before: int


@dataclass(frozen=True)
class Trace:
    """A forward pass with the outputs of attention as leaves of the graph.

    Attributes:
        name: Class of the model.
        calls: The blocks' attention, (2, H, N, N); outputs are leaves, and values are in the graph.
        pool: The attention of a pool, likewise, or None.
        visits: Tokens that passed, in order.
        logits: The node of the logits.
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

    def visit(site: Site, tensor: Tensor) -> Tensor:
        shape = (tuple(tensor.shape[:2]), (len(images), tokens))
        if tensor.ndim != 3 or sorted(shape[0]) != sorted(shape[1]):
            return tensor
        if not tensor.requires_grad and not images.is_floating_point():  # the graph begins here
            tensor = tensor.detach().requires_grad_()
        if not tensor.requires_grad:
            return tensor
        site = replace(site, batch_first=shape[0] == shape[1])
        on = tensor.clone()  # one node for each place, and safe from what is written in place later
        visits.append(Visit(site, tensor, on.grad_fn, len(recorder.calls)))
        return on

    recorder = AttentionRecorder(vit, True, state, cut={*places, *([] if pool is None else [pool])})
    with recorder, SiteVisitor(vit, visit) as visitor:
        logits = _logits_with_gradients(forward, vit, images)
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


def _logits_with_gradients(forward: Callable[[Tensor], Tensor], vit: nn.Module, images: Tensor) -> Tensor:
    try:
        return forward(images)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected {type(vit).__name__} to run with gradients, which tell whether attention alone mixes its "
            f"tokens, but it does not: {error} {NO_ATTENTION_NEEDED}"
        ) from error


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
    """The node of the graph for a leaf."""
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
