"""Track the result of a softmax until it is multiplied with values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from vit_explain_callback.vit.products import Letters, Product, of_einsum, of_matmul, read

_SOFTMAX = {"softmax", "special_softmax"}
_LOG_SOFTMAX = {"log_softmax", "special_log_softmax"}
_DIVIDE = {"div", "__truediv__", "true_divide", "divide", "div_", "__itruediv__", "__idiv__", "divide_"}
# Functions that change the precision or the memory of a tensor, but not its values.
SAME = {
    *("dropout", "dropout_", "to", "type_as", "type", "float", "double", "half", "bfloat16", "contiguous", "clone"),
    *("alias", "detach", "requires_grad_"),
}
_VIEWS = {
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "mT", "T", "mH", "adjoint", "view"),
    *("view_as", "reshape", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as"),
    *("__getitem__", "select", "narrow", "unbind", "chunk", "split", "tensor_split"),
}
_MATMULS = {"matmul", "__matmul__", "bmm", "__rmatmul__", "linalg_matmul", "matmul_"}


@dataclass
class Softmax:
    """One softmax that ran.

    Attributes:
        module: Path of the innermost module that ran it.
        among_tokens: Whether it has as many queries as keys, like attention among tokens.
        used: Whether its result was multiplied with values.
    """

    module: str
    among_tokens: bool
    used: bool = False


@dataclass(frozen=True)
class Weights:
    """A tensor with the result of a softmax, or an intermediate result of one.

    Attributes:
        tensor: The model's tensor; referenced so that no other tensor gets its `id`.
        precise: The same values in the precision of the softmax, outside the autograd graph.
        marker: A meta tensor of the same shape, whose strides identify the dimensions.
        key: Stride and size of the dimension that it is normalised over.
        stage: "softmax", or an intermediate stage: "log", "exp" or "sum", the sum of `of`.
        softmax: The softmax that it comes from.
        of: For a sum, the summed tensor.
    """

    tensor: Tensor
    precise: Tensor
    marker: Tensor
    key: tuple[int, int]
    stage: str
    softmax: Softmax
    of: Tensor | None = None

    @property
    def key_dim(self) -> int | None:
        """The dimension that it is normalised over; None if that no longer is a dimension."""
        pairs = zip(self.marker.stride(), self.marker.shape, strict=True)
        dims = [dim for dim, stride_and_size in enumerate(pairs) if stride_and_size == self.key]
        return dims[0] if len(dims) == 1 else None


@dataclass
class WeightsTracker:
    """Knows which tensors hold the result of a softmax, and the order of their dimensions.

    A softmax is torch's own, the exponential of a log-softmax, or exponentials divided by their sum.
    """

    _held: dict[int, Weights] = field(default_factory=dict)
    _softmaxes: list[Softmax] = field(default_factory=list)

    def changed(self) -> Iterator[Softmax]:
        """The softmaxes among tokens whose unchanged result was never multiplied with values."""
        return (softmax for softmax in self._softmaxes if softmax.among_tokens and not softmax.used)

    def note(self, name: str, func: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
        """Note the result of an operation on its arguments."""
        held = self._held.get(id(args[0])) if args else None
        if isinstance(output, Tensor) and output.ndim >= 3 and name in _SOFTMAX | _LOG_SOFTMAX | {"exp"}:
            self._begin(name, output, args, kwargs, held, path)
        elif held is None:
            return
        elif name in _DIVIDE and len(args) == 2:
            self._divided(output, held, args[1])
        elif name in SAME or (name == "masked_fill" and held.stage == "exp"):
            self._hold(replace(held, tensor=output))
        elif name == "sum" and held.stage == "exp":
            self._summed(output, held, args, kwargs)
        elif name in _VIEWS:
            self._viewed(func, output, held, args, kwargs)
        elif name.endswith("_") and (not name.endswith("__") or name.startswith("__i")) and output is args[0]:
            del self._held[id(args[0])]  # changed in place

    def product(self, name: str, args: tuple[Any, ...]) -> tuple[Weights, Product, Tensor] | None:
        """The attention that an operation multiplies with values, how it does, and the values; None if it does not."""
        if name == "einsum" and len(args) == 2 and isinstance(args[1], list | tuple):
            args = (args[0], *args[1])
        operands = args[1:3] if name in ("einsum", "baddbmm") else args[:2]
        if name == "__rmatmul__":
            operands = operands[::-1]
        if (name not in _MATMULS | {"einsum", "baddbmm"}) or len(operands) != 2:
            return None
        place = next((place for place, operand in enumerate(operands) if self._is_softmax(operand)), None)
        if place is None or not isinstance(operands[1 - place], Tensor):
            return None
        weights, value = self._held[id(operands[place])], operands[1 - place]
        dims: tuple[int, int] = (operands[0].ndim, operands[1].ndim)
        letters: Letters | None
        if name == "einsum":
            letters = of_einsum(args[0], dims, place) if isinstance(args[0], str) and len(args) == 3 else None
        else:
            letters = of_matmul(*dims, place == 0)
        product = None if letters is None or weights.key_dim is None else read(letters, weights.key_dim)
        return None if product is None else (weights, product, value)

    def _is_softmax(self, operand: object) -> bool:
        held = self._held.get(id(operand))
        return held is not None and held.stage == "softmax"

    def _hold(self, weights: Weights) -> None:
        self._held[id(weights.tensor)] = weights

    def _begin(
        self,
        name: str,
        output: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        held: Weights | None,
        path: str,
    ) -> None:
        marker = torch.empty(output.shape, device="meta")
        if name != "exp":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(dim, int):
                stage = "softmax" if name in _SOFTMAX else "log"
                self._hold(_normalised(output, marker, dim % output.ndim, stage, self._new(output, dim, path, stage)))
        elif held is not None and held.stage == "log":
            self._softmaxes.append(held.softmax)
            self._hold(replace(held, tensor=output, precise=output.detach(), stage="softmax"))
        else:
            self._hold(Weights(output, output.detach(), marker, (0, 0), "exp", Softmax(path, False)))

    def _new(self, output: Tensor, dim: int, path: str, stage: str) -> Softmax:
        last_two = output.shape[-1] == output.shape[-2] and dim % output.ndim >= output.ndim - 2
        softmax = Softmax(path, last_two and output.ndim in (3, 4, 5))
        if stage == "softmax":
            self._softmaxes.append(softmax)
        return softmax

    def _summed(self, output: Tensor, held: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
        if isinstance(dim, int):
            dim %= held.tensor.ndim
            self._hold(replace(held, tensor=output, key=(dim, held.tensor.shape[dim]), stage="sum", of=held.tensor))

    def _divided(self, output: Tensor, held: Weights, divisor: object) -> None:
        """Exponentials divided by their own sum are a softmax; any other quotient is not."""
        total = self._held.get(id(divisor))
        is_sum = held.stage == "exp" and total is not None and total.stage == "sum" and total.of is held.tensor
        if output is held.tensor:
            del self._held[id(output)]
        if total is None or not is_sum:
            return
        dim, size = total.key
        shape = [1 if place == dim else length for place, length in enumerate(output.shape)]
        if list(total.tensor.shape) == shape and output.shape[dim] == size:
            softmax = self._new(output, dim, held.softmax.module, "softmax")
            self._hold(_normalised(output, torch.empty(output.shape, device="meta"), dim, "softmax", softmax))

    def _viewed(
        self, func: Callable[..., Any], output: Any, held: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if held.stage == "sum":  # as `sum(-1).unsqueeze(-1)`, whose shape is asked for where it divides
            if isinstance(output, Tensor):
                self._hold(replace(held, tensor=output))
            return
        rest = [_on_meta(part) for part in args[1:]]
        if any(isinstance(part, Tensor) for part in rest) and func.__name__ not in ("view_as", "reshape_as"):
            return  # an index that is a tensor
        options = {name: _on_meta(part) for name, part in kwargs.items()}
        with DisableTorchFunctionSubclass(), torch.no_grad():
            markers, precise = func(held.marker, *rest, **options), func(held.precise, *args[1:], **kwargs)
        views = zip(*map(_listed, (output, markers, precise)), strict=True)
        for tensor, marker, exact in views:
            if _shares(marker, held.marker):
                self._hold(replace(held, tensor=tensor, marker=marker, precise=exact))


def _normalised(output: Tensor, marker: Tensor, dim: int, stage: str, softmax: Softmax) -> Weights:
    return Weights(output, output.detach(), marker, (marker.stride(dim), marker.shape[dim]), stage, softmax)


def _on_meta(part: Any) -> Any:
    return torch.empty(part.shape, device="meta") if isinstance(part, Tensor) else part


def _listed(part: Any) -> Any:
    return part if isinstance(part, list | tuple) else [part]


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors view the same memory; a copy has lost the order of the dimensions."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
