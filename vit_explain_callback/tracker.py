"""Track the explanations of a model over a run, in any training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from vit_explain_callback._terminal import Advance, progress
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.map_function import check_removal
from vit_explain_callback.metrics.drift import DriftMetric, resolve_metrics
from vit_explain_callback.options.images import as_target, check_images
from vit_explain_callback.options.rules import checked_options
from vit_explain_callback.page.document import LivePage
from vit_explain_callback.tracking.distributed import Ranks, explain_together
from vit_explain_callback.tracking.errors import Guard, OnError, warn
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.notices import Notices
from vit_explain_callback.tracking.output import Output
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.reliability import ReliabilityMeter, RemovalOrAuto
from vit_explain_callback.tracking.run_folder import RunFolder
from vit_explain_callback.tracking.scalars import Detail, drift_scalars, of_detail, scalars
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot
from vit_explain_callback.tracking.summary import summary
from vit_explain_callback.tracking.writers import Writer

_VERSION = 2  # of the state


class ExplanationTracker:
    """Explains the same images again and again, measures what changed, and writes it down.

    Args:
        explainer: Of the model that is trained. Maps of more than 64 cells a side, as of pixels, are saved as they are
            and measured pooled; see `metrics.maps.pooled`.
        probe: The images.
        folder: Where raw maps go, as `step_*.safetensors` beside `probe.safetensors`, which `load_run` reads. One that
            holds another run is not added to: `{folder}_1` is taken, and so on. None keeps nothing on the disk.
        writers: Where scalars and pictures go. A writer that fails does not stop the run.
        target: Class whose logit the gradients are of, an integer or (B,); None, and -1 for an image, is the prediction
            at the baseline.
        check_every: Snapshots between those that also measure noise and faithfulness, the second being the first of
            them. The last always does, and the baseline has its noise measured. None: none is measured.
        removal: How faithfulness takes patches away, `"mean_colour"` or `"tokens"`; `"auto"` is `"tokens"` where the
            model allows it.
        batch_size: Images explained in one pass; None takes all at once.
        block_statistics: Whether to measure what each block attends to.
        metrics: Measures of drift to log besides rank correlation: names of built-in ones, or `DriftMetric` objects.
            One that fails does not stop the run.
        detail: `"brief"` measures everything, and writes what is to be looked at first; `"full"` writes everything.
        report: Whether to write the page `report.html` beside the maps, after a snapshot and at the end.
        progress: Whether a bar on standard error shows what takes longer than two seconds.
        on_error: What becomes of a writer or a check that fails: `"warn"` says it once and goes on, `"raise"` raises.
        ranks: Place of this process among those of the run.

    Attributes:
        history: The snapshots so far.
        output: Where it is written; its `writers` may be replaced.
        probe: The images.
        methods: Names of the methods.
        explainer: Of the model; another one with the same methods may take its place, as for the next checkpoint of a
            series. None once it was released.

    Raises:
        TypeError: If the images or the target are of the wrong type.
        ValueError: If an argument is outside its range.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
        >>> probe = Probe.of(torch.randn(2, 3, 224, 224), torch.tensor([0, 3]))
        >>> tracker = ExplanationTracker(Explainer(model, ["rollout"]), probe, check_every=None)
        >>> values = tracker.observe(step=0)  # before the first optimiser step, and as often as wanted after it
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
        check_every: int | None = 20,
        removal: RemovalOrAuto = "auto",
        batch_size: int | None = None,
        block_statistics: bool = True,
        metrics: Sequence[str | DriftMetric] = (),
        detail: Detail = "brief",
        report: bool = True,
        progress: bool = False,
        on_error: OnError = "warn",
        ranks: Ranks | None = None,
    ) -> None:
        read = checked_options(
            {
                "check_every": check_every,
                "removal": removal,
                "batch_size": batch_size,
                "block_statistics": block_statistics,
                "metrics": metrics,
                "detail": detail,
                "report": report,
                "progress": progress,
                "on_error": on_error,
            }
        )
        check_removal(removal, explainer.methods)
        if probe.images is None:
            raise ValueError("Expected a probe made with `Probe.of`, but got one that was read from a folder.")
        check_images(probe.images)
        self.probe, self.history = probe, History()
        self.methods = [method.name for method in explainer.methods]
        self._images, self._target = probe.images, as_target(target, len(probe.images))
        self.explainer: Explainer | None = explainer
        self._batch_size, self._block_statistics = read["batch_size"], read["block_statistics"]
        self._ranks, self._guard = ranks or Ranks(), Guard(on_error)
        removed = None if probe.regression else removal
        checks = (read["check_every"], removed, self._batch_size)
        self._checks = ReliabilityMeter(*checks, self._ranks, self._guard, probe.multilabel)
        self._notices = Notices(self.methods)
        self._detail: Detail = detail
        self._metrics = resolve_metrics(read["metrics"])
        self._shows_progress = progress and self._ranks.rank == 0
        own = RunFolder(folder) if isinstance(folder, Path) else folder
        self.output = Output(probe, own, writers, detail, LivePage().write if report else None, self._guard)

    def observe(self, step: int) -> dict[str, float]:
        """Take a snapshot: explain, measure and write. The first one is the baseline.

        A second one at the same step, of weights that were replaced since, takes the place of the one before.

        Args:
            step: Optimiser steps taken so far.

        Returns:
            The scalars that are logged of it, by tag; the same on every process.

        Raises:
            Exception: What the model raised on any process.
        """
        again = self.history.count > 1 and self.history.now.step == step
        number = self.history.count - again
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
        if again:
            self.history.drop_latest()
        snapshot = Snapshot(step, explanation, reliability)
        self.history.add(snapshot)
        values = self._values()
        if self._ranks.rank == 0:
            for notice in self._notices.of(values):
                warn(notice)
            self.output.add(self.history, values, snapshot)
        return of_detail(values, self._detail)

    def scalars(self) -> dict[str, float]:
        """The scalars that are logged of the latest snapshot, by tag."""
        return of_detail(self._values(), self._detail)

    def finish(self) -> str:
        """Check the latest snapshot, unless that is done, and write what is known at the end only.

        Returns:
            The summary in words.

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
        """Let go of the model and the writers; the snapshots stay."""
        self.explainer, self.output.writers = None, ()

    def state_dict(self) -> dict[str, Any]:
        """The snapshots kept, and whose they are; loads with `weights_only=True`."""
        run = None if self.output.folder is None else self.output.folder.run
        about = {"version": _VERSION, "fingerprint": self.probe.fingerprint, "run": run}
        about["removal"] = self._checks.removal
        return {**about, **self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], step: int | None = None) -> None:
        """Go on from what `state_dict` gave; where that cannot be, say why and begin anew.

        It cannot be if the state is of other images, methods or targets, or if it is not readable. Snapshots in the
        folder that are beyond the step at which the run goes on are of another branch: see `RunFolder`.

        Args:
            state: What `state_dict` gave.
            step: At which the run goes on; None is that of the latest snapshot in the state.
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
            self._checks.go_on(state.get("removal"), history.checked[-1] if history.checked else None)
            if self.output.folder is not None and isinstance(state.get("run"), str):
                self.output.folder.resume(state["run"], self.history.now.step if step is None else step)

    def _other_than(self, history: History, state: Mapping[str, Any]) -> str | None:
        """What keeps a history from being that of this run."""
        baseline, target = history.baseline, self._target
        if state.get("fingerprint") != self.probe.fingerprint or set(baseline.maps) != set(self.methods):
            return "are of other images or methods than this run's"
        if isinstance(target, Tensor):
            wanted = torch.where(target < 0, baseline.prediction, target.cpu())
        else:
            wanted = baseline.prediction if target is None else torch.full_like(baseline.target, target)
        return None if wanted.equal(baseline.target) else "are of another `target` than this run's"

    def _values(self) -> dict[str, float]:
        """Every scalar of the latest snapshot; without those of a metric of the user's that fails."""
        values = scalars(self.history, self.probe)
        for metric in self._metrics:
            add = partial(self._add_drift, values, metric)
            self._guard.attempt(f"cannot measure drift by `{metric.name}`", add)
        return values

    def _add_drift(self, values: dict[str, float], metric: DriftMetric) -> None:
        values |= drift_scalars(self.history, self.probe, metric)

    def _reliability(self, explanation: Explanation, with_gains: bool, advance: Advance) -> Reliability | None:
        known = self.history.baseline.reliability if self.history.count else None
        return self._checks.of(self._model(), self._images, explanation, known, with_gains, advance)

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
