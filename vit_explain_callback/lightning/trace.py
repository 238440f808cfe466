"""Watch one step of a module, the user's own run or one on a twin: images, logits, loss and labels go by."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode as current_mode

from vit_explain_callback.vit.labels import Reading, Task
from vit_explain_callback.vit.losses import BUFFERS, IMAGES, TRAINED, WEIGHTS, LossRecorder
from vit_explain_callback.vit.sources import tensors_in

ROWS = 4
"""Images of the step whose pixels and outputs are kept, to check a copy by."""

# With a function mode, or hooks of their own, these would compute with another kernel.
_OPAQUE = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass(frozen=True)
class StepTrace:
    """What went by in a step. All tensors are on the CPU.

    Attributes:
        loss: Name of the loss that counts; None where the step computes none of outputs with a row for each image.
        others: Names of other losses of other outputs.
        seen: Names of all losses of the step.
        task: What the outputs of the loss are.
        parts: Paths of the modules that turn images into the outputs, one after another; none where only the step does.
        inputs: The first images that the first part was given, or any module where there is no part.
        outputs: What the loss was given for these.
        reading: How labels are read off what the outputs are compared with.
        labels: (B,) labels of all images, or None.
        count: B, images in the step.
        image_leaf: Which tensor of the batch the inputs are, None where the step changes them before.
        label_leaf: Which tensor of the batch the loss compares the outputs with, None where that is made in the step.
        mixes: Whether the step may mix images and their labels: it makes both, and labels are shares of classes.
        leaves: Number of tensors in the batch.
        called: Whether the module itself was called with images.
        error: What stopped the step, if anything did.
        is_exact: Whether the outputs are those of evaluation.
    """

    loss: str | None
    others: tuple[str, ...]
    seen: tuple[str, ...]
    task: Task
    reading: Reading
    parts: tuple[str, ...]
    inputs: Tensor | None
    outputs: Tensor | None
    labels: Tensor | None
    count: int
    image_leaf: int | None
    label_leaf: int | None
    mixes: bool
    leaves: int
    called: bool
    error: Exception | None = None
    is_exact: bool = True


@dataclass
class _Call:
    path: str
    images: Tensor | None  # the first rows, as the module was given them
    count: int
    leaf: int | None
    given: int  # names of tensors in the flow
    entry: int = 0
    gave: frozenset[int] = frozenset()


class StepRecorder:
    """Watches what a module computes, without touching it; `trace` says what was seen.

    Args:
        module: A LightningModule, or its twin.
        batch: What its step is going to be given.
        rows: Images whose pixels and outputs are kept; None keeps all.
        source: What the module is a twin of.
    """

    def __init__(self, module: nn.Module, batch: Any, rows: int | None = ROWS, source: nn.Module | None = None) -> None:
        self._rows = slice(0, rows)
        self._recorder = LossRecorder()
        self._flow = self._recorder.flow
        self._paths = {id(child): path for path, child in module.named_modules()}
        self._thread = threading.get_ident()
        self._calls: list[_Call] = []  # from inside out, as they ended
        self._entries = 0
        self._leaves = leaves_of(batch)
        self._first_rows = [leaf[self._rows].clone() if leaf.ndim == 4 else None for leaf in self._leaves]
        self._recorder.give(self._leaves)
        self._of_leaf = [self._flow.name(leaf) for leaf in self._leaves]
        self._recorder.needs_labels = not says_more(batch)
        self._flow.mark_lasting(module.parameters(), WEIGHTS)
        own = {name for name, weight in (source or module).named_parameters() if weight.requires_grad}
        self._flow.mark_lasting((weight for name, weight in module.named_parameters() if name in own), TRAINED)
        self._recorder.needs_training = bool(own)
        self._recorder.lets_out = source is not None
        self._flow.mark_lasting(module.buffers(), BUFFERS)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every module of the one that is watched, and every function of torch, is seen."""
        ordinary = nn.Module.__call__

        def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(id(module))
            if path is None or threading.get_ident() != self._thread:
                return ordinary(module, *args, **kwargs)
            return self._call(path, module, ordinary, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            with self._recorder:
                yield
        finally:
            self._paths.clear()  # so that nothing is seen where the user has put something round this
            if nn.Module.__call__ is call:
                nn.Module.__call__ = ordinary  # type: ignore[method-assign]

    def _call(self, path: str, module: nn.Module, ordinary: Any, args: Any, kwargs: Any) -> Any:
        call: _Call | None = None
        sources = 0

        def note_entry() -> None:
            nonlocal call, sources
            call, sources = self._entered(path, args, kwargs), self._flow.of(args, kwargs)

        def note_exit() -> None:
            for tensor in _tensors_of(output):
                if is_opaque:
                    self._flow.mark(tensor, sources | WEIGHTS | TRAINED)
                elif not self._flow.of(tensor) & IMAGES:  # made where torch does not see it, or of labels alone
                    self._flow.mark(tensor, sources)
            if call is not None:
                call.gave = frozenset(map(self._flow.name, tensors_in(getattr(output, "logits", output))))
                self._calls.append(call)

        self._recorder.attempt(note_entry)
        mode: Any = self._recorder
        is_opaque = isinstance(module, _OPAQUE) and current_mode() is mode  # type: ignore[no-untyped-call]
        if is_opaque:
            mode.__exit__(None, None, None)
        try:
            output = ordinary(module, *args, **kwargs)
        finally:
            if is_opaque:
                mode.__enter__()
        self._recorder.attempt(note_exit)
        return output

    def _entered(self, path: str, args: Any, kwargs: Mapping[str, Any]) -> _Call | None:
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        # What weights have a share in are features, of which nothing is kept.
        images = next((part for part in given if part.ndim == 4 and not self._flow.of(part) & WEIGHTS), None)
        if images is None:
            return _Call(path, None, 0, None, self._flow.name(given[0])) if len(given) == 1 == len(args) else None
        if not self._flow.of(images) & IMAGES:
            self._flow.mark(images, IMAGES)
        rows = images[self._rows].detach().clone()
        leaf = next(
            (
                place
                for place, (known, other) in enumerate(zip(self._first_rows, self._leaves, strict=True))
                if known is not None and len(other) == len(images) and known.shape == rows.shape
                and known.dtype == rows.dtype and known.equal(rows)
            ),
            None,
        )  # fmt: skip
        self._entries += 1
        return _Call(path, rows, len(images), leaf, self._flow.name(images), self._entries)

    def trace(self, returned: object = None, error: Exception | None = None) -> StepTrace:
        """What was seen, once the step has returned something, or failed.

        Raises:
            Exception: What kept something from being seen.
        """
        if self._recorder.failure is not None:
            raise self._recorder.failure
        self._recorder.returned |= self._flow.of(_tensors_of(returned))
        fed = [call for call in self._calls if call.images is not None]
        entered = sorted(fed, key=lambda call: call.entry)
        counts = dict.fromkeys(call.count for call in entered)
        ranked, loss = next((found for found in map(self._recorder.best, counts) if found[1] is not None), ([], None))
        ranked = ranked or self._recorder.best(0)[0]
        seen = tuple(dict.fromkeys(one.name for one in self._recorder.losses))
        first = next((call for call in entered if loss is None or call.count == len(loss.outputs)), None)
        parts = self._parts(loss.outputs) if loss is not None else []
        itself = next((call for call in fed if call.path == ""), None)
        start = parts[0] if parts else itself or first
        label_leaf = None
        if loss is not None and loss.target is not None:
            name = self._flow.name(loss.target)
            label_leaf = next((place for place, of in enumerate(self._of_leaf) if of == name), None)
        others = [one.name for one in ranked if loss is not None and one.outputs is not loss.outputs]
        return StepTrace(
            loss=None if loss is None else loss.name,
            others=tuple(dict.fromkeys(others)),
            seen=seen,
            task="classification" if loss is None else loss.task,
            reading="classes" if loss is None else loss.reading,
            parts=tuple(call.path for call in parts),
            inputs=None if start is None or start.images is None else _plain(start.images),
            outputs=None if loss is None else _plain(loss.values[self._rows]),
            labels=None if loss is None or loss.labels is None else _plain(loss.labels),
            count=0 if start is None else start.count,
            image_leaf=None if start is None else start.leaf,
            label_leaf=label_leaf,
            mixes=loss is not None
            and loss.reading in ("distribution", "yes_or_no")
            and label_leaf is None
            and (start is None or start.leaf is None),
            leaves=len(self._leaves),
            called=itself is not None,
            error=error,
        )

    def _parts(self, outputs: Tensor) -> list[_Call]:
        """The outermost modules that, one after another, turn images into some outputs.

        The module itself is the last that is thought of: what it does and holds beside its parts need not be run.
        """
        inside = [call for call in self._calls if call.path]
        return self._chain(inside, outputs) or self._chain(self._calls, outputs)

    def _chain(self, calls: list[_Call], outputs: Tensor) -> list[_Call]:
        found: list[_Call] = []
        name = self._flow.name(outputs)
        for _ in range(8):
            makers = [call for call in reversed(calls) if name in call.gave]
            maker = next((call for call in makers if call.images is not None), makers[0] if makers else None)
            if maker is None:
                break
            found.insert(0, maker)
            if maker.images is not None:
                return found
            name = maker.given
        return []


def leaves_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, always in the same order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, lambda part: found.append(part))
    return found


def says_more(batch: Any) -> bool:
    """Whether a batch holds more than tensors, of which labels may be made: names, numbers, objects."""
    if isinstance(batch, Mapping):
        return any(map(says_more, batch.values()))
    if isinstance(batch, list | tuple):
        return any(map(says_more, batch))
    return batch is not None and not isinstance(batch, Tensor)


def _tensors_of(value: object) -> list[Tensor]:
    """The tensors in a value of any form, also one that holds them as attributes, as model outputs do."""
    found = list(tensors_in(value))
    if not found and hasattr(value, "__dict__"):
        found = list(tensors_in(dict(vars(value))))
    return found


def _plain(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().cpu().as_subclass(Tensor).clone()
