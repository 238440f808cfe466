"""Run a LightningModule on a twin as its user does: the parts that compute its logits, or else its own step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.isolation.undisturbed import undisturbed
from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.batches import pick_rows
from vit_explain_callback.lightning.read_only_trainer import StandIns, silenced
from vit_explain_callback.lightning.trace import has_more_than_tensors, leaves_of
from vit_explain_callback.options.model import LogitsOf
from vit_explain_callback.vit.labels import Task
from vit_explain_callback.vit.losses import IMAGES, LossRecorder

StepName = Literal["validation_step", "training_step"]
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


_WORDS = {"cross_entropy": "cross-entropy", "nll_loss": "negative log-likelihood", "mse_loss": "squared error"}
_WORDS |= {"binary_cross_entropy_with_logits": "binary cross-entropy", "binary_cross_entropy": "binary cross-entropy"}
_WORDS |= {"l1_loss": "absolute error", "multi_margin_loss": "margin loss", "kl_div": "Kullback-Leibler divergence"}


@dataclass
class LightningAdapter:
    """Runs a LightningModule on a twin: some of its parts, one after another, or its step with a batch of the user's.

    Attributes:
        model: The LightningModule.
        trainer: Its trainer.
        vit: Path of the ViT in it.
        task: What its outputs are.
        forward: The user's function of the module and images that returns logits.
        parts: Paths of the modules that turn images into logits; `""` is the module itself. Without parts, the step
            runs.
        inputs: Inputs of the first part, (B, …), on the CPU, if they are not what reaches the ViT.
        feed: Path of the module that receives the images instead, inside the parts or the step.
        step: The step to run if there are no parts.
        batch: The batch that it runs with, on the module's device, after every transfer hook.
        count: Number of images in the batch.
        rows: Indices of the tensors of the batch with a row for each image; None: all with as many rows as images.
    """

    model: LightningModule
    trainer: Trainer
    vit: str | None
    task: Task = "classification"
    forward: LogitsOf | None = None
    parts: tuple[str, ...] = ("",)
    inputs: Tensor | None = None
    feed: str | None = None
    step: StepName = "validation_step"
    batch: Any = None
    count: int = 0
    rows: frozenset[int] | None = None

    @property
    def regression(self) -> bool:
        """Whether its outputs are quantities."""
        return self.task == "regression"

    @property
    def calls_model(self) -> bool:
        """False: it runs parts of the module or its step."""
        return False

    def describe(self, loss: str | None, columns: int) -> str:
        """What is explained, for the greeting.

        Args:
            loss: Name of the loss that is computed from the outputs.
            columns: Number of outputs per image.
        """
        count = max(columns, 2) if self.task == "classification" else columns
        one, many = {
            "classification": ("class", "classes"),
            "multilabel": ("label", "labels"),
            "regression": ("number", "numbers"),
        }[self.task]
        counted = f"{count} {one if count == 1 else many}"
        outputs = counted if self.task == "regression" else f"logits of {counted}"
        where = "" if self.parts else ", which is run on a copy"
        if loss is None:
            return outputs
        return f"{outputs}, from the {_WORDS.get(loss, f'`{loss}`')} of `{self.step}`{where}"

    @contextmanager
    def evaluating(self) -> Iterator[Twin]:
        """A twin with a read-only stand-in for the Trainer."""
        with evaluating(self.model, self.trainer) as twin:
            yield twin

    def outputs(self, twin: nn.Module, images: Tensor, rows: range) -> object:
        """Run the twin on images, (B, C, H, W), which are at `rows` of the batch, counted modulo its size."""
        if self.forward is not None:
            with silenced():
                return self.forward(twin, images)
        in_batch = [row % max(self.count, 1) for row in rows]
        with self._feeding(twin, images):
            if not self.parts:
                return self.of_step(twin, in_batch, images)
            return self.of_parts(twin, images if self.inputs is None else self.inputs[in_batch].to(images.device))

    def of_parts(self, twin: nn.Module, inputs: Tensor) -> Any:
        """Outputs of the parts, one after another, for inputs of the first."""
        outputs: Any = inputs
        with silenced():
            for path in self.parts:
                outputs = twin.get_submodule(path)(outputs)
        return getattr(outputs, "logits", outputs)

    def of_step(self, twin: nn.Module, rows: list[int], images: Tensor | None = None) -> Tensor:
        """The outputs that the step computes its loss from, with some rows of the batch, or with other images.

        Raises:
            ValueError: If it computes no loss from outputs with a row for each image.
        """
        batch = pick_rows(self.batch, rows, self.count, self.rows)
        recorder, leaves = LossRecorder(), leaves_of(batch)
        flow = recorder.flow
        flow.mark(images, IMAGES)
        recorder.give(leaves)
        recorder.needs_labels = not has_more_than_tensors(batch)
        with recorder:
            try:
                recorder.returned |= flow.of(run_step(twin, self.step, batch))
            except Exception:
                if not recorder.losses:
                    raise  # else it failed after the loss, as manual optimisation does
        _, loss = recorder.best(len(rows))
        if loss is None:
            raise ValueError(
                f"Expected `{self.step}` of {type(self.model).__name__} to compute a loss from outputs with a row for "
                f"each of {len(rows)} images, but it did not. Pass `forward=lambda module, images: …`, which returns "
                "the outputs."
            )
        return loss.values

    @contextmanager
    def _feeding(self, twin: nn.Module, images: Tensor) -> Iterator[None]:
        """Replace the first images that the module at `feed` is called with."""
        if self.feed is None:
            yield
            return
        replacements = iter([images])

        def replaced(argument: Any) -> Any:
            is_images = isinstance(argument, Tensor) and argument.ndim == 4
            return next(replacements, argument) if is_images else argument

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return tuple(map(replaced, args)), {name: replaced(argument) for name, argument in kwargs.items()}

        module = twin.get_submodule(self.feed)
        handle = module.register_forward_pre_hook(feed, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def evaluating(module: LightningModule, trainer: Trainer) -> Iterator[Twin]:
    """A twin of a module, in the precision that its weights need."""
    stand_ins = StandIns(trainer, module)
    with ExitStack() as stack:
        stack.callback(stand_ins.close)
        twin = stack.enter_context(undisturbed(module, stand_ins))
        kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        # Lower precision needs the context of training.
        if kinds - {torch.float32, torch.float64}:
            stack.enter_context(trainer.precision_plugin.forward_context())
        yield twin


def transferred(module: LightningModule, trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the module's device through the transfer hooks; the user's own hooks run on a twin."""
    data = getattr(trainer, "datamodule", None)
    batch = trainer.precision_plugin.convert_input(batch)
    if not any(is_overridden(name, owner) for name in _TRANSFERS for owner in (module, data) if owner is not None):
        return trainer.strategy.batch_to_device(batch, module.device, 0)
    with evaluating(module, trainer) as twin, torch.no_grad(), silenced():
        for name in _TRANSFERS:
            owner = data if data is not None and is_overridden(name, data) else module
            arguments = (module.device, 0) if name == "transfer_batch_to_device" else (0,)
            batch = getattr(twin.copy(owner), name)(batch, *arguments)
    return batch


def run_step(twin: Any, step: StepName, batch: Any) -> Any:
    """Call a step with as many positional arguments as it takes, as Lightning does; its output is discarded.

    The index of the loader is passed only to a parameter of that name or without a default.
    """
    function = getattr(twin, step)
    kinds = inspect.Parameter
    places = [one for one in inspect.signature(function).parameters.values() if one.kind < kinds.KEYWORD_ONLY]
    index_of_batch = len(places) > 1 or places[-1].kind == kinds.VAR_POSITIONAL
    more = [one for one in places[2:] if one.kind != kinds.VAR_POSITIONAL]
    index_of_loader = bool(more) and (more[0].name == "dataloader_idx" or more[0].default is kinds.empty)
    with silenced():
        return function(batch, *[0] * (index_of_batch + index_of_loader))
