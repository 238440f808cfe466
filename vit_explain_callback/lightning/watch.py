"""Watch the first validation step of a fit, which the user's own loop runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from vit_explain_callback.lightning._compat import LightningModule, Trainer
from vit_explain_callback.lightning.trace import StepRecorder, StepTrace
from vit_explain_callback.vit.wrappers import is_sharded

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
