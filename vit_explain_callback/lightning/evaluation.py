"""Evaluate a twin of a LightningModule, in its precision and with a trainer that can be asked but not used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.stand_in import StandIns, unheard
from vit_explain_callback.vit.isolation import undisturbed
from vit_explain_callback.vit.twin import Twin

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
