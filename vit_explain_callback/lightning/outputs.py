"""Find how a LightningModule turns probe images into the outputs that its loss is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.adapter import LightningAdapter, StepName, transferred
from vit_explain_callback.lightning.batches import images_and_labels
from vit_explain_callback.lightning.locate import locate_vit_of
from vit_explain_callback.lightning.steps import CURE, TwinSteps
from vit_explain_callback.lightning.trace import StepTrace, leaves_of
from vit_explain_callback.vit.labels import Task, read_labels


@dataclass(frozen=True)
class LossOutputs:
    """The outputs that a loss is computed from, and how to get them for the probe images.

    Attributes:
        adapter: Runs the module.
        images: The images as they reach the ViT, (B, C, H, W), on the CPU.
        labels: (B,), -1 for an image without a label; None if no image has one.
        description: What is explained, for the greeting.
        notice: What the user should know about it, or None.
    """

    adapter: LightningAdapter
    images: Tensor
    labels: Tensor | None
    description: str
    notice: str | None = None


class OutputFinder:
    """Finds the outputs of a loss from the user's watched step, or else from a step that is run on a twin.

    Args:
        module: The LightningModule.
        trainer: Its trainer.
        vit: Path of the ViT, if the user names it.
        needs_vit: Whether the images are those that reach a ViT; else those that reach any module first.
        task: What the outputs are, if the user says so.
    """

    def __init__(
        self, module: LightningModule, trainer: Trainer, vit: str | None, needs_vit: bool, task: Task | None
    ) -> None:
        self._module, self._trainer, self._steps = module, trainer, TwinSteps(module, trainer)
        self._vit, self._needs_vit, self._task = vit, needs_vit, task

    def for_batch(self, batch: Any, is_ready: bool, watched: StepTrace | None) -> LossOutputs:
        """Find the outputs for a batch of probe images.

        Args:
            batch: Probe images in the user's own form.
            is_ready: Whether the batch has been through the transfer hooks.
            watched: Trace of the first validation step, if it was watched.

        Raises:
            ValueError: If no loss says what the outputs are, or the outputs of an image depend on other images.
            RuntimeError: If a step fails with the batch.
        """
        if is_ready:
            batch = apply_to_collection(batch, Tensor, lambda part: part.to(self._module.device))
        else:
            batch = transferred(self._module, self._trainer, batch)
        step: StepName = "validation_step"
        if watched is not None and watched.loss is not None:
            mapped = self._mapped(watched, batch)
            batch, trace = (batch, watched) if mapped is not None else self._steps.run_on_labelled(batch, step)
            if trace.loss is None and trace.error is not None:
                raise self._steps.failed(trace.error)
            inputs, labels = mapped if mapped is not None else (trace.inputs, trace.labels)
        else:
            batch, step, trace, shown = self._steps.first_with_loss(batch)
            inputs, labels = trace.inputs, trace.labels
            if shown is not None and inputs is not None and shown.shape == inputs.shape and not shown.equal(inputs):
                inputs, labels = shown, self._steps.sure_labels(batch, step, trace)
            if step == "training_step" and trace.mixes:
                labels = None  # they belong to images that are mixed anew in each step
        if trace.loss is None or inputs is None:
            raise self._unconfirmed(step, trace)
        if labels is None and trace.task == "classification":
            labels = self._labels(batch, trace)
        return self._for_trace(batch, step, trace, inputs, labels, trace is not watched)

    def _mapped(self, trace: StepTrace, batch: Any) -> tuple[Tensor, Tensor | None] | None:
        """Inputs and labels of a batch, taken from where the watched step took them; None if the step computes them."""
        leaves = leaves_of(batch)
        if trace.image_leaf is None or len(leaves) != trace.leaves:
            return None
        inputs = leaves[trace.image_leaf]
        if trace.reading == "numbers":
            return inputs.detach().cpu(), None
        if trace.label_leaf is None or trace.outputs is None:
            return None
        columns = trace.outputs.shape[1] if trace.outputs.ndim > 1 else 1
        labels, task = read_labels(trace.reading, leaves[trace.label_leaf], columns)
        return (inputs.detach().cpu(), None if labels is None else labels.cpu()) if task == trace.task else None

    def _labels(self, batch: Any, trace: StepTrace) -> Tensor | None:
        """Classes under a usual name, for a loss that takes soft ones."""
        if trace.outputs is None or trace.outputs.ndim < 2:
            return None
        with suppress(TypeError, ValueError):  # a batch of another form has no labels that one can be sure of
            _, labels = images_and_labels(batch)
            if labels is not None and len(labels) == trace.count and (labels < trace.outputs.shape[1]).all():
                return labels
        return None

    def _for_trace(
        self, batch: Any, step: StepName, trace: StepTrace, inputs: Tensor, labels: Tensor | None, is_probe: bool
    ) -> LossOutputs:
        task = self._task or trace.task
        count = len(inputs)
        base = LightningAdapter(self._module, self._trainer, self._vit, task, step=step, batch=batch, count=count)
        adapter = self._confirmed(base, trace)
        if adapter is None:
            if not is_probe:  # the watched step had other images, and may have changed the module
                trace = self._steps.run(batch, step)
                if trace.loss is None or trace.outputs is None or trace.inputs is None:
                    raise self._steps.failed(trace.error) if trace.error is not None else self._unconfirmed(step, trace)
                inputs = trace.inputs
                adapter = self._confirmed(base, trace)
            adapter = adapter or self._by_step(base, _inputs_and_outputs(trace)[1], trace.label_leaf)
        return self._finished(adapter, trace, inputs, labels)

    def for_images(self, images: Tensor, labels: Tensor | None, trace: StepTrace) -> LossOutputs:
        """Find the outputs for the user's own images, if the parts of the watched step take them.

        Raises:
            ValueError: If the loss of the step is computed from something else than the outputs of these parts.
        """
        base = LightningAdapter(self._module, self._trainer, self._vit, self._task or trace.task, count=len(images))
        adapter: LightningAdapter | None = None
        if trace.loss is not None and trace.inputs is not None and trace.outputs is not None:
            adapter = self._confirmed(base, trace)
        if adapter is None:
            step: StepName = "validation_step" if is_overridden("validation_step", self._module) else "training_step"
            raise self._unconfirmed(step, trace)
        return self._finished(adapter, trace, images, labels)

    def _finished(
        self, adapter: LightningAdapter, trace: StepTrace, inputs: Tensor, labels: Tensor | None
    ) -> LossOutputs:
        located = locate_vit_of(adapter, inputs, self._needs_vit)
        if located.images is None:
            raise self._imageless(adapter.step)
        images = _plain(located.images)
        if not adapter.parts or images.shape != inputs.shape or not images.equal(inputs.to(images.dtype)):
            adapter = replace(adapter, feed=located.feed, inputs=inputs if adapter.parts else None)
        adapter = replace(adapter, vit=located.vit, batch=None if adapter.parts else adapter.batch)
        labels = None if labels is None else labels[: len(images)]
        description = adapter.describe(trace.loss, located.outputs.shape[1] if located.outputs.ndim > 1 else 1)
        return LossOutputs(adapter, images, labels, description, self._notice(adapter, trace))

    def _confirmed(self, base: LightningAdapter, trace: StepTrace) -> LightningAdapter | None:
        """The parts whose copies reproduce the outputs of the step; None if only the step itself does."""
        candidates = self._candidates(base, trace)
        return next((one for one in candidates if self._reproduces(one, *_inputs_and_outputs(trace), trace)), None)

    def _candidates(self, base: LightningAdapter, trace: StepTrace) -> Iterator[LightningAdapter]:
        if trace.parts:
            yield replace(base, parts=trace.parts)
        if trace.parts != ("",) and is_overridden("forward", self._module):
            yield base

    def _reproduces(self, adapter: LightningAdapter, inputs: Tensor, outputs: Tensor, trace: StepTrace) -> bool | None:
        """Whether copies of the parts reproduce the outputs of the step, also for a single image.

        None if they take something else than images.
        """
        low = str(self._trainer.precision) not in ("32-true", "64-true") or outputs.dtype.itemsize < 4
        same = partial(torch.allclose, rtol=5e-2, atol=5e-2) if low else partial(torch.allclose, rtol=1e-3, atol=1e-4)
        # As many outputs as images: each may compare an image with the others.
        square = outputs.ndim == 2 and outputs.shape[1] == trace.count
        for rows in (slice(None), slice(0, 1))[: 1 + square]:
            with adapter.evaluating() as twin, torch.no_grad():
                try:
                    copied = adapter.of_parts(twin.module, inputs[rows].to(self._module.device, copy=True))
                except Exception:
                    return None
            if not isinstance(copied, Tensor) or copied.numel() != outputs[rows].numel():
                return False
            if trace.is_exact and not same(copied.flatten().float().cpu(), outputs[rows].flatten().float()):
                return False
        return True

    def _by_step(self, base: LightningAdapter, outputs: Tensor, label_leaf: int | None) -> LightningAdapter:
        """The step itself, unless the outputs of an image depend on the others."""
        ways: list[frozenset[int] | None] = [None]
        if label_leaf is not None:
            # A tensor with as many rows as images need not belong to them: the names of classes do not. But if images
            # are each other's classes, no tensor of the batch holds their labels.
            images = {place for place, leaf in enumerate(leaves_of(base.batch)) if leaf.ndim == 4}
            ways.append(frozenset(images | {label_leaf}))
        for rows in ways:
            adapter = replace(base, parts=(), rows=rows)
            alone = self._stepped(adapter, [0])
            if isinstance(alone, Tensor) and alone.numel() == outputs[:1].numel():
                alone = alone.reshape(outputs[:1].shape).float().cpu()
                if torch.allclose(alone, outputs[:1].float(), rtol=1e-2, atol=1e-3):
                    return adapter
        whole = self._stepped(replace(base, parts=()), list(range(base.count)))
        if isinstance(whole, Exception):  # for example of a step that runs in training mode only
            raise self._steps.failed(whole) from whole
        raise ValueError(
            f"Expected the outputs of `{base.step}` of {type(self._module).__name__} for an image to depend on that "
            f"image alone, but they depend on the rest of the batch, as in a contrastive loss. {CURE}"
        )

    @staticmethod
    def _stepped(adapter: LightningAdapter, rows: list[int]) -> Tensor | Exception:
        """The outputs of some images, computed by the step; or the error if it fails or its loss has other rows."""
        with adapter.evaluating() as twin, torch.no_grad():
            try:
                return adapter.of_step(twin.module, rows)
            except Exception as error:
                return error

    def _notice(self, adapter: LightningAdapter, trace: StepTrace) -> str | None:
        if trace.others:
            return (
                f"`{adapter.step}` computes {1 + len(trace.others)} losses from different outputs; those of the first, "
                f"`{trace.loss}`, are explained. Pass `forward=` to explain others."
            )
        itself = replace(adapter, parts=("",), feed=None, inputs=None)
        is_other = adapter.parts != ("",) and not trace.called and is_overridden("forward", self._module)
        if is_other and self._reproduces(itself, *_inputs_and_outputs(trace), trace) is False:
            return (
                f"`forward` returns other outputs than those that the loss of `{adapter.step}` is computed from; those "
                "of the loss are explained. Pass `forward=lambda module, images: module(images)` to explain the others."
            )
        return None

    def _imageless(self, step: StepName) -> ValueError:
        what = "a Vision Transformer" if self._needs_vit else "a module of its own"
        return ValueError(
            f"Expected `{step}` of {type(self._module).__name__} to give images to {what}, but none did. {CURE}"
        )

    def _unconfirmed(self, step: StepName, trace: StepTrace) -> ValueError:
        if trace.inputs is None:
            return self._imageless(step)
        losses = f"only {', '.join(trace.seen)} of other things" if trace.seen else "no such loss"
        return ValueError(
            f"Expected `{step}` of {type(self._module).__name__} to compare outputs, one row per image, with labels in "
            f"a loss, but saw {losses}: an embedding is not the logits of classes. {CURE}"
        )


def _inputs_and_outputs(trace: StepTrace) -> tuple[Tensor, Tensor]:
    """Inputs and outputs that the step showed."""
    assert trace.inputs is not None
    assert trace.outputs is not None
    return trace.inputs, trace.outputs


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().as_subclass(Tensor)
