"""Run a LightningModule the way its user does: the parts that make its logits, or else its own step, on a twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vit_explain_callback.lightning._compat import LightningModule, Trainer
from vit_explain_callback.lightning.batches import picked
from vit_explain_callback.lightning.evaluation import StepName, evaluating, run_step
from vit_explain_callback.lightning.stand_in import unheard
from vit_explain_callback.lightning.trace import leaves_of, says_more
from vit_explain_callback.vit.adapter import LogitsOf
from vit_explain_callback.vit.losses import IMAGES, LossRecorder, Task
from vit_explain_callback.vit.twin import Twin

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
