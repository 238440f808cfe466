"""The Lightning callback: collects a probe batch, explains it on schedule, and logs what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from vit_explain_callback.lightning._compat import Callback, LightningModule, Trainer
from vit_explain_callback.lightning.batches import BatchBuffer
from vit_explain_callback.lightning.fit import Fit
from vit_explain_callback.lightning.settings import Settings
from vit_explain_callback.lightning.state_key import changed_options
from vit_explain_callback.lightning.steps import StepWatch
from vit_explain_callback.methods.map_function import AnyMethod
from vit_explain_callback.metrics.drift import DriftMetric
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.errors import Guard, guarded
from vit_explain_callback.tracking.reliability import RemovalOrAuto
from vit_explain_callback.tracking.scalars import Detail
from vit_explain_callback.vit.adapter import LogitsOf
from vit_explain_callback.vit.labels import Task

_METHODS = ("rollout", "grad_rollout")


class ViTExplainCallback(Callback):
    """Explains the same validation images again and again while a Vision Transformer is fine-tuned.

    A snapshot is taken before the first optimiser step (the baseline), on schedule, and at the end of fit. For every
    method, and for every region of `regions=`, it writes to TensorBoard the scalars

    - `explain/drift/baseline_rank_correlation/{method}`: mean rank correlation with the baseline's maps; 1 = unchanged.
    - `explain/drift/noise_to_unrelated/{method}`: drift since the baseline, 0 = as far as the baseline's maps move
      under a change that should not matter, 1 = as far apart as maps of different images; left out where these are
      about the same.
    - `explain/drift/previous_rank_correlation/{method}`: the same with the last snapshot's maps.
    - `explain/drift/baseline_{metric}/{method}`, `explain/drift/previous_{metric}/{method}`: by each of `metrics=`.
    - `explain/faithfulness/{method}`, `explain/faithfulness/random`: see `symmetric_relevance_gain`.
    - `explain/lift/{region}/{method}`: share of the map on a region; 1 = the region's share of the image.
    - `explain/map/entropy/{method}`, `explain/map/sink_lift/{method}`: see `map_statistics` and `sink_lift`.
    - `explain/probe/accuracy` (with labels), `explain/probe/changed_predictions` (since the baseline),
      `explain/probe/target_probability`; or `explain/probe/output` for regression.

    the pictures and the text

    - `explain/filmstrip/{method}`: image, baseline, earlier snapshots, now; a row for each shown image, and at the end
      for two more that changed most.
    - `explain/heatmap/blocks`: blocks by steps, rank correlation of what the classifier's tokens attend to with the
      baseline.
    - `explain/summary`: the run in words; at the end, on the standard output and in `summary.txt` too.

    and, with `detail="full"`,

    - `explain/final/drift/{method}`, `explain/final/faithfulness/{method}`, `explain/final/lift/{region}/{method}`: of
      the last snapshot.
    - `explain/overlay/{method}/{i}`, `explain/overlay_change/{method}/{i}`: the map of shown image i; now minus
      baseline. `explain/overlay_animation/{method}/{i}`: its overlays over the run; at the end.
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
      `explain/statistics/drift_previous_spread/{method}/{metric}/{part}`: likewise since the last snapshot.
    - `explain/statistics/drift_blocks/{metric}/{block}`: of what the classifier's tokens attend to in each block.
    - `explain/statistics/drift_scale/{method}/{metric}/{part}`: `noise`, the drift that a shift within a patch
      and a little grain cause, and a mirror where the model's output hardly changes in it; `unrelated`, the drift
      between different images.
    - `explain/statistics/map/{method}/{stat}`, `explain/statistics/region/{region}/{method}/{stat}`: the rest of
      `map_statistics` and `region_statistics`.

    The raw maps, from which `load_run` computes all of this again, go to `explanations/step_{step}.safetensors`
    in the run's folder. TensorBoard's event file grows by at most 300 kB a snapshot with two methods and `num_shown=3`,
    and by 500 kB more at the end; `max_pictures_mb` bounds it.

    Noise and faithfulness take extra passes. The baseline has its noise measured alone, as training waits for it; both
    are measured in the next snapshot, in every `check_every_n_snapshots` from there, and at the end. Every scalar that
    is logged is in `trainer.callback_metrics` too, for `ModelCheckpoint(monitor=…)` and `EarlyStopping`.
    One line says at the start what is watched. Training is left as it was: no random stream, gradient, buffer or
    training flag differs after a snapshot. Under several processes each explains a share.

    Args:
        methods: Names (`"rollout"`, `"grad_rollout"`, `"rollout_max_0.9"`, …) or `AttentionRollout`, `GradientRollout`,
            `AttentionFlow` and `MapFunction` objects. `"flow"` takes seconds an image. With `MapFunction`s alone no ViT
            is looked for, and any classifier of images is explained. Maps of more than 64 cells a side, as of pixels,
            are saved as they are and measured pooled.
        every_n_epochs: Epochs between snapshots. `"auto"` is 1, unless `every_n_steps` is given.
        every_n_steps: Optimiser steps between snapshots, instead of `every_n_epochs`.
        check_every_n_snapshots: Snapshots between those that also measure noise and faithfulness: one explanation
            more, 10 forward passes of 8 images for each method, 10 once a run, and 13 of two images. None: none does.
        removal: How faithfulness takes patches away: `"mean_colour"` paints them over, `"tokens"` keeps their tokens
            from the blocks, which takes half the time. Blocks with rotary or relative positions, masks or convolutions
            would mistake where the others are; that is measured at each check, and patches are then painted over.
            `"auto"` is `"tokens"` where the model allows it.
        num_images: Images taken from the start of the validation set; drift is averaged over them.
        images: Images to explain instead, (B, C, H, W) normalised for the model; or the pair (images, labels).
        regions: Boolean masks (B, H, W) of the probe images by name, such as the object or a watermark.
        num_shown: Images drawn, spread over the classes.
        target: Class whose logit gradient rollout follows: `"label"` is the image's label where the batch has one and
            else the prediction at the baseline; `"prediction"` is always the latter; or one class index. It stays
            fixed over the run.
        block_statistics: Whether to measure what each block attends to.
        metrics: Measures of drift to log besides rank correlation: names of those in
            `vit_explain_callback.metrics.drift`, or `DriftMetric("mine", function, unchanged=1.0)`.
        vit: Attribute path of the ViT inside the LightningModule, needed where it holds several.
        class_names: Names for the captions. Default: the `classes` of the validation dataset, if it has them.
        mean: Mean with which images were normalised, to undo it for display. Default: the timm model's own, or, where
            there is none, the range of the images is stretched.
        std: Standard deviation, likewise.
        forward: How to get logits (B, C) from the LightningModule and images, if not those that the loss of its step
            is computed of.
        task: What the outputs are, `"classification"`, `"multilabel"` or `"regression"`, if not what the loss says.
        prefix_tokens: Number of tokens before the patches, where the layout of the tokens cannot be told.
        grid_size: Patches as (grid_h, grid_w), likewise.
        batch_size: Images explained in one pass; None takes all at once.
        save_maps: Whether to save the raw maps of every snapshot, from which `vit-explain report` makes a page.
        report: Whether to write this page, `report.html` beside the maps, during the run as well.
        margin_charts: Whether to lay out TensorBoard's custom scalars pane as charts of the median between p10 and p90,
            with `detail="full"`. TensorBoard knows one layout a run.
        detail: `"brief"` logs what is to be looked at first, `"full"` everything.
        max_pictures_mb: Megabytes that all pictures of a run may take in TensorBoard's event file.
        on_error: What becomes of a snapshot that fails during training: `"warn"` says so and goes on, `"raise"` stops.

    Raises:
        TypeError: If methods or images are of the wrong type.
        ValueError: If an argument is outside its range; when fit starts, also if the LightningModule holds no supported
            ViT or several, if there is nothing to explain, or if images, labels or methods do not fit the model.
    """

    def __init__(
        self,
        methods: Sequence[str | AnyMethod] = _METHODS,
        every_n_epochs: int | Literal["auto"] | None = "auto",
        every_n_steps: int | None = None,
        check_every_n_snapshots: int | None = 20,
        removal: RemovalOrAuto = "auto",
        num_images: int = 16,
        images: Tensor | tuple[Tensor, Tensor] | None = None,
        regions: Mapping[str, Tensor] | None = None,
        num_shown: int = 3,
        target: Literal["label", "prediction"] | int = "label",
        block_statistics: bool = True,
        metrics: Sequence[str | DriftMetric] = (),
        vit: str | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        forward: LogitsOf | None = None,
        task: Task | None = None,
        prefix_tokens: int | None = None,
        grid_size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        save_maps: bool = True,
        report: bool = True,
        margin_charts: bool = True,
        detail: Detail = "brief",
        max_pictures_mb: float = 100.0,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        asked = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.settings = Settings.of(asked)
        self._state_key = f"{type(self).__qualname__}{changed_options(asked, ViTExplainCallback.__init__)}"
        self.guard = Guard(self.settings.on_error)
        self._fit: Fit | None = None
        self._before: Fit | None = None
        self._state: dict[str, Any] | None = None
        self._watched, self._step = BatchBuffer(self.settings.num_images), StepWatch()

    @property
    def tracker(self) -> ExplanationTracker | None:
        """What holds the snapshots of the latest fit, once there are probe images."""
        return None if self._fit is None else self._fit.tracker

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that everything asked for can work."""
        if stage == "fit":
            self._watched, self._step = BatchBuffer(self.settings.num_images), StepWatch()
            self.guard = Guard(self.settings.on_error)
            before, self._before, self._fit = self._fit, self._fit, None
            self._state = None
            if before is not None:
                go_on = partial(before.state_for, trainer, pl_module)
                self._state = self.guard.attempt("cannot go on from the fit before", go_on)
            if self.settings.given is None and not trainer.enable_validation:
                raise ValueError(
                    "Expected a validation loader (and a `validation_step`) to take the probe images from, but there "
                    "is none. Give the images yourself: `ViTExplainCallback(images=(images, labels))`."
                )

    @guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the probe images and take the baseline, unless a checkpoint brought one."""
        place = _ours(trainer).index(self)
        seen = self._watched, self._step
        self._fit = Fit(self.settings, trainer, pl_module, self._state, *seen, self.guard, place, self._before)
        self._before = None
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
        """Keep images of validation data that cannot be read otherwise."""
        if trainer.state.fn == "fit" and (self._fit is None or self._fit.watches):
            if self.settings.given is None:
                self._watched.take(batch)
            self._step.begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no step any longer."""
        self._step.end(trainer)

    @guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a snapshot with each validation of the fit, unless another schedule was asked for."""
        if self._fit is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._fit.after_validation()

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last snapshot, unless the schedule has just done so, and say what the run shows."""
        if self._fit is not None:
            self._fit.end()

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer and its module."""
        if self._fit is not None and stage == "fit":
            self._fit.release()

    @property
    def state_key(self) -> str:
        """Tells the callbacks of one trainer apart, by what was asked of them."""
        return self._state_key

    @guarded
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the state of a run with other options, to say that it cannot go on."""
        name = type(self).__qualname__
        states = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(name)}
        if len(_ours(trainer)) == 1 and len(states) == 1 and self.state_key not in states:
            (self._state,) = states.values()

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, baseline included, and the fingerprint of the probe images."""
        tracker = self.tracker
        found = None if tracker is None else self.guard.attempt("cannot save the snapshots", tracker.state_dict)
        return found or self._state or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the snapshots of the run that is resumed."""
        self._state = state_dict


def _ours(trainer: Trainer) -> list[ViTExplainCallback]:
    """The callbacks of this kind that a trainer has."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ViTExplainCallback)]
