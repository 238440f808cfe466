"""Run the steps of a LightningModule on a twin, and watch the first validation step that the user's own loop runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.undisturbed import preserved_random_state
from vit_explain_callback.isolation.wrappers import is_sharded
from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.adapter import StepName, evaluating, run_step
from vit_explain_callback.lightning.batches import cloned, images_in, picked
from vit_explain_callback.lightning.trace import StepRecorder, StepTrace, leaves_of

CURE = (
    "Say how: `ViTExplainCallback(forward=lambda module, images: …)` gives logits (B, C) of images, `task=` says what "
    "they are, `images=` gives the images themselves, and `vit=` the path of the ViT."
)


class Steps:
    """The steps of a module, each run on a twin with a batch.

    Args:
        module: The LightningModule.
        trainer: Its trainer.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self._module, self._trainer = module, trainer

    def first_with_loss(self, batch: Any) -> tuple[Any, StepName, StepTrace, Tensor | None]:
        """The first step that shows a loss, validation first, its batch, and the images of the validation."""
        found: tuple[StepName, StepTrace] | None = None
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
            found = (name, trace) if found is None or trace.loss is not None or not found[1].seen else found
            if trace.loss is not None:
                break
        if found is None or (found[1].loss is None and failure is not None):
            raise self.failed(failure)
        return batch, *found, shown

    def run_on_labelled(self, batch: Any, step: StepName) -> tuple[Any, StepTrace]:
        """Run a step; where it fails or leaves images out, on the images alone that have a label."""
        trace = self.run(batch, step)
        count = images_in(batch)
        labels = [leaf for leaf in leaves_of(batch) if leaf.shape == (count,) and not leaf.is_floating_point()]
        for absent in ((-1, -100), (-1, -100, 255)):
            unlabelled = [torch.isin(each.cpu(), torch.tensor(absent)) for each in labels if each.dtype != torch.bool]
            if (trace.loss is not None and trace.error is None) or not unlabelled:
                break
            rows = (~torch.stack(unlabelled).any(dim=0)).nonzero().flatten().tolist()
            if 0 < len(rows) < count:
                fewer = picked(batch, rows, count)
                again = self.run(fewer, step)
                if again.error is None and (again.loss is not None or trace.error is not None):
                    return fewer, again
        return batch, trace

    def run(self, batch: Any, step: StepName, seed: int | None = None, training: bool = False) -> StepTrace:
        """Run one step, which may fail: what was seen of it."""
        with evaluating(self._module, self._trainer) as twin, preserved_random_state(seed), torch.no_grad():
            if training:
                twin.module.train()
            own = cloned(batch)
            recorder = StepRecorder(twin.module, own, None, self._module)
            returned: object = None
            error: Exception | None = None
            with recorder.watching():
                try:
                    returned = run_step(twin.module, step, own)
                except Exception as raised:
                    error = raised
            return replace(recorder.trace(returned, error), is_exact=not training)

    def sure_labels(self, batch: Any, step: StepName, trace: StepTrace) -> Tensor | None:
        """Labels of a step that changes the images, if it does not change these: as where images are mixed."""
        again = self.run(batch, step, seed=1).labels
        is_sure = again is not None and trace.labels is not None and again.equal(trace.labels)
        return trace.labels if is_sure else None

    def failed(self, error: Exception | None) -> Exception:
        """What is raised where a step failed, or there is none."""
        name = type(self._module).__name__
        if error is None:
            return ValueError(f"Expected {name} to have a step, but it has none. {CURE}")
        failure = RuntimeError(f"A step of {name} failed with probe images: {error!r}. {CURE}")
        failure.__cause__ = error
        return failure


_STEP = "validation_step"


class StepWatch:
    """Puts itself round one call of a strategy's `validation_step`; nothing of the module's is changed.

    Attributes:
        trace: What was seen of the first step; None before, and where watching failed.
        failure: What the watching failed with, if it did.
    """

    def __init__(self) -> None:
        self.trace: StepTrace | None = None
        self.failure: Exception | None = None
        self._own: Any = None
        self._before: Any = None

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Watch the step that comes next, unless one was watched, or watching would change what it computes."""
        if self.trace is not None or self.failure is not None or not _is_neutral(module):
            return
        strategy = trainer.strategy
        step, self._before = strategy.validation_step, vars(strategy).get(_STEP)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.end(trainer)
            recorder = self._recorder(module, args)
            if recorder is None:
                return step(*args, **kwargs)
            with recorder.watching():
                returned = step(*args, **kwargs)
            self._conclude(recorder, returned)
            return returned

        vars(strategy)[_STEP] = self._own = watched

    def end(self, trainer: Trainer) -> None:
        """Watch no longer, and put back what stood there before."""
        own = vars(trainer.strategy)
        if self._own is not None and own.get(_STEP) is self._own:
            del own[_STEP]
            if self._before is not None:
                own[_STEP] = self._before
        self._own = self._before = None

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
    """Whether a step computes the same while it is watched: what is compiled would be compiled again."""
    if is_sharded(module):
        return False
    for child in module.modules():
        own = vars(child)
        compiled = own.get("_compiled_call_impl") is not None or "_orig_mod" in child._modules
        if compiled or any(hasattr(part, "_torchdynamo_orig_callable") for part in own.values() if callable(part)):
            return False
    functions = [vars(base) for base in type(module).__mro__] + [getattr(module.forward, "__globals__", {})]
    return not any(
        hasattr(part, "_torchdynamo_orig_callable") or type(part).__name__ == "OptimizedModule"
        for group in functions
        for part in list(group.values())
        if callable(part)
    )
