"""The Lightning callback: collects the probe images, explains them on schedule, and logs what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from vit_explain_callback.lightning._compat import Callback, LightningModule, Trainer
from vit_explain_callback.lightning.batches import BatchBuffer
from vit_explain_callback.lightning.fit import Fit
from vit_explain_callback.lightning.settings import MODEL_OPTIONS, CallbackModelOptions, Settings
from vit_explain_callback.lightning.state_key import changed_options
from vit_explain_callback.lightning.steps import FirstStepWatcher
from vit_explain_callback.methods.map_function import AnyMethod
from vit_explain_callback.metrics.drift import DriftMetric
from vit_explain_callback.options.rules import refuse_unknown
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.errors import Guard, guarded
from vit_explain_callback.tracking.settings import Checks, Detail, Level

_METHODS = ("rollout", "grad_rollout")
_NO_OPTIONS = ("self", "__class__", "model_options")


class ViTExplainCallback(Callback):
    """Explains the same validation images again and again while a Vision Transformer is fine-tuned.

    A snapshot is taken before the first optimiser step (the baseline), on schedule, and at the end of fit. It writes
    these scalars to TensorBoard, for every method and for every region in `regions`:

    - `explain/drift/baseline_rank_correlation/{method}`: mean rank correlation with the baseline's maps; 1 = unchanged.
    - `explain/drift/noise_to_unrelated/{method}`: drift since the baseline: 0 = as far as a change that should not
      matter moves the baseline's maps, 1 = as far apart as maps of different images; omitted if the two are about the
      same.
    - `explain/drift/previous_rank_correlation/{method}`: mean rank correlation with the previous snapshot's maps.
    - `explain/drift/baseline_{metric}/{method}`, `explain/drift/previous_{metric}/{method}`: by each of `metrics`.
    - `explain/faithfulness/{method}`, `explain/faithfulness/random`: see `symmetric_relevance_gain`.
    - `explain/lift/{region}/{method}`: share of the map on a region; 1 = the region's share of the image.
    - `explain/map/entropy/{method}`, `explain/map/sink_lift/{method}`: see `map_statistics` and `sink_lift`.
    - `explain/probe/accuracy` (with labels), `explain/probe/changed_predictions` (since the baseline),
      `explain/probe/target_probability`; or `explain/probe/output` for regression.

    It writes these pictures and this text:

    - `explain/filmstrip/{method}`: image, baseline, earlier snapshots, now; one row for each shown image, and at the
      end for the two images that changed most.
    - `explain/heatmap/blocks`: blocks by steps: rank correlation with the baseline of what the classifier's tokens
      attend to.
    - `explain/summary`: the run in words; at the end also on standard output and in `summary.txt`.

    With `detail="full"` it also writes:

    - `explain/final/drift/{method}`, `explain/final/faithfulness/{method}`, `explain/final/lift/{region}/{method}`: of
      the last snapshot.
    - `explain/overlay/{method}/{i}`, `explain/overlay_change/{method}/{i}`: the map of shown image i; now minus
      baseline. `explain/overlay_animation/{method}/{i}`: its overlays over the run, at the end.
    - `explain/statistics/attention/{stat}/{block}`: see `BlockStatistics`.
    - `explain/statistics/drift_baseline/{method}/{metric}`: means over the images, for the other metrics in
      `vit_explain_callback.metrics.drift`.
    - `explain/statistics/drift_baseline_scaled/{method}/{metric}`: 0 = noise, 1 = unrelated.
    - `explain/statistics/drift_baseline_split/{method}/{metric}/{part}`: mean over images whose prediction is
      `unchanged` or `changed`.
    - `explain/statistics/drift_baseline_spread/{method}/{metric}/{part}`: `median`, `p10`, `p90`.
    - `explain/statistics/drift_previous/{method}/{metric}`,
      `explain/statistics/drift_previous_scaled/{method}/{metric}`,
      `explain/statistics/drift_previous_split/{method}/{metric}/{part}`,
      `explain/statistics/drift_previous_spread/{method}/{metric}/{part}`: likewise since the previous snapshot.
    - `explain/statistics/drift_blocks/{metric}/{block}`: drift of what the classifier's tokens attend to in each block.
    - `explain/statistics/drift_scale/{method}/{metric}/{part}`: `noise`, the drift caused by a shift within a patch and
      a little grain, and by a mirror if the model's output hardly changes under it; `unrelated`, the drift between
      different images.
    - `explain/statistics/map/{method}/{stat}`, `explain/statistics/region/{region}/{method}/{stat}`: the rest of
      `map_statistics` and `region_statistics`.

    Raw maps go to `explanations/step_{step}.safetensors` in the run's folder; `load_run` recomputes everything from
    them. With two methods and `num_shown=3`, TensorBoard's event file grows by at most 300 kB per snapshot, and by
    500 kB more at the end; `Detail(max_pictures_mb=…)` bounds it.

    Every logged scalar is also in `trainer.callback_metrics`, for `ModelCheckpoint(monitor=…)` and `EarlyStopping`. One
    line at the start says what is watched. Training is left as it was: no random stream, gradient, buffer or training
    flag differs after a snapshot. With several processes, each explains a share.

    Args:
        methods: Names (`"rollout"`, `"grad_rollout"`, `"rollout_max_0.9"`, …) or objects (`AttentionRollout()`,
            `GradientRollout(head_fusion="max")`, `MapFunction("mine", function)`, …). `"flow"` takes seconds per image.
            With `MapFunction`s alone, any image classifier can be explained. Maps of more than 64 cells a side, such as
            pixel maps, are saved unchanged and pooled before they are measured.
        images: Images to explain, (B, C, H, W) normalised for the model, or the pair (images, labels). None takes them
            from the validation data.
        num_images: Number of images taken from the validation data, spread over it and its classes.
        regions: Boolean masks (B, H, W) of the probe images by name, such as the object or a watermark.
        target: Class whose logit gradient rollout differentiates, fixed over the run: `"label"` is the image's label,
            or the prediction at the baseline if there is no label; `"prediction"` is always the latter; or one class
            index.
        class_names: Class names for the captions. Default: the `classes` of the validation data set, if it has them.
        normalisation: (mean, std) of the images' normalisation, one number per channel, undone for display. Default:
            that of the timm model; without one, the range of the images is stretched.
        every_n_epochs: Epochs between snapshots. `"auto"` takes one with each validation, unless `every_n_steps` is
            given.
        every_n_steps: Optimiser steps between snapshots, instead of `every_n_epochs`.
        checks: Measure noise and faithfulness with every `checks`-th snapshot; None: with none. See `Checks`.
        metrics: Drift metrics to log besides rank correlation: names of those in `vit_explain_callback.metrics`, or
            `DriftMetric("mine", function, unchanged=1.0)`.
        detail: `"brief"` logs what is worth a first look, `"full"` logs everything. See `Detail`.
        num_shown: Number of images drawn, spread over the classes.
        save_maps: Whether to save the raw maps of every snapshot, and the page made from them.
        on_error: What to do when a snapshot fails during training: `"warn"` reports it and training continues,
            `"raise"` stops the run.
        **model_options: What the LightningModule does not say about itself: `vit`, `forward`, `task`, `prefix_tokens`,
            `grid_size` and `batch_size`; see `CallbackModelOptions`.

    Raises:
        TypeError: If an option has the wrong type or does not exist.
        ValueError: If an option is out of range; when fit starts, also if the LightningModule holds no supported ViT or
            several, if there is nothing to explain, or if images, labels or methods do not fit the model.

    Example:
        >>> callback = ViTExplainCallback(["rollout", "chefer"], every_n_steps=500, detail="full", vit="backbone")
        >>> callback.settings.model["vit"]
        'backbone'
    """

    def __init__(
        self,
        methods: Sequence[str | AnyMethod] = _METHODS,
        images: Tensor | tuple[Tensor, Tensor] | None = None,
        num_images: int = 16,
        regions: Mapping[str, Tensor] | None = None,
        target: Literal["label", "prediction"] | int = "label",
        class_names: Sequence[str] | None = None,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
        every_n_epochs: int | Literal["auto"] | None = "auto",
        every_n_steps: int | None = None,
        checks: int | Checks | None = 20,
        metrics: Sequence[str | DriftMetric] = (),
        detail: Level | Detail = "brief",
        num_shown: int = 3,
        save_maps: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        **model_options: Unpack[CallbackModelOptions],
    ) -> None:
        refuse_unknown(model_options, _DEFAULTS)
        options = {name: value for name, value in locals().items() if name not in _NO_OPTIONS}
        options |= dict.fromkeys(MODEL_OPTIONS) | model_options
        self.settings = Settings.of(options)
        options |= {"checks": self.settings.checks, "detail": self.settings.detail}
        self._state_key = f"{type(self).__qualname__}{changed_options(options, _DEFAULTS)}"
        self.guard = Guard(self.settings.on_error)
        self._fit: Fit | None = None
        self._previous: Fit | None = None
        self._state: dict[str, Any] | None = None
        self._buffer, self._step = BatchBuffer(self.settings.num_images), FirstStepWatcher()

    @property
    def tracker(self) -> ExplanationTracker | None:
        """The tracker with the snapshots of the latest fit; None until there are probe images."""
        return None if self._fit is None else self._fit.tracker

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer without validation images, and continue from the previous fit of the same module."""
        if stage == "fit":
            self._buffer, self._step = BatchBuffer(self.settings.num_images), FirstStepWatcher()
            self.guard = Guard(self.settings.on_error)
            self._previous, self._fit, self._state = self._fit, None, None
            if self._previous is not None:
                state_for = partial(self._previous.state_for, trainer, pl_module)
                self._state = self.guard.attempt("cannot continue from the previous fit", state_for)
            if self.settings.images is None and not trainer.enable_validation:
                raise ValueError(
                    "Expected a validation loader and a `validation_step` to take the probe images from, but there is "
                    "none. Pass the images: `ViTExplainCallback(images=(images, labels))`."
                )

    @guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the probe images and take the baseline, unless a checkpoint holds one."""
        place = _ours(trainer).index(self)
        watched = self._buffer, self._step
        self._fit = Fit(self.settings, trainer, pl_module, self._state, *watched, self.guard, place, self._previous)
        self._previous = None
        self._fit.begin()

    @guarded
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Take a snapshot every `every_n_steps` optimiser steps."""
        if self._fit is not None:
            self._fit.after_step()

    @guarded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a snapshot every `every_n_epochs` epochs."""
        if self._fit is not None:
            self._fit.after_epoch()

    @guarded
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Watch the first validation step, and buffer its images in case the data cannot be read otherwise."""
        if trainer.state.fn == "fit" and (self._fit is None or self._fit.watches):
            if self.settings.images is None:
                self._buffer.add(batch)
            self._step.begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching the step."""
        self._step.end(trainer)

    @guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a snapshot with each validation of the fit, unless there is another schedule."""
        if self._fit is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._fit.after_validation()

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last snapshot, unless the schedule has just taken it, and print the summary."""
        if self._fit is not None:
            self._fit.end()

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the references to trainer and module."""
        if self._fit is not None and stage == "fit":
            self._fit.release()

    @property
    def state_key(self) -> str:
        """Tells the callbacks of one trainer apart by their options."""
        return self._state_key

    @guarded
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the state of a run with other options, so that a warning can say why it cannot continue."""
        name = type(self).__qualname__
        states = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(name)}
        if len(_ours(trainer)) == 1 and len(states) == 1 and self.state_key not in states:
            (self._state,) = states.values()

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, baseline included, and the fingerprint of the probe images."""
        tracker = self.tracker
        state = None if tracker is None else self.guard.attempt("cannot save the snapshots", tracker.state_dict)
        return state or self._state or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the snapshots of the run that is resumed."""
        self._state = state_dict


def _ours(trainer: Trainer) -> list[ViTExplainCallback]:
    """The callbacks of this kind that a trainer has."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ViTExplainCallback)]


_DEFAULTS: dict[str, Any] = {
    **{
        name: parameter.default
        for name, parameter in signature(ViTExplainCallback).parameters.items()
        if name not in _NO_OPTIONS
    },
    **dict.fromkeys(MODEL_OPTIONS),
    "checks": Checks(),
    "detail": Detail(),
}
