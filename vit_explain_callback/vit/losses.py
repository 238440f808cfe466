"""Record the logits and labels that a loss is computed from, exactly as the model is trained with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from vit_explain_callback.vit.labels import Reading, Task, are_numbers, read_labels
from vit_explain_callback.vit.sources import Flow, is_mask_of_rows

IMAGES, WEIGHTS, BUFFERS, TRAINED, FIRST_FREE = 1, 2, 4, 8, 16
"""Sources: images; weights and buffers of the model, weights that are trained; the first that has no meaning yet."""

_OF_CLASSES = {F.cross_entropy, F.nll_loss, F.multi_margin_loss, F.kl_div}
_BINARY = {
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.soft_margin_loss,
    F.multilabel_soft_margin_loss,
}
_OF_QUANTITIES = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss, F.gaussian_nll_loss}
_OUT_OF_TORCH = {"numpy", "__array__", "__float__", "__int__", "__complex__"}
_TO_PYTHON = {"tolist", "item", "__index__", "__bool__", "__contains__", "__iter__"}
_SOFTMAX, _SIGMOID = {"log_softmax", "softmax", "logsumexp"}, {"sigmoid", "logsigmoid", "log_sigmoid"}
_DIFFERENCE = {"sub", "__sub__", "subtract", "rsub", "__rsub__", "__isub__", "sub_"}
_PRODUCT = {"mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__", "where", "einsum"}
_BY_NAME = ("input", "other", "target", "index")
_PICKING = {"gather", "__getitem__", "take_along_dim", "masked_select"}


@dataclass(frozen=True)
class Loss:
    """A loss and the tensors that it was computed from.

    Attributes:
        name: Name of the function, or of the operation that combines outputs and labels in a hand-written loss.
        outputs: Logits (B, C) or (B,), or quantities, in the autograd graph if there is one.
        labels: (B,) class indices, -1 for an image without a label among the outputs; None if there are no labels.
        task: What the outputs are.
        reading: How to read labels off the target.
        target: What the outputs were compared with, (B,) or (B, C); None for other shapes.
        counts: Whether the outputs depend on the images and not on their labels, and what they were compared with
            depends on labels and neither on images nor on weights.
        source: Marks everything that is computed from this loss.
        copied_outputs: A copy of the outputs, in the autograd graph if there is one; None for dense outputs.
    """

    name: str
    outputs: Tensor
    labels: Tensor | None
    task: Task = "classification"
    reading: Reading = "classes"
    target: Tensor | None = None
    counts: bool = True
    source: int = 0
    copied_outputs: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The outputs as the loss received them, whatever was written to them afterwards."""
        return self.outputs if self.copied_outputs is None else self.copied_outputs

    @property
    def regression(self) -> bool:
        """Whether the outputs are quantities."""
        return self.task == "regression"

    def is_of(self, images: int) -> bool:
        """Whether it has one row of outputs for each image."""
        return self.outputs.ndim in (1, 2) and len(self.outputs) == images


class LossRecorder(TorchFunctionMode):
    """Context manager that records every loss computed inside it, by `torch.nn.functional` or by hand.

    Log-probabilities and probabilities are traced back to their logits. Outputs that are compared with something that
    depends on images or weights have no labels: they are embeddings, or a teacher's outputs.

    Args:
        flow: Tracks what tensors are computed from; the images must be marked in it.

    Attributes:
        losses: In the order of the calls.
        returned: Sources of what was differentiated, or returned by the step.
        failure: The error that stopped recording, if any.
        lets_out: Whether numbers may leave torch where gradients are on, as in a validation step, which has none.
        needs_training: Whether outputs count only if weights that are trained have a share in them.
        needs_labels: Whether labels count only if they are computed from tensors passed to `give`.
    """

    def __init__(self, flow: Flow | None = None) -> None:
        super().__init__()
        self.flow = flow or Flow()
        self.losses: list[Loss] = []
        self.returned = 0
        self.failure: Exception | None = None
        self.lets_out = True
        self.needs_training = False
        self.needs_labels = False
        self._batch_sources = 0
        self._left_torch = 0
        self._inside = 0  # sources of what looked like a loss, and went into the logits of another
        self._next_source = FIRST_FREE
        self._logits: Any = WeakIdKeyDictionary()  # by what was computed of them, element by element
        self._binary: Any = WeakIdKeyDictionary()
        self._masked: Any = WeakIdKeyDictionary()  # by rows of some outputs: all of them, and which rows these are

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Allowed in a validation step, which has no gradients.
        if self.lets_out and name in _OUT_OF_TORCH and torch.is_grad_enabled():
            args = (args[0].detach(), *args[1:])
        if name in _OUT_OF_TORCH or name in _TO_PYTHON:
            self._left_torch |= self.flow.of(args)
        if name == "backward":
            self.returned |= self.flow.of(args)
        result = func(*args, **kwargs)
        operands = [*args[name == "einsum" :], *(kwargs[key] for key in _BY_NAME if key in kwargs)]

        def note() -> None:
            if operands and isinstance(result, Tensor):
                self._note(func, name, operands, result)
            self.flow.computed(func, args, kwargs, result)

        self.attempt(note)
        return result

    def attempt(self, note: Callable[[], None]) -> None:
        """Call `note` without letting its error fail the step that is recorded."""
        if self.failure is None:
            try:
                note()
            except Exception as error:
                self.failure = error

    def give(self, leaves: Sequence[Tensor]) -> None:
        """Mark the tensors of a batch: those of over two dimensions as images, any other with its own source."""
        for leaf in leaves:
            if leaf.ndim > 2:
                self.flow.mark(leaf, IMAGES)
            else:
                self.flow.mark(leaf, self._next_source)
                self._batch_sources |= self._next_source
                self._next_source <<= 1

    def best(self, images: int) -> tuple[list[Loss], Loss | None]:
        """The losses that the step returns and that have labels, those of classes first, and the one that counts.

        None counts if the first is not computed from outputs with a row for each image.
        """
        returned = [loss for loss in self.losses if loss.source & self.returned] or self.losses
        ranked = sorted(
            (loss for loss in returned if loss.counts and not loss.source & self._inside),
            key=lambda loss: ("classification", "multilabel", "regression").index(loss.task),
        )
        usable = [loss for loss in ranked if loss.is_of(images)]
        dense = any(not loss.regression for loss in ranked if not loss.is_of(images))
        return ranked, None if not usable or (usable[0].regression and dense) else usable[0]

    def _note(self, func: Callable[..., Any], name: str, operands: list[Any], result: Tensor) -> None:
        first = operands[0]
        if (
            name == "__getitem__"
            and is_mask_of_rows(operands[1])
            and isinstance(first, Tensor)
            and first.ndim in (1, 2)
        ):
            self._masked[result] = (first, operands[1])
        if func in _OF_CLASSES | _BINARY | _OF_QUANTITIES:
            if len(operands) > 1 and isinstance(first, Tensor) and isinstance(operands[1], Tensor):
                self._note_loss(func, name, first, operands[1], result)
        elif name in _SOFTMAX | _SIGMOID and isinstance(first, Tensor) and first.ndim in (1, 2):
            logits = self._logits.get(first, first)
            for tensor in (result, first) if name == "logsumexp" else (result,):
                self._logits[tensor] = logits
                self._binary[tensor] = name in _SIGMOID
        else:
            self._note_by_hand(name, operands, result)

    def _note_loss(self, func: Callable[..., Any], name: str, outputs: Tensor, target: Tensor, result: Tensor) -> None:
        logits = self._logits.get(outputs, outputs)
        if func in _OF_QUANTITIES and (logits is outputs or are_numbers(target)):
            self._add(name, outputs, "numbers", target, result)
        elif func in _OF_CLASSES:
            self._add(name, logits, "distribution" if target.shape == logits.shape else "classes", target, result)
        else:
            if func is F.binary_cross_entropy and logits is outputs:
                logits = torch.logit(outputs)
                self.flow.mark(logits, self.flow.of(outputs))
            self._add(name, logits, "signs" if func is F.soft_margin_loss else "yes_or_no", target, result)

    def _note_by_hand(self, name: str, operands: list[Any], result: Tensor) -> None:
        """Note an operation that combines outputs and labels in a hand-written loss."""
        logits = next(
            (self._logits[part] for part in operands if isinstance(part, Tensor) and part in self._logits), None
        )
        others = [part for part in _flat(operands) if isinstance(part, Tensor) and part not in self._logits]
        if logits is None:
            outputs = [part for part in others if self.flow.of(part) & IMAGES]
            targets = [part for part in others if not self.flow.of(part) & (IMAGES | WEIGHTS | BUFFERS)]
            if (
                name in _DIFFERENCE
                and len(outputs) == len(targets) == 1
                and outputs[0].shape == targets[0].shape
                and outputs[0].is_floating_point()
                and 0 < outputs[0].ndim <= 2
            ):
                self._add(name, outputs[0], "numbers", targets[0], result)
            return
        binary = self._binary.get(next(part for part in operands if isinstance(part, Tensor) and part in self._logits))
        met = others[-1] if others else None
        picks_rows = name == "__getitem__" and not (isinstance(operands[1], tuple) and len(operands[1]) == 2)
        if name in _PICKING and met is not None and not (picks_rows and met.dtype != torch.bool):
            self._note_picked(name, logits, met, result)
        elif name in _PRODUCT | _DIFFERENCE and met is not None and met.shape == logits.shape and met.numel() > 1:
            if name in _DIFFERENCE and are_numbers(met):
                self._add(name, next(part for part in operands if part in self._logits), "numbers", met, result)
            else:
                self._add(name, logits, "yes_or_no" if binary else "distribution", met, result)
        if result.shape == logits.shape:  # element by element
            self._logits[result], self._binary[result] = logits, binary

    def _note_picked(self, name: str, logits: Tensor, index: Tensor, result: Tensor) -> None:
        if index.dtype == torch.bool and index.shape == logits.shape:
            self._add(name, logits, "distribution", index, result)
        elif (
            not index.is_floating_point()
            and index.dtype != torch.bool
            and index.shape in ((len(logits),), (len(logits), 1))
        ):
            self._add(name, logits, "classes", index, result)

    def _add(self, name: str, outputs: Tensor, reading: Reading, target: Tensor, result: Tensor) -> None:
        labels, task = read_labels(reading, target, outputs.shape[1] if outputs.ndim > 1 else 1)
        if outputs in self._masked:
            outputs, mask = self._masked[outputs]
            if labels is not None:
                labels = labels.new_full((len(mask),), -1).masked_scatter(mask.to(labels.device), labels)
        source = self._next_source
        self._next_source <<= 1
        self.flow.mark(result, source)
        # A buffer may say how labels are counted, but numbers of one are those of a centre.
        of_model = IMAGES | WEIGHTS | (BUFFERS if reading == "numbers" else 0)
        made_of, computed_of = self.flow.of(target), self.flow.of(outputs)
        if reading != "numbers":
            self._inside |= computed_of
        of_labels = not made_of & of_model
        if self.needs_labels and not made_of & self._batch_sources:  # made of Python's numbers, if of anything
            of_labels = not made_of and bool(self._left_torch & self._batch_sources) and not self._left_torch & IMAGES
        is_trained = bool(computed_of & TRAINED) or not self.needs_training
        # Where labels have a share in the outputs, as margins do, they are not what the model says of an image.
        counts = (
            of_labels and is_trained and bool(computed_of & IMAGES) and not computed_of & made_of & self._batch_sources
        )
        if outputs.ndim > 2:  # dense outputs are not copied
            outputs = outputs.new_empty((0, *outputs.shape[1:]))
        target_or_none = target if target.ndim <= 2 else None
        copied_outputs = outputs.clone() if outputs.ndim <= 2 else None
        self.losses.append(Loss(name, outputs, labels, task, reading, target_or_none, counts, source, copied_outputs))


def _flat(values: list[Any]) -> list[Any]:
    return [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
