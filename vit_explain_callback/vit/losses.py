"""Watch what a loss is computed of: logits and labels exactly as a model is trained with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_OF_CLASSES = {F.cross_entropy, F.nll_loss, F.multi_margin_loss}
_BINARY = {
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.soft_margin_loss,
    F.multilabel_soft_margin_loss,
}
_OF_QUANTITIES = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.gaussian_nll_loss}
_OUT_OF_TORCH = {"numpy", "__array__", "__float__", "__int__", "__complex__"}
_SQUASHING = {"log_softmax", "softmax", "sigmoid", "logsigmoid"}


@dataclass(frozen=True)
class Loss:
    """What a loss was computed of.

    Attributes:
        name: Of the function.
        outputs: Logits (B, C) or (B,), or quantities, in the autograd graph if there is one.
        labels: (B,) class indices, -1 where an image has none that the outputs know; None where nothing is known.
        regression: Whether the outputs are quantities.
    """

    name: str
    outputs: Tensor
    labels: Tensor | None
    regression: bool = False

    def is_of(self, images: int) -> bool:
        """Whether it has one row of outputs for each image."""
        return self.outputs.ndim in (1, 2) and len(self.outputs) == images


class LossWatcher(TorchFunctionMode):
    """Context manager that notes every loss function of `torch.nn.functional` that is called inside it.

    Log-probabilities and probabilities are traced back to the logits that they were made of.

    Attributes:
        losses: In the order of the calls; those of classes before those of quantities, and last the logits that went
            into a softmax without a loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[Loss] = []
        self._squashed: dict[int, tuple[Tensor, Tensor]] = {}  # the result is kept, so that no `id` is given twice

    @property
    def losses(self) -> list[Loss]:
        """In the order of the calls, losses of classes first."""
        used = {id(loss.outputs) for loss in self._losses}
        bare = [Loss("softmax", logits, None) for _, logits in self._squashed.values() if id(logits) not in used]
        return sorted(self._losses, key=lambda loss: loss.regression) + bare

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _OUT_OF_TORCH:  # allowed in a validation step, which has no gradients
            args = (args[0].detach(), *args[1:])
        result = func(*args, **kwargs)
        given = [*args, *(kwargs[name] for name in ("input", "target", "index") if name in kwargs)]
        if len(given) >= 1 and isinstance(given[0], Tensor) and isinstance(result, Tensor):
            self._note(func, result, given)
        return result

    def _note(self, func: Callable[..., Any], result: Tensor, given: list[Any]) -> None:
        name = getattr(func, "__name__", "")
        if name in _SQUASHING and given[0].ndim in (1, 2):
            self._squashed[id(result)] = (result, given[0])
        elif name == "gather" and id(given[0]) in self._squashed:  # a cross-entropy written by hand
            index = next((part for part in given[1:] if isinstance(part, Tensor)), None)
            logits = self._squashed[id(given[0])][1]
            if index is not None and index.shape == (len(logits), 1):
                self._losses.append(Loss("gather", logits, _classes(index[:, 0], logits)))
        elif len(given) >= 2 and isinstance(given[1], Tensor):
            self._note_loss(func, name, given[0], given[1])

    def _note_loss(self, func: Callable[..., Any], name: str, outputs: Tensor, target: Tensor) -> None:
        _, logits = self._squashed.get(id(outputs), (None, outputs))
        if func in _OF_CLASSES:
            self._losses.append(Loss(name, logits, _classes(target, logits)))
        elif func in _BINARY:
            if func is F.binary_cross_entropy and logits is outputs:
                logits = torch.logit(outputs)
            self._losses.append(Loss(name, logits, _positives(target)))
        elif func in _OF_QUANTITIES:
            self._losses.append(Loss(name, outputs, None, regression=True))


def _classes(target: Tensor, logits: Tensor) -> Tensor | None:
    """Labels of a loss over classes, which takes indices or a distribution."""
    if target.is_floating_point():
        return target.detach().argmax(dim=1) if target.ndim == 2 and target.shape == logits.shape else None
    if target.ndim != 1 or logits.ndim != 2:
        return None
    target = target.detach().long()
    return torch.where((target >= 0) & (target < logits.shape[1]), target, -1)


def _positives(target: Tensor) -> Tensor | None:
    """Labels of a loss that says yes or no: 0 or 1, or of several classes the one that is positive."""
    target = target.detach()
    if target.ndim == 1 or (target.ndim == 2 and target.shape[1] == 1):
        flat = target.reshape(-1).float()
        return torch.where((flat >= 0) & (flat <= 1), (flat > 0.5).long(), -1)
    if target.ndim != 2:
        return None
    positive = target > 0.5
    return torch.where(positive.sum(dim=1) == 1, positive.long().argmax(dim=1), -1)
