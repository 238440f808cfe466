"""Record one step of a module, in the user's own run or on a twin: its images, logits, loss and labels."""

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
"""Number of images whose pixels and outputs are stored, to check a copy against."""

# With a function mode, or hooks of their own, these would compute with another kernel.
_OPAQUE = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass(frozen=True)
class StepTrace:
    """Trace of a step. All tensors are on the CPU.

    Attributes:
        loss: Name of the loss to explain; None if no loss is computed from outputs with a row for each image.
        others: Names of losses that are computed from other outputs.
        seen: Names of all losses of the step.
        task: What the outputs of the loss are.
        parts: Paths of the modules that turn images into the outputs, one after another; empty if only the step does.
        inputs: The first images that the first part received, or any module if there is no part.
        outputs: What the loss received for these images.
        reading: How to read labels off what the outputs are compared with.
        labels: (B,) labels of all images, or None.
        count: B, number of images in the step.
        image_leaf: Index of the inputs among the tensors of the batch; None if the step changes them first.
        label_leaf: Index of the labels among the tensors of the batch; None if the step computes them.
        mixes: Whether the step may mix images and labels: it computes both, and labels are shares of classes.
        leaves: Number of tensors in the batch.
        called: Whether the module itself was called with images.
        error: The error that stopped the step, if any.
        is_exact: Whether the outputs are those of evaluation mode.
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
    images: Tensor | None  # the first rows that the module received
    count: int
    leaf: int | None
    input: int  # names of tensors in the flow
    entry: int = 0
    outputs: frozenset[int] = frozenset()


class StepRecorder:
    """Records what a module computes, without touching it; `trace` returns the result.

    Args:
        module: A LightningModule, or its twin.
        batch: The batch that its step will receive.
        rows: Number of images whose pixels and outputs are stored; None stores all.
        source: The module that a twin is a copy of.
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
        self._leaf_names = [self._flow.name(leaf) for leaf in self._leaves]
        self._recorder.needs_labels = not has_more_than_tensors(batch)
        self._flow.mark_lasting(module.parameters(), WEIGHTS)
        trained = {name for name, weight in (source or module).named_parameters() if weight.requires_grad}
        self._flow.mark_lasting((weight for name, weight in module.named_parameters() if name in trained), TRAINED)
        self._recorder.needs_training = bool(trained)
        self._recorder.lets_out = source is not None
        self._flow.mark_lasting(module.buffers(), BUFFERS)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every call of a submodule, and every function of torch, inside the context."""
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
            self._paths.clear()  # so that nothing more is recorded if the user wrapped this
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
                elif not self._flow.of(tensor) & IMAGES:  # computed out of torch's sight, or from labels alone
                    self._flow.mark(tensor, sources)
            if call is not None:
                call.outputs = frozenset(map(self._flow.name, tensors_in(getattr(output, "logits", output))))
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
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        # Tensors that weights have a share in are features; they are not stored.
        images = next((part for part in tensors if part.ndim == 4 and not self._flow.of(part) & WEIGHTS), None)
        if images is None:
            return _Call(path, None, 0, None, self._flow.name(tensors[0])) if len(tensors) == 1 == len(args) else None
        if not self._flow.of(images) & IMAGES:
            self._flow.mark(images, IMAGES)
        rows = images[self._rows].detach().clone()
        leaf = next(
            (
                place
                for place, (first, other) in enumerate(zip(self._first_rows, self._leaves, strict=True))
                if first is not None and len(other) == len(images) and first.shape == rows.shape
                and first.dtype == rows.dtype and first.equal(rows)
            ),
            None,
        )  # fmt: skip
        self._entries += 1
        return _Call(path, rows, len(images), leaf, self._flow.name(images), self._entries)

    def trace(self, returned: object = None, error: Exception | None = None) -> StepTrace:
        """The trace, once the step has returned or failed.

        Raises:
            Exception: Whatever recording failed with.
        """
        if self._recorder.failure is not None:
            raise self._recorder.failure
        self._recorder.returned |= self._flow.of(_tensors_of(returned))
        fed = [call for call in self._calls if call.images is not None]
        entered = sorted(fed, key=lambda call: call.entry)
        counts = dict.fromkeys(call.count for call in entered)
        ranked, loss = next((best for best in map(self._recorder.best, counts) if best[1] is not None), ([], None))
        ranked = ranked or self._recorder.best(0)[0]
        first = next((call for call in entered if loss is None or call.count == len(loss.outputs)), None)
        parts = self._parts(loss.outputs) if loss is not None else []
        itself = next((call for call in fed if call.path == ""), None)
        start = parts[0] if parts else itself or first
        label_leaf = self._leaf(loss.target) if loss is not None else None
        return StepTrace(
            loss=None if loss is None else loss.name,
            others=tuple(dict.fromkeys(one.name for one in ranked if loss and one.outputs is not loss.outputs)),
            seen=tuple(dict.fromkeys(one.name for one in self._recorder.losses)),
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

    def _leaf(self, tensor: Tensor | None) -> int | None:
        """Index of a tensor among those of the batch; None if it is none of them."""
        name = None if tensor is None else self._flow.name(tensor)
        return self._leaf_names.index(name) if name in self._leaf_names else None

    def _parts(self, outputs: Tensor) -> list[_Call]:
        """The outermost modules that, one after another, turn images into some outputs.

        The module itself is the last resort, as it may do more than its parts.
        """
        inside = [call for call in self._calls if call.path]
        return self._chain(inside, outputs) or self._chain(self._calls, outputs)

    def _chain(self, calls: list[_Call], outputs: Tensor) -> list[_Call]:
        chain: list[_Call] = []
        name = self._flow.name(outputs)
        for _ in range(8):
            makers = [call for call in reversed(calls) if name in call.outputs]
            maker = next((call for call in makers if call.images is not None), makers[0] if makers else None)
            if maker is None:
                break
            chain.insert(0, maker)
            if maker.images is not None:
                return chain
            name = maker.input
        return []


def leaves_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, always in the same order."""
    leaves: list[Tensor] = []
    apply_to_collection(batch, Tensor, lambda part: leaves.append(part))
    return leaves


def has_more_than_tensors(batch: Any) -> bool:
    """Whether a batch holds more than tensors (names, numbers, objects), from which labels may be computed."""
    if isinstance(batch, Mapping):
        return any(map(has_more_than_tensors, batch.values()))
    if isinstance(batch, list | tuple):
        return any(map(has_more_than_tensors, batch))
    return batch is not None and not isinstance(batch, Tensor)


def _tensors_of(value: object) -> list[Tensor]:
    """The tensors in a value of any form, also in the attributes of a model output."""
    tensors = list(tensors_in(value))
    if not tensors and hasattr(value, "__dict__"):
        tensors = list(tensors_in(dict(vars(value))))
    return tensors


def _plain(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().cpu().as_subclass(Tensor).clone()
