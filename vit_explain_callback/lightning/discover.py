"""Find what a run explains: its probe images, and how its module is run on them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.isolation.wrappers import is_sharded
from vit_explain_callback.lightning._compat import LightningModule, Trainer, is_kind, is_overridden
from vit_explain_callback.lightning.adapter import LightningAdapter, transferred
from vit_explain_callback.lightning.batches import BatchBuffer, images_and_labels
from vit_explain_callback.lightning.outputs import OutputFinder
from vit_explain_callback.lightning.probe_batch import class_names, probe_batch, validation_size
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.lightning.steps import TwinSteps
from vit_explain_callback.lightning.trace import StepTrace
from vit_explain_callback.options.model import LogitsOf
from vit_explain_callback.tracking.distributed import Ranks
from vit_explain_callback.tracking.errors import is_refusal, warn
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.vit.adapter import Adapter, PlainAdapter
from vit_explain_callback.vit.timm import check_classifier, find_vit, normalisation, refuse_other_timm_models

_FEW = 16
"""Images to run a step with if only its loss is needed."""


@dataclass(frozen=True)
class Discovered:
    """What a run explains.

    Attributes:
        explainer: Explains the module.
        probe: The images.
        is_first: Whether they are the first images of the validation, because others could not be read.
        description: What is explained, for the greeting.
    """

    explainer: Explainer
    probe: Probe
    is_first: bool = False
    description: str = ""


def discover(
    settings: Settings,
    trainer: Trainer,
    module: LightningModule,
    ranks: Ranks,
    buffer: BatchBuffer,
    trace: StepTrace | None,
) -> Discovered | None:
    """Find what to explain: the user's images, or validation images; None if these must be watched first.

    Args:
        settings: The options of the callback.
        trainer: The trainer.
        module: The module that it trains.
        ranks: The processes.
        buffer: The validation images seen so far.
        trace: Trace of the first validation step, if it was watched.

    Raises:
        TypeError: If a batch holds no images.
        ValueError: If the module cannot be explained.
        RuntimeError: If reading the images fails.
    """
    vit = settings.model.get("vit")
    if settings.needs_vit:
        refuse_other_timm_models(module if vit is None else find_vit(module, vit))
    finder = OutputFinder(module, trainer, vit, settings.needs_vit, settings.model.get("task"))
    discovery = _Discovery(settings, trainer, module, ranks, finder)
    return discovery.from_validation(buffer, trace) if settings.images is None else discovery.from_images(trace)


@dataclass(frozen=True)
class _Discovery:
    settings: Settings
    trainer: Trainer
    module: LightningModule
    ranks: Ranks
    finder: OutputFinder

    @property
    def _is_called(self) -> bool:
        """Whether the module is called as a whole: by the user's `forward`, or because its parameters are sharded."""
        return self.settings.model.get("forward") is not None or is_sharded(self.module)

    def from_validation(self, buffer: BatchBuffer, trace: StepTrace | None) -> Discovered | None:
        # The first process reads the images and sends them to all.
        read = partial(_read_or_buffered, self.trainer, self.settings.num_images, buffer)
        gathered = self.ranks.together(lambda: (*read(), trace) if self.ranks.rank == 0 else (None, False, None))
        batch, is_ready, trace = gathered[0]
        if batch is None:
            return None
        if self._is_called:
            images, labels = images_and_labels(_on_device(self.trainer, self.module, batch, is_ready))
            return self._discovered(self._calling_adapter(), images, labels, is_first=is_ready)
        try:
            outputs = self.ranks.alike(lambda: self.finder.for_batch(batch, is_ready, trace))
        except RuntimeError:  # the step may take batches of several loaders at once; the buffer of one process has them
            if is_ready or buffer.batch is None or self.ranks.count > 1:
                raise
            outputs, is_ready = self.finder.for_batch(buffer.batch, True, trace), True
        if outputs.notice is not None:
            warn(outputs.notice)
        discovered = self._discovered(outputs.adapter, outputs.images, outputs.labels, is_first=is_ready)
        return replace(discovered, description=outputs.description)

    def from_images(self, trace: StepTrace | None) -> Discovered:
        assert self.settings.images is not None
        images, labels = self.settings.images
        first: StepTrace | None = None
        if not self._is_called:
            first = self.ranks.together(lambda: trace)[0]
            if first is None or not first.seen:
                first = _traced_on_a_copy(self.trainer, self.module, self.ranks)
        if first is not None:
            try:
                outputs = self.ranks.alike(lambda: self.finder.for_images(images, labels, first))
                discovered = self._discovered(outputs.adapter, outputs.images, labels)
                return replace(discovered, description=outputs.description)
            except Exception as error:
                if is_refusal(error):
                    raise
        # The module's parts may not take these images; the module itself may, or says what it takes.
        return self._discovered(self._calling_adapter(), images, labels)

    def _discovered(
        self, adapter: Adapter, images: Tensor, labels: Tensor | None, is_first: bool = False
    ) -> Discovered:
        settings, display = self.settings, self.settings.display
        if settings.images is None:
            images, labels = images[: settings.num_images], None if labels is None else labels[: settings.num_images]
            if len(images) < settings.num_images:
                warn(
                    f"`num_images={settings.num_images}`, but {_number_read(self.trainer, len(images))}; these are "
                    "used. Pass others with `images=`."
                )
        vit = find_vit(adapter.model, adapter.vit) if settings.needs_vit else adapter.model
        probe = Probe.of(
            images,
            labels,
            regions=settings.regions,
            class_names=display.class_names or class_names(self.trainer),
            regression=adapter.regression,
            multilabel=getattr(adapter, "task", None) == "multilabel",
            normalisation=display.normalisation or normalisation(vit),
            num_shown=display.num_shown,
        )
        options = settings.model
        tokens: Any = {name: options.get(name) for name in ("prefix_tokens", "grid_size")}
        return Discovered(Explainer(adapter, settings.methods, **tokens), probe, is_first)

    def _calling_adapter(self) -> Adapter:
        """Calls the module, its ViT or the user's `forward`."""
        options, module = self.settings.model, self.module
        vit, forward, task = options.get("vit"), options.get("forward"), options.get("task")
        model = _explained_module(module, vit, forward, self.settings.needs_vit)
        if is_sharded(module):
            forward = forward or _forward_of(self.trainer)
            return PlainAdapter(model, vit if model is module else None, forward, task == "regression")
        if model is not module:
            check_classifier(model)
        path = "" if model is module else next(name for name, child in module.named_modules() if child is model)
        return LightningAdapter(module, self.trainer, vit, task or "classification", forward, (path,))


def _explained_module(
    pl_module: LightningModule, vit: str | None, forward: LogitsOf | None, needs_vit: bool
) -> nn.Module:
    """The module that turns images into logits: the LightningModule if it can, else the ViT itself.

    Raises:
        ValueError: If neither can.
    """
    if forward is not None or is_overridden("forward", pl_module):
        return pl_module
    if not needs_vit:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, but it does not. Say "
            "how to get them: `ViTExplainCallback(forward=lambda module, images: module.model(images))`."
        )
    vit_module = find_vit(pl_module, vit)
    if vit_module is pl_module:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to define `forward(images)`, returning logits, or `vit=` to name "
            "the attribute that holds its model, but got neither."
        )
    return vit_module


def _forward_of(trainer: Trainer) -> LogitsOf | None:
    """How to call the LightningModule if the strategy needs more than a plain call, else None."""
    if not is_kind(trainer.strategy, "FSDPStrategy"):
        return None
    # Only the outermost wrapper gathers parameters that lie outside every wrapped submodule.
    outermost = trainer.strategy.model

    def forward(_: nn.Module, images: Tensor) -> Any:
        assert outermost is not None
        return outermost(images)

    return forward


def _read_or_buffered(trainer: Trainer, num_images: int, buffer: BatchBuffer) -> tuple[Any, bool]:
    """A batch of validation images, and whether it has been through the transfer hooks; None if there is none yet.

    Buffered images are the first of the data, and often of one class; they are used if no others can be read.
    """
    try:
        batch = probe_batch(trainer, num_images)
    except RuntimeError as error:
        if buffer.batch is None:
            raise
        warn(
            f"the validation data cannot be read in a separate process ({error.__cause__!r}), so the first validation "
            "images are explained. Pass `images=(images, labels)` to choose others."
        )
        batch = None
    return (buffer.batch, True) if batch is None else (batch, False)


def _traced_on_a_copy(trainer: Trainer, module: LightningModule, ranks: Ranks) -> StepTrace | None:
    """Trace of a step that runs on a copy with a few images of the data; None if that fails."""

    def read() -> Any:
        with suppress(RuntimeError):  # not needed, as the user passed the images
            return probe_batch(trainer, _FEW, any_items=True)

    batch = ranks.together(lambda: read() if ranks.rank == 0 else None)[0]
    if batch is None:
        return None

    def run() -> StepTrace | None:
        with suppress(Exception):  # a step that fails is not needed either
            trace = TwinSteps(module, trainer).first_with_loss(transferred(module, trainer, batch))[2]
            return replace(trace, error=None)
        return None

    return ranks.together(run)[0]


def _number_read(trainer: Trainer, used: int) -> str:
    """Why there are fewer images than asked for, in words."""
    total = validation_size(trainer) or used
    if total <= used:
        return f"the validation set gave {used}"
    return (
        f"only {used} of the {total} validation images can be explained: those of one size, with a label if the step "
        "needs one"
    )


def _on_device(trainer: Trainer, module: LightningModule, batch: Any, is_ready: bool) -> Any:
    if is_ready:
        return batch
    if is_sharded(module):
        return trainer.strategy.batch_to_device(batch, module.device)
    return transferred(module, trainer, batch)


def ranks_of(trainer: Trainer) -> Ranks:
    """The processes of a trainer whose strategy is set up.

    Raises:
        ValueError: If the processes share out the heads of each attention.
    """
    strategy = trainer.strategy
    mesh = getattr(strategy, "_device_mesh", None)  # of `ModelParallelStrategy`, public only inside the module
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "Expected every process to compute all heads of an attention, but the strategy's `tensor_parallel_size`"
            f" is {mesh['tensor_parallel'].size()}: no process sees a whole attention matrix. Explain checkpoints "
            "of this run with `explain` instead."
        )
    whole_model = is_kind(strategy, "DDPStrategy") and not is_kind(strategy, "DeepSpeedStrategy")
    return Ranks(trainer.global_rank, trainer.world_size, trainer.world_size == 1 or whole_model)
