"""Capture attention while a model runs, without leaving its fused kernel.

Shapes: B images, H heads, N query tokens, M key tokens (M = N in self-attention), d head width.

The fused kernel never materialises the attention matrix A. It is recomputed from the kernel's inputs,

    A = softmax(scale · q kᵀ + mask),

and the gradient of a logit y with respect to A from the gradient at its output, O = A v:

    ∂y/∂A = (∂y/∂O) vᵀ.

Both are exact and can be computed for a few images, heads and query rows at a time. Where computing A in the forward
pass costs less (`attention_ops.computes_explicitly`), it is computed there, if the caller allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vit_explain_callback.isolation.copy_on_write import address
from vit_explain_callback.vit.attention_ops import (
    SCALED_DOT_PRODUCT,
    MultiHeadParts,
    computes_explicitly,
    explicit_attention,
    function_name,
    multi_head_parts,
    original_function,
)
from vit_explain_callback.vit.calls import AttentionCall as AttentionCall
from vit_explain_callback.vit.calls import explicit_call, fused_call, merged_call
from vit_explain_callback.vit.softmax import SAME, WeightsTracker

_IN_PLACE = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"}
_JOIN = {"cat", "concat", "concatenate", "stack"}


class AttentionRecorder(TorchFunctionMode):
    """Context manager that records every attention operation a module runs inside it.

    Sees `torch.nn.functional.scaled_dot_product_attention`, the attention inside `torch.nn.MultiheadAttention`, and a
    softmax over any dimension, written by hand, that is multiplied with the values by `@`, `matmul`, `bmm`, `baddbmm`
    or `einsum`, whatever the order of the dimensions; heads that are computed one by one and concatenated are one
    operation. Nothing of the module is changed; what is registered on entry is removed on exit.

    Args:
        module: Only attention that runs inside it, or inside one of its submodules, is recorded.
        through_no_grad: Whether to keep gradients inside the forward's own `torch.no_grad()`, as around a frozen
            backbone.
        state: Addresses of memory, such as that of buffers; under `torch.no_grad()`, writes to it stay without a
            gradient even so.
        begins_graph: Whether an attention's output requires gradients where its inputs do not; by default
            `through_no_grad`.
        explicit: Whether attention may be computed without the fused kernel; the last bits of outputs may then differ.
        cut: Indices of the calls whose output becomes a leaf of the autograd graph while values stay in it, to find
            dependencies other than through attention.

    Attributes:
        calls: The operations so far, in the order in which they ran.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> with torch.no_grad(), AttentionRecorder(vit) as recorder:
        ...     _ = vit(torch.zeros(1, 3, 224, 224))
        >>> [(call.module, call.shape) for call in recorder.calls]
        [('blocks.0.attn', (1, 3, 197, 197)), ('blocks.1.attn', (1, 3, 197, 197))]
    """

    def __init__(
        self,
        module: nn.Module,
        through_no_grad: bool = False,
        state: Collection[int] = frozenset(),
        begins_graph: bool | None = None,
        explicit: bool = False,
        cut: Collection[int] = frozenset(),
    ) -> None:
        super().__init__()
        self._explicit = explicit
        self._through_no_grad = through_no_grad
        self._state = state
        self._begins_graph = through_no_grad if begins_graph is None else begins_graph
        self._cut = cut
        self._switched_off = 0  # how many `torch.no_grad()` of the model's own the forward is in
        self.calls: list[AttentionCall] = []
        self._names = {child: name for name, child in module.named_modules()}
        self._running: list[tuple[str, int]] = []
        self._runs: dict[str, int] = {}
        self._weights = WeightsTracker()
        self._outputs: dict[int, tuple[Tensor, AttentionCall]] = {}  # what the model goes on with, by its `id`
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> AttentionRecorder:
        # On each module: hooks on all modules at once would make a compiled model warn.
        for module in filter(_may_attend, self._names):
            self._handles.append(module.register_forward_pre_hook(self._enter_module))
            self._handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def changed_after_softmax(self) -> list[str]:
        """Modules that ran a softmax over token pairs whose result was never multiplied with values as it was."""
        consumed = {call.module for call in self.calls}
        return [softmax.module for softmax in self._weights.changed() if softmax.module not in consumed]

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        name = self._names[module]
        self._running.append((name, self._runs.get(name, 0)))
        self._runs[name] = self._runs.get(name, 0) + 1

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._running:
            self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, func = function_name(func), original_function(func)
        if self._through_no_grad and name == "_set_grad_enabled":
            self._switched_off = max(0, self._switched_off + (-1 if args[0] else 1))
            return None
        if self._switched_off and self._writes_state(name, args, kwargs):
            with torch.no_grad(), DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not self._running:
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)
        if name == "multi_head_attention_forward" and (parts := multi_head_parts(args, kwargs)):
            return self._multi_head(parts)
        if name in _JOIN and (joined := self._join(func, name, args, kwargs)) is not None:
            return joined
        return self._observe(name, func, args, kwargs)

    def _writes_state(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        written = kwargs.get("out", args[0] if in_place and args else None)
        return isinstance(written, Tensor) and address(written) in self._state

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run and record scaled dot-product attention; return the output for the model."""
        if self._explicit and computes_explicitly(query, key, value, *args, **kwargs):
            attention = explicit_attention(query, key, kwargs.get("scale"))
            output = attention.to(value.dtype) @ value
            # Nothing of the tokens is kept that only a gradient would need.
            call = explicit_call(self._path, output[..., :0].clone(), attention, value[..., :0].clone())
            return self._note(call, output)
        output = self._in_graph(SCALED_DOT_PRODUCT(query, key, value, *args, **kwargs))
        return self._note(fused_call(self._path, output, query, key, value, *args, **kwargs), output)

    def _multi_head(self, parts: MultiHeadParts) -> tuple[Tensor, Tensor | None]:
        output = self._attend(parts.query, parts.key, parts.value, parts.mask)
        weights = None if parts.wants_weights is None else self.calls[-1].attention(slice(None), slice(None))
        return parts.finish(output), weights.mean(dim=1) if weights is not None and parts.wants_weights else weights

    def _observe(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, record it if it multiplies attention with values, and return the output for the model."""
        operands = (*args, *(kwargs[key] for key in ("input", "other", "mat2") if key in kwargs))
        matched = self._weights.product(name, operands)
        if matched is not None and name == "baddbmm":
            scaled = kwargs.get("beta", 1) * args[0] if kwargs.get("beta", 1) else 0
            return scaled + kwargs.get("alpha", 1) * self._observe("bmm", torch.bmm, args[1:], {})
        output = func(*args, **kwargs)
        if matched is None:
            self._weights.note(name, func, output, operands, kwargs, self._path)
            if name in SAME and operands and id(operands[0]) in self._outputs:
                self._outputs[id(output)] = (output, self._outputs[id(operands[0])][1])
            return output
        weights, product, value = matched
        attention = weights.precise.permute(product.attention)
        if attention.ndim == 3 and not (weights.softmax.among_tokens or attention.shape[1] == 1):
            return output
        weights.softmax.used = True
        # The gradient is asked for of the output in the order (B, H, N, d), so the model goes on with a view of that.
        ordered = self._in_graph(output.permute(product.output))
        call = explicit_call(self._path, ordered, attention, product.ordered_value(value, attention))
        return self._note(call, ordered.permute([product.output.index(dim) for dim in range(output.ndim)]))

    def _note(self, call: AttentionCall, output: Tensor) -> Tensor:
        """Record a call; `output` is what the model goes on with."""
        value = call.value if self._cut else call.value.detach()
        self.calls.append(replace(call, value=value, trail=tuple(self._running)))
        self._outputs[id(output)] = (output, self.calls[-1])
        return output

    def _join(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Join the outputs of heads that were computed one by one; None if other tensors are joined."""
        parts = args[0] if args else kwargs.get("tensors", ())
        recorded = [self._outputs.get(id(part)) for part in parts]
        calls = [held[1] for held in recorded if held is not None]
        if len(calls) < 2 or len(calls) != len(recorded) or len({id(call) for call in calls}) != len(calls):
            return None
        first, dim = calls[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        alike = all((call.shape[0], call.shape[2:]) == (first.shape[0], first.shape[2:]) for call in calls)
        among = (
            range(parts[0].ndim + 1) if name == "stack" else [parts[0].ndim - 1, *([1] if parts[0].ndim == 4 else [])]
        )
        if not alike or dim % (parts[0].ndim + (name == "stack")) not in among:
            return None
        places = [place for place, call in enumerate(self.calls) if any(call is one for one in calls)]
        if places != list(range(places[0], places[0] + len(calls))):
            return None
        heads = [part.reshape(*call.shape[:3], -1) for part, call in zip(parts, calls, strict=True)]
        del self.calls[places[0] : places[0] + len(calls)]
        whole = self._in_graph(torch.cat(heads, dim=1))
        self.calls.insert(places[0], merged_call(calls, whole))
        heads = list(torch.split(whole, [call.shape[1] for call in calls], dim=1))
        return func([head.reshape(part.shape) for head, part in zip(heads, parts, strict=True)], *args[1:], **kwargs)

    def _in_graph(self, output: Tensor) -> Tensor:
        """The output; or a leaf where the graph is cut, or has not begun yet, as with images in bytes."""
        begins = self._begins_graph and not output.requires_grad
        return output.detach().requires_grad_() if begins or len(self.calls) in self._cut else output

    @property
    def _path(self) -> str:
        return self._running[-1][0]


def is_no_grad(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function seen by a `TorchFunctionMode` switches gradients off."""
    return getattr(func, "__name__", "") == "_set_grad_enabled" and not args[0]


def _may_attend(module: nn.Module) -> bool:
    """Whether attention may run inside a module: not in torch's own layers without parts, as a linear one is."""
    return bool(module._modules) or not type(module).__module__.startswith("torch.nn.")
