"""Run a LightningModule the way its user does: the parts that make its logits, or else its own step, on a twin."""

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
from vit_explain_callback.lightning.batches import picked
from vit_explain_callback.lightning.read_only_trainer import StandIns, unheard
from vit_explain_callback.lightning.trace import leaves_of, says_more
from vit_explain_callback.vit.adapter import LogitsOf
from vit_explain_callback.vit.labels import Task
from vit_explain_callback.vit.losses import IMAGES, LossRecorder

StepName = Literal["validation_step", "training_step"]
_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def evaluating(module: LightningModule, trainer: Trainer) -> Iterator[Twin]:
    """A twin of a module, in the precision that its weights need; of the module itself, only what is asked for."""
    stand_ins = StandIns(trainer, module)
    with ExitStack() as stack:
        stack.callback(stand_ins.close)
        twin = stack.enter_context(undisturbed(module, stand_ins))
        kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        if kinds - {torch.float32, torch.float64}:  # lower precision, all of it or in parts, needs what training has
            stack.enter_context(trainer.precision_plugin.forward_context())
        yield twin


def transferred(module: LightningModule, trainer: Trainer, batch: Any) -> Any:
    """A batch on the module's device, after the transfer hooks: the user's own are run on a twin."""
    data = getattr(trainer, "datamodule", None)
    batch = trainer.precision_plugin.convert_input(batch)
    if not any(is_overridden(name, owner) for name in _TRANSFERS for owner in (module, data) if owner is not None):
        return trainer.strategy.batch_to_device(batch, module.device, 0)
    with evaluating(module, trainer) as twin, torch.no_grad(), unheard():
        for name in _TRANSFERS:
            owner = data if data is not None and is_overridden(name, data) else module
            given = (module.device, 0) if name == "transfer_batch_to_device" else (0,)
            batch = getattr(twin.copy(owner), name)(batch, *given)
    return batch


def run_step(twin: Any, step: StepName, batch: Any) -> Any:
    """Call a step with as many arguments as it takes, by their place as Lightning does; what it says goes nowhere.

    The index of the loader is given only where it is asked for by name or has no default.
    """
    function = getattr(twin, step)
    kinds = inspect.Parameter
    places = [one for one in inspect.signature(function).parameters.values() if one.kind < kinds.KEYWORD_ONLY]
    index_of_batch = len(places) > 1 or places[-1].kind == kinds.VAR_POSITIONAL
    more = [one for one in places[2:] if one.kind != kinds.VAR_POSITIONAL]
    index_of_loader = bool(more) and (more[0].name == "dataloader_idx" or more[0].default is kinds.empty)
    with unheard():
        return function(batch, *[0] * (index_of_batch + index_of_loader))


_WORDS = {"cross_entropy": "cross-entropy", "nll_loss": "negative log-likelihood", "mse_loss": "squared error"}
_WORDS |= {"binary_cross_entropy_with_logits": "binary cross-entropy", "binary_cross_entropy": "binary cross-entropy"}
_WORDS |= {"l1_loss": "absolute error", "multi_margin_loss": "margin loss", "kl_div": "Kullback-Leibler divergence"}


@dataclass
class LightningAdapter:
    """Runs a LightningModule on a twin: some parts of it, one after another, or its step with a batch of the user's.

    Attributes:
        model: The LightningModule.
        trainer: Its trainer.
        vit: Path of the ViT in it.
        task: What its outputs are.
        forward: How the user gets logits from the module and images.
        parts: Paths of the modules that turn images into logits; `""` is the module itself. Without any, the step is
            run.
        inputs: What the first part is called with where that is not what reaches the ViT, (B, …), on the CPU.
        feed: Path of the module inside the parts, or the step, that is given other images then.
        step: The step to run where no part does.
        batch: The batch that it is run with, on the module's device, after every transfer hook.
        count: Images in the batch.
        rows: Which tensors of the batch have a row for each image; None: all with as many rows as images.
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

    def in_words(self, loss: str | None, columns: int) -> str:
        """What is explained, for the first line that is printed.

        Args:
            loss: Name of the loss that is computed of it.
            columns: Outputs of an image.
        """
        count = max(columns, 2) if self.task == "classification" else columns
        one, many = {
            "classification": ("class", "classes"),
            "multilabel": ("label", "labels"),
            "regression": ("number", "numbers"),
        }[self.task]
        what = f"{count} {one if count == 1 else many}"
        what = what if self.task == "regression" else f"logits of {what}"
        where = "" if self.parts else ", which is run on a copy"
        return what if loss is None else f"{what}, from the {_WORDS.get(loss, f'`{loss}`')} of `{self.step}`{where}"

    @contextmanager
    def evaluating(self) -> Iterator[Twin]:
        """A twin whose trainer can be asked but not used."""
        with evaluating(self.model, self.trainer) as twin:
            yield twin

    def outputs(self, twin: nn.Module, images: Tensor, first: int) -> object:
        """What the twin makes of images, (B, C, H, W), of which the first is image `first` of the batch."""
        if self.forward is not None:
            with unheard():
                return self.forward(twin, images)
        rows = [(first + place) % max(self.count, 1) for place in range(len(images))]
        with self._feeding(twin, images):
            if not self.parts:
                return self.of_step(twin, rows, images)
            return self.of_parts(twin, images if self.inputs is None else self.inputs[rows].to(images.device))

    def of_parts(self, twin: nn.Module, inputs: Tensor) -> Any:
        """What the parts make of what the first of them is called with."""
        found: Any = inputs
        with unheard():
            for path in self.parts:
                found = twin.get_submodule(path)(found)
        return getattr(found, "logits", found)

    def of_step(self, twin: nn.Module, rows: list[int], images: Tensor | None = None) -> Tensor:
        """The outputs that the step computes its loss of, with some rows of the batch, or with other images.

        Raises:
            ValueError: If it computes no loss of outputs with a row for each image.
        """
        batch = picked(self.batch, rows, self.count, self.rows)
        recorder, leaves = LossRecorder(), leaves_of(batch)
        flow = recorder.flow
        flow.mark(images, IMAGES)
        recorder.give(leaves)
        recorder.needs_labels = not says_more(batch)
        with recorder:
            try:
                recorder.returned |= flow.of(run_step(twin, self.step, batch))
            except Exception:
                if not recorder.losses:
                    raise  # else it failed after the loss, as a step that optimises by hand does
        _, loss = recorder.best(len(rows))
        if loss is None:
            raise ValueError(
                f"Expected `{self.step}` of {type(self.model).__name__} to compute a loss of outputs with a row for "
                f"each of {len(rows)} images, but it did not. Give the outputs yourself: `forward=lambda module, "
                "images: …`."
            )
        return loss.values

    @contextmanager
    def _feeding(self, twin: nn.Module, images: Tensor) -> Iterator[None]:
        """Give the module at `feed` the images in the place of those that it is called with first."""
        if self.feed is None:
            yield
            return
        fed = iter([images])

        def other(given: Any) -> Any:
            return next(fed, given) if isinstance(given, Tensor) and given.ndim == 4 else given

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return tuple(map(other, args)), {name: other(given) for name, given in kwargs.items()}

        module = twin.get_submodule(self.feed)
        handle = module.register_forward_pre_hook(feed, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
