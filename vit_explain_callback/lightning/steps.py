"""Trace steps of a LightningModule: those that run on a twin, and the first validation step of the user's own loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.undisturbed import preserved_random_state
from vit_explain_callback.isolation.wrappers import is_sharded
from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.adapter import StepName, evaluating, run_step
from vit_explain_callback.lightning.batches import cloned, images_in, pick_rows
from vit_explain_callback.lightning.trace import StepRecorder, StepTrace, leaves_of

CURE = (
    "Pass one of these to `ViTExplainCallback`: `forward=lambda module, images: …`, which returns logits (B, C); "
    "`task=`, what the outputs are; `images=`, the images themselves; `vit=`, the path of the ViT."
)


class TwinSteps:
    """Runs steps of a module on a twin, and traces them.

    Args:
        module: The LightningModule.
        trainer: Its trainer.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self._module, self._trainer = module, trainer

    def first_with_loss(self, batch: Any) -> tuple[Any, StepName, StepTrace, Tensor | None]:
        """The first step with a loss, validation before training: batch, name, trace, and the validation's images."""
        best: tuple[StepName, StepTrace] | None = None
        shown: Tensor | None = None
        failure: Exception | None = None
        names: tuple[StepName, ...] = ("validation_step", "training_step")
        for name in names:
            if not is_overridden(name, self._module):
                continue
            batch, trace = self.run_on_labelled(batch, name)
            if name == "training_step" and trace.error is not None and trace.loss is None:
                trace = self.run(batch, name, training=True)
            failure = failure or trace.error
            shown = trace.inputs if shown is None else shown
            best = (name, trace) if best is None or trace.loss is not None or not best[1].seen else best
            if trace.loss is not None:
                break
        if best is None or (best[1].loss is None and failure is not None):
            raise self.failed(failure)
        return batch, *best, shown

    def run_on_labelled(self, batch: Any, step: StepName) -> tuple[Any, StepTrace]:
        """Run a step; if it fails or leaves images out, run it on the labelled images alone."""
        trace = self.run(batch, step)
        count = images_in(batch)
        labels = [leaf for leaf in leaves_of(batch) if leaf.shape == (count,) and not leaf.is_floating_point()]
        for absent in ((-1, -100), (-1, -100, 255)):
            unlabelled = [torch.isin(each.cpu(), torch.tensor(absent)) for each in labels if each.dtype != torch.bool]
            if (trace.loss is not None and trace.error is None) or not unlabelled:
                break
            rows = (~torch.stack(unlabelled).any(dim=0)).nonzero().flatten().tolist()
            if 0 < len(rows) < count:
                fewer = pick_rows(batch, rows, count)
                again = self.run(fewer, step)
                if again.error is None and (again.loss is not None or trace.error is not None):
                    return fewer, again
        return batch, trace

    def run(self, batch: Any, step: StepName, seed: int | None = None, training: bool = False) -> StepTrace:
        """Run one step, which may fail, and trace it."""
        with evaluating(self._module, self._trainer) as twin, preserved_random_state(seed), torch.no_grad():
            if training:
                twin.module.train()
            copied = cloned(batch)
            recorder = StepRecorder(twin.module, copied, None, self._module)
            returned: object = None
            error: Exception | None = None
            with recorder.watching():
                try:
                    returned = run_step(twin.module, step, copied)
                except Exception as raised:
                    error = raised
            return replace(recorder.trace(returned, error), is_exact=not training)

    def sure_labels(self, batch: Any, step: StepName, trace: StepTrace) -> Tensor | None:
        """Labels of a step that changes the images, unless it changes the labels too, as mixing images does."""
        again = self.run(batch, step, seed=1).labels
        is_sure = again is not None and trace.labels is not None and again.equal(trace.labels)
        return trace.labels if is_sure else None

    def failed(self, error: Exception | None) -> Exception:
        """The error to raise if a step failed, or if there is none."""
        name = type(self._module).__name__
        if error is None:
            return ValueError(f"Expected {name} to have a validation or training step, but it has none. {CURE}")
        failure = RuntimeError(f"A step of {name} failed with probe images: {error!r}. {CURE}")
        failure.__cause__ = error
        return failure


_STEP = "validation_step"


class FirstStepWatcher:
    """Traces the first validation step of the user's loop, by wrapping the strategy's `validation_step` for one call.

    The module is not changed.

    Attributes:
        trace: Trace of the first step; None before, and if watching failed.
        failure: The error that watching failed with, if it did.
    """

    def __init__(self) -> None:
        self.trace: StepTrace | None = None
        self.failure: Exception | None = None
        self._wrapper: Any = None
        self._replaced: Any = None

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Watch the next step, unless one has been watched, or watching would change what it computes."""
        if self.trace is not None or self.failure is not None or not _is_neutral(module):
            return
        strategy = trainer.strategy
        step, self._replaced = strategy.validation_step, vars(strategy).get(_STEP)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.end(trainer)
            recorder = self._recorder(module, args)
            if recorder is None:
                return step(*args, **kwargs)
            with recorder.watching():
                returned = step(*args, **kwargs)
            self._conclude(recorder, returned)
            return returned

        vars(strategy)[_STEP] = self._wrapper = watched

    def end(self, trainer: Trainer) -> None:
        """Stop watching, and restore the step."""
        attributes = vars(trainer.strategy)
        if self._wrapper is not None and attributes.get(_STEP) is self._wrapper:
            del attributes[_STEP]
            if self._replaced is not None:
                attributes[_STEP] = self._replaced
        self._wrapper = self._replaced = None

    def _recorder(self, module: LightningModule, args: tuple[Any, ...]) -> StepRecorder | None:
        try:
            return StepRecorder(module, args[0] if args else None)
        except Exception as error:
            self.failure = error
            return None

    def _conclude(self, recorder: StepRecorder, returned: object) -> None:
        try:
            self.trace = recorder.trace(returned)
        except Exception as error:
            self.failure = error


def _is_neutral(module: nn.Module) -> bool:
    """Whether watching leaves a step as it is; a compiled module would be compiled again."""
    if is_sharded(module):
        return False
    for child in module.modules():
        attributes = vars(child)
        compiled = attributes.get("_compiled_call_impl") is not None or "_orig_mod" in child._modules
        if compiled or any(
            hasattr(part, "_torchdynamo_orig_callable") for part in attributes.values() if callable(part)
        ):
            return False
    functions = [vars(base) for base in type(module).__mro__] + [getattr(module.forward, "__globals__", {})]
    return not any(
        hasattr(part, "_torchdynamo_orig_callable") or type(part).__name__ == "OptimizedModule"
        for group in functions
        for part in list(group.values())
        if callable(part)
    )
