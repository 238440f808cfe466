"""Capture attention while a model runs, without leaving its fused kernel.

Shapes: B images, H heads, N query tokens, M key tokens (M = N in self-attention), d head width.

The fused kernel never forms the attention matrix A. It is recovered from what went into the kernel,

    A = softmax(scale · q kᵀ + mask),

and the gradient of a logit y with respect to A from what came out of it, O = A v:

    ∂y/∂A = (∂y/∂O) vᵀ.

Both are exact, and may be asked for a few images, heads and query rows at a time. Where A is to be had in the forward
pass itself for less (`formed.py`), it is formed there instead, if that is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vit_explain_callback.vit._einsum import value_product
from vit_explain_callback.vit._mha import MultiHeadParts, take_apart
from vit_explain_callback.vit.copy_on_write import address
from vit_explain_callback.vit.formed import formed_attention, forms

_ALL = slice(None)
_MATMULS = {"matmul", "__matmul__", "bmm"}
_IN_PLACE = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"}
# What may stand between the softmax and the product with the values without changing the attention.
_VALUE_PRESERVING = {"dropout", "to", "type_as", "float", "half", "bfloat16", "contiguous"}


class PartOfAttention(Protocol):
    """Gives the attention of some images, heads and query rows, (b, h, n, M)."""

    def __call__(self, images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        """Compute it, in float32, or float64 where the model is float64."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention operation seen in a forward pass; its tensors are the model's own, not copies.

    Attributes:
        module: Path of the innermost module that ran it, seen from the recorded module.
        output: O = A v as the model got it, (B, H, N, d) or (B, N, d), in the autograd graph if the forward built one.
        value: v, (B, H, M, d).
        attention: The attention of some images, heads and query rows.
        shape: (B, H, N, M).
    """

    module: str
    output: Tensor
    value: Tensor
    attention: PartOfAttention
    shape: tuple[int, int, int, int]

    def attention_gradient(self, output_gradient: Tensor, images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        """∂y/∂A = (∂y/∂O) vᵀ of a part of the attention, (b, h, n, M), from `output_gradient` ∂y/∂O, (B, H, N, d)."""
        upstream = output_gradient.reshape(*self.shape[:3], -1)[images, heads, queries]
        return _at_least_float32(upstream) @ _at_least_float32(self.value[images, heads]).mT


class AttentionRecorder(TorchFunctionMode):
    """Context manager that records every attention operation a module runs inside it.

    Sees `torch.nn.functional.scaled_dot_product_attention`, the attention inside `torch.nn.MultiheadAttention`, and a
    hand-written `softmax(…, dim=-1)`, of (B, H, N, M) or of (B, N, N) without heads, that is multiplied with the values
    by `@`, `matmul`, `bmm` or `einsum`. Nothing of the module is changed; what is registered on entry is removed on
    exit.

    Args:
        module: Only attention that runs inside it, or inside one of its submodules, is recorded.
        through_no_grad: Whether to keep gradients where the model's forward says `torch.no_grad()`, as round a frozen
            backbone.
        state: Addresses of memory, that of buffers say, to which nothing with a gradient is written under
            `torch.no_grad()` all the same.
        begins_graph: Whether an attention's output asks for gradients where nothing before it does; by default where
            gradients are kept.
        forms: Whether attention may be formed in the open; outputs may then differ in the last bits from those of the
            fused kernel.

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
        forms: bool = False,
    ) -> None:
        super().__init__()
        self._forms = forms
        self._through_no_grad = through_no_grad
        self._state = state
        self._begins_graph = through_no_grad if begins_graph is None else begins_graph
        self._switched_off = 0  # how many `torch.no_grad()` of the model's own the forward is in
        self.calls: list[AttentionCall] = []
        self._names = {child: name for name, child in module.named_modules()}
        self._running: list[str] = []
        self._softmaxes: dict[int, tuple[Tensor, Tensor, str]] = {}
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
        return [
            module
            for _, attention, module in self._softmaxes.values()
            if attention.shape[-1] == attention.shape[-2] and module not in consumed
        ]

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        self._running.append(self._names[module])

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._running:
            self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._through_no_grad and getattr(func, "__name__", "") == "_set_grad_enabled":
            self._switched_off = max(0, self._switched_off + (-1 if args[0] else 1))
            return None
        if self._switched_off and self._writes_state(func, args, kwargs):
            with torch.no_grad(), DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not self._running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and (parts := take_apart(args, kwargs)):
            return self._multi_head(parts)
        output = func(*args, **kwargs)
        return self._observe(func, output, args, kwargs) if isinstance(output, Tensor) else output

    def _writes_state(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        name = getattr(func, "__name__", "")
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        written = kwargs.get("out", args[0] if in_place and args else None)
        return isinstance(written, Tensor) and address(written) in self._state

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run scaled dot-product attention, note it, and give the output that the model is to go on with."""
        if self._forms and forms(query, key, value, *args, **kwargs):
            attention = formed_attention(query, key, kwargs.get("scale"))
            output = attention.to(value.dtype) @ value
            # Nothing of the tokens is kept that only a gradient would need.
            self.calls.append(
                _explicit_call(self._running[-1], output[..., :0].clone(), attention, value[..., :0].clone())
            )
            return output
        output = self._in_graph(F.scaled_dot_product_attention(query, key, value, *args, **kwargs))
        self.calls.append(_fused_call(self._running[-1], output, query, key, value, *args, **kwargs))
        return output

    def _multi_head(self, parts: MultiHeadParts) -> tuple[Tensor, Tensor | None]:
        output = self._attend(parts.query, parts.key, parts.value, parts.mask)
        weights = None if parts.wants_weights is None else self.calls[-1].attention(slice(None), slice(None))
        return parts.finish(output), weights.mean(dim=1) if weights is not None and parts.wants_weights else weights

    def _observe(
        self, func: Callable[..., Any], output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Note an attention that is written by hand, and give the output that the model is to go on with."""
        name = getattr(func, "__name__", "")
        if name == "softmax" and _is_attention(output) and kwargs.get("dim", *args[1:2]) in (-1, output.ndim - 1):
            self._softmaxes[id(output)] = (output, output, self._running[-1])
        elif name in _VALUE_PRESERVING and id(args[0]) in self._softmaxes:
            self._softmaxes[id(output)] = (output, *self._softmaxes[id(args[0])][1:])
        elif name in _MATMULS and len(args) == 2 and id(args[0]) in self._softmaxes:
            _, attention, module = self._softmaxes[id(args[0])]
            output = self._in_graph(output)
            self.calls.append(_explicit_call(module, output, attention, args[1]))
        elif name == "einsum" and len(args) == 3:
            return self._einsum(output, *args)
        return output

    def _einsum(self, output: Tensor, equation: Any, *operands: Any) -> Tensor:
        place = next((place for place, operand in enumerate(operands) if id(operand) in self._softmaxes), None)
        product = None if place is None else value_product(equation, place)
        if place is None or product is None:
            return output
        _, attention, module = self._softmaxes[id(operands[place])]
        # The gradient is asked for of the output in the order (B, H, N, d), so the model goes on with a view of that.
        ordered = self._in_graph(output.permute(product.output))
        value = operands[1 - place].permute(product.value)
        self.calls.append(_explicit_call(module, ordered, attention, value))
        return ordered.permute([product.output.index(dim) for dim in range(output.ndim)])

    def _in_graph(self, output: Tensor) -> Tensor:
        """The output, or where the graph has not begun yet, as with images in bytes, a leaf with which it begins."""
        begins = self._begins_graph and not output.requires_grad
        return output.detach().requires_grad_() if begins else output


def is_no_grad(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function seen by a `TorchFunctionMode` is the switching off of gradients."""
    return getattr(func, "__name__", "") == "_set_grad_enabled" and not args[0]


def _may_attend(module: nn.Module) -> bool:
    """Whether attention may run inside a module: not in torch's own layers without parts, as a linear one is."""
    return bool(module._modules) or not type(module).__module__.startswith("torch.nn.")


def _is_attention(weights: Tensor) -> bool:
    """Whether a softmax may be attention: with heads, or without them among the tokens of an image."""
    return weights.ndim == 4 or (weights.ndim == 3 and weights.shape[1] == weights.shape[2])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _fused_call(
    module: str,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    # Without a head dimension there is one head.
    query, key, value = (t.detach() if t.ndim == 4 else t.detach().unsqueeze(1) for t in (query, key, value))
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if enable_gqa:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    if is_causal:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    mask = None if attn_mask is None else attn_mask.detach().expand(batch, heads, queries, keys)

    def attention(images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        part = None if mask is None else mask[images, heads, queries]
        return formed_attention(query[images, heads, queries], key[images, heads], scale, part)

    return AttentionCall(module, output, value, attention, (batch, heads, queries, keys))


def _explicit_call(module: str, output: Tensor, weights: Tensor, value: Tensor) -> AttentionCall:
    if weights.ndim == 3:  # one head
        weights, value = weights.unsqueeze(1), value.unsqueeze(1)

    def attention(images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        return _at_least_float32(weights.detach()[images, heads, queries])

    batch, heads, queries, keys = weights.shape
    return AttentionCall(module, output, value.detach(), attention, (batch, heads, queries, keys))
