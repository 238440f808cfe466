"""Evaluate a twin of a LightningModule, in its precision and with a trainer that can be asked but not used."""

from __future__ import annotations

import inspect
import io
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, Literal

import torch
from torch import nn

from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_overridden
from vit_explain_callback.lightning.stand_in import StandIn
from vit_explain_callback.vit.isolation import undisturbed
from vit_explain_callback.vit.twin import Twin, shallow_twin

StepName = Literal["validation_step", "training_step"]


@contextmanager
def evaluating(module: LightningModule, trainer: Trainer, guarded: bool = True) -> Iterator[Twin]:
    """A twin of a module, in the precision that its weights need."""
    folder = tempfile.TemporaryDirectory(prefix="vit_explain_")
    stand_in = StandIn(trainer, folder.name)
    replaced: dict[int, object] = {id(trainer): stand_in}
    replaced |= {id(child._trainer): stand_in for child in module.modules() if getattr(child, "_trainer", None)}
    if (data := getattr(trainer, "datamodule", None)) is not None:
        replaced[id(data)] = data
    with folder, ExitStack() as stack:
        twin = stack.enter_context(undisturbed(module, replaced, guarded))
        kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        if kinds - {torch.float32, torch.float64}:  # lower precision, all of it or in parts, needs what training has
            stack.enter_context(trainer.precision_plugin.forward_context())
        yield twin


def transferred(twin: nn.Module, trainer: Trainer, batch: Any, device: torch.device) -> Any:
    """A batch after the transfer hooks of the twin, or of a copy of the data module where that has its own."""
    module: Any = twin
    data = getattr(trainer, "datamodule", None)
    if data is not None:
        data = shallow_twin(data)
        data.trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(batch)
    for name, given in (
        ("on_before_batch_transfer", (0,)),
        ("transfer_batch_to_device", (device, 0)),
        ("on_after_batch_transfer", (0,)),
    ):
        owner = data if data is not None and is_overridden(name, data) else module
        batch = getattr(owner, name)(batch, *given)
    return batch


def run_step(twin: nn.Module, step: StepName, batch: Any) -> Any:
    """Call a step with as many arguments as it takes, by their place as Lightning does; what it prints goes nowhere.

    The index of the loader is given only where it is asked for by name or has no default.
    """
    function = getattr(twin, step)
    kinds = inspect.Parameter
    places = [one for one in inspect.signature(function).parameters.values() if one.kind < kinds.KEYWORD_ONLY]
    index_of_batch = len(places) > 1 or places[-1].kind == kinds.VAR_POSITIONAL
    more = [one for one in places[2:] if one.kind != kinds.VAR_POSITIONAL]
    index_of_loader = bool(more) and (more[0].name == "dataloader_idx" or more[0].default is kinds.empty)
    with redirect_stdout(io.StringIO()):
        return function(batch, *[0] * (index_of_batch + index_of_loader))
