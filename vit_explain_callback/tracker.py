"""Track the explanations of a model over a run, in any training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.map_function import check_removal
from vit_explain_callback.metrics.drift import DriftMetric, resolve_metrics
from vit_explain_callback.options.images import as_target, check_images
from vit_explain_callback.options.rules import COUNT, FLAG, METRICS, NONE, ON_ERROR, checked_options, refuse_unknown
from vit_explain_callback.page.document import LivePage
from vit_explain_callback.system.terminal import Advance, progress
from vit_explain_callback.tracking.distributed import Ranks, explain_together
from vit_explain_callback.tracking.errors import Guard, OnError, warn
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.notices import Notices
from vit_explain_callback.tracking.output import Output
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.reliability import ReliabilityMeter
from vit_explain_callback.tracking.run_folder import RunFolder
from vit_explain_callback.tracking.scalars import drift_scalars, logged_at, scalars
from vit_explain_callback.tracking.settings import Checks, Detail, Level
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot
from vit_explain_callback.tracking.summary import summary
from vit_explain_callback.tracking.writers import Writer

_VERSION = 2  # of the state
_RULES = {"metrics": METRICS, "batch_size": COUNT | NONE, "progress": FLAG, "on_error": ON_ERROR}


class ExplanationTracker:
    """Explains the same images again and again, measures what changed, and writes the results.

    Args:
        explainer: Explains the model that is trained. Maps of more than 64 cells a side, such as pixel maps, are saved
            unchanged and pooled before they are measured; see `metrics.maps.pooled`.
        probe: The images to explain.
        folder: Folder for the raw maps, `step_*.safetensors` beside `probe.safetensors`, which `load_run` reads. If it
            holds another run, `{folder}_1` is used, and so on. None writes nothing to disk.
        writers: Receive scalars and pictures. A writer that fails does not stop the run.
        target: Class whose logit is differentiated, an integer or (B,). None, or -1 for an image, is the prediction at
            the baseline.
        checks: Measure noise and faithfulness with every `checks`-th snapshot, or `Checks`; None: with none.
        metrics: Drift metrics to log besides rank correlation: names of built-in ones, or `DriftMetric` objects. One
            that fails does not stop the run.
        detail: `"brief"` writes what is worth a first look, `"full"` writes everything; or `Detail`.
        batch_size: Images explained in one pass; None takes all at once.
        progress: Whether to show a progress bar on standard error for work that takes longer than two seconds.
        on_error: What to do when a writer or a check fails: `"warn"` reports it once and continues, `"raise"` raises.
        ranks: The processes of the run, and which of them this one is.

    Attributes:
        history: The snapshots so far.
        output: Writes the snapshots; its `writers` may be replaced.
        probe: The images to explain.
        methods: Names of the methods.
        explainer: Explains the model. It may be replaced by one with the same methods, for example for the next
            checkpoint of a series. None after `release`.

    Raises:
        TypeError: If the images or the target are of the wrong type.
        ValueError: If an argument is outside its range.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
        >>> probe = Probe.of(torch.randn(2, 3, 224, 224), torch.tensor([0, 3]))
        >>> tracker = ExplanationTracker(Explainer(model, ["rollout"]), probe, checks=None)
        >>> values = tracker.observe(step=0)  # before the first optimiser step, then as often as you like
        >>> round(values["explain/drift/baseline_rank_correlation/rollout"], 3)
        1.0
        >>> values = tracker.observe(step=10)
        >>> print(tracker.finish().splitlines()[0].split(":")[0])
        The model looks where it looked before
    """

    def __init__(
        self,
        explainer: Explainer,
        probe: Probe,
        *,
        folder: Path | RunFolder | None = None,
        writers: Sequence[Writer] = (),
        target: SupportsIndex | Tensor | None = None,
        checks: int | Checks | None = 20,
        metrics: Sequence[str | DriftMetric] = (),
        detail: Level | Detail = "brief",
        batch_size: int | None = None,
        progress: bool = False,
        on_error: OnError = "warn",
        ranks: Ranks | None = None,
        **unknown: NoReturn,
    ) -> None:
        refuse_unknown(unknown, ExplanationTracker.__init__.__kwdefaults__ or ())
        options = checked_options(
            {"metrics": metrics, "batch_size": batch_size, "progress": progress, "on_error": on_error}, _RULES
        )
        checks, detail = Checks.of("checks", checks), Detail.of("detail", detail)
        check_removal(checks.removal, explainer.methods)
        self.probe, self.history = probe, History()
        self.methods = [method.name for method in explainer.methods]
        self._images = _checked_images(probe)
        self._target = as_target(target, len(self._images))
        self.explainer: Explainer | None = explainer
        self._batch_size, self._block_statistics = options["batch_size"], detail.block_statistics
        self._ranks, self._guard = ranks or Ranks(), Guard(on_error)
        how = (checks.every_n_snapshots, None if probe.regression else checks.removal, self._batch_size)
        self._checks = ReliabilityMeter(*how, self._ranks, self._guard, probe.multilabel)
        self._notices = Notices(self.methods)
        self._level: Level = detail.level
        self._metrics = resolve_metrics(options["metrics"])
        self._shows_progress = progress and self._ranks.rank == 0
        run_folder = RunFolder(folder) if isinstance(folder, Path) else folder
        write_page = LivePage().write if detail.page else None
        self.output = Output(probe, run_folder, writers, detail.level, self._metrics, write_page, self._guard)

    def observe(self, step: int) -> dict[str, float]:
        """Take a snapshot: explain, measure and write. The first snapshot is the baseline.

        A second snapshot at the same step replaces the first, for weights that have been replaced since.

        Args:
            step: Optimiser steps taken so far.

        Returns:
            The logged scalars by tag, the same on every process.

        Raises:
            Exception: Whatever the model raised on any process.
        """
        repeats = self.history.count > 1 and self.history.now.step == step
        number = self.history.count - repeats
        due = self._checks.are_due(number)
        passes = self._checks.passes(len(self.methods), number > 0) if due else 0
        with self._progress(f"explaining {len(self.probe)} images at step {step}", 1 + passes) as advance:
            target = self.history.baseline.target if self.history.count else self._first_target()
            explanation = explain_together(
                self._ranks, self._model(), self._images, target, self._batch_size, self._block_statistics
            )
            advance()
            self.history.check_grids(explanation)
            reliability = self._reliability(explanation, number > 0, advance) if due else None
        if repeats:
            self.history.drop_latest()
        snapshot = Snapshot(step, explanation, reliability)
        self.history.add(snapshot)
        values = self._values()
        if self._ranks.rank == 0:
            for notice in self._notices.of(values):
                warn(notice)
            self.output.add(self.history, values, snapshot)
        return logged_at(self._level, values)

    def scalars(self) -> dict[str, float]:
        """The logged scalars of the latest snapshot, by tag."""
        return logged_at(self._level, self._values())

    def finish(self) -> str:
        """Check the latest snapshot if it has not been checked, and write the summary and the final pictures.

        Returns:
            The summary of the run in words.

        Raises:
            RuntimeError: If there is no snapshot.
        """
        if not self.history.count:
            raise RuntimeError("Expected at least one `observe(step)` before `finish()`, but there was none.")
        if self._checks.are_missing(self.history.now.reliability):
            self._guard.attempt("cannot check the last maps", self._check_latest)
        text = summary(self.history, self.probe)
        if self._ranks.rank == 0:
            self.output.end(self.history, self._values(), text)
        return text

    def _check_latest(self) -> None:
        now, passes = self.history.now, self._checks.passes(len(self.methods), True)
        with self._progress(f"checking the maps at step {now.step}", passes) as advance:
            reliability = self._reliability(now.explanation, True, advance)
        if reliability is not None:
            self.history.update_latest(reliability)

    def release(self) -> None:
        """Drop the references to model and writers; the snapshots stay."""
        self.explainer, self.output.writers = None, ()

    def state_dict(self) -> dict[str, Any]:
        """The stored snapshots and what identifies the run; loads with `weights_only=True`."""
        run = None if self.output.folder is None else self.output.folder.run
        about = {"version": _VERSION, "fingerprint": self.probe.fingerprint, "run": run}
        about["removal"] = self._checks.removal
        return {**about, **self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], step: int | None = None) -> None:
        """Continue from a `state_dict`; if that is impossible, say why and start with a new baseline.

        It is impossible if the state belongs to other images, methods or targets, or cannot be read. Snapshots in the
        folder beyond the step at which the run continues belong to another branch: see `RunFolder`.

        Args:
            state: What `state_dict` returned.
            step: Step at which the run continues; None: that of the latest snapshot in the state.
        """
        history = History()
        try:
            if state.get("version") != _VERSION:
                raise ValueError(f"Expected `version` to be {_VERSION}, but got {state.get('version')!r:.80}.")
            history.load_state_dict(state)
            reason = self._other_than(history, state) if history.count else None
        except ValueError as error:
            reason = f"cannot be read ({error})"
        if reason is not None:
            warn(f"the checkpoint's explanations {reason}, so a new baseline is taken.")
        elif history.count:
            self.history = history
            self._checks.resume(state.get("removal"), history.checked[-1] if history.checked else None)
            if self.output.folder is not None and isinstance(state.get("run"), str):
                self.output.folder.resume(state["run"], self.history.now.step if step is None else step)

    def _other_than(self, history: History, state: Mapping[str, Any]) -> str | None:
        """Why a history belongs to another run; None if it belongs to this one."""
        baseline, target = history.baseline, self._target
        if state.get("fingerprint") != self.probe.fingerprint or set(baseline.maps) != set(self.methods):
            return "are of other images or methods than this run's"
        if isinstance(target, Tensor):
            expected_target = torch.where(target < 0, baseline.prediction, target.cpu())
        else:
            expected_target = baseline.prediction if target is None else torch.full_like(baseline.target, target)
        return None if expected_target.equal(baseline.target) else "are of another `target` than this run's"

    def _values(self) -> dict[str, float]:
        """Every scalar of the latest snapshot, but for a user's metric that fails."""
        values = scalars(self.history, self.probe)
        for metric in self._metrics:
            add = partial(self._add_drift, values, metric)
            self._guard.attempt(f"cannot measure drift by `{metric.name}`", add)
        return values

    def _add_drift(self, values: dict[str, float], metric: DriftMetric) -> None:
        values |= drift_scalars(self.history, self.probe, metric)

    def _reliability(self, explanation: Explanation, with_gains: bool, advance: Advance) -> Reliability | None:
        baseline = self.history.baseline.reliability if self.history.count else None
        return self._checks.of(self._model(), self._images, explanation, baseline, with_gains, advance)

    def _progress(self, what: str, passes: int) -> AbstractContextManager[Advance]:
        return progress(f"ViTExplainCallback: {what}", passes, self._shows_progress)

    def _first_target(self) -> int | Tensor | None:
        target = self._target
        if not isinstance(target, Tensor) or (target >= 0).all():
            return target
        logits = self._ranks.alike(lambda: self._model().logits(self._images, batch_size=self._batch_size).cpu())
        return torch.where(target < 0, logits.argmax(dim=1), target)

    def _model(self) -> Explainer:
        if self.explainer is None:
            raise RuntimeError("Expected a tracker that still holds its model, but it was released.")
        return self.explainer


def _checked_images(probe: Probe) -> Tensor:
    if probe.images is None:
        raise ValueError("Expected a probe made with `Probe.of`, but got one that was read from a folder.")
    check_images(probe.images)
    return probe.images
