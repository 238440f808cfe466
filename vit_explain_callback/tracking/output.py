"""Write a run: raw maps and the page to a folder, scalars and pictures to writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from vit_explain_callback.metrics.drift import DriftMetric
from vit_explain_callback.system.files import write_text
from vit_explain_callback.tracking import tags
from vit_explain_callback.tracking.errors import Guard
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.pictures import animations, figures, last_filmstrips
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import Run
from vit_explain_callback.tracking.run_folder import RunFolder, check_space
from vit_explain_callback.tracking.scalars import logged_at
from vit_explain_callback.tracking.settings import Level
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.tracking.writers import RunEnd, Writer

T = TypeVar("T")
PageWriter: TypeAlias = Callable[[Run, bool], Path | None]


class Output:
    """Writes a run on its first process. A failure is reported once, and the rest is still written.

    Args:
        probe: The images.
        folder: Folder of raw maps and page, or None.
        writers: Writers of scalars and pictures.
        level: Which of these are written.
        metrics: Drift metrics besides the built-in ones.
        write_page: Writes the page of a run and returns the file, or None if it skipped this snapshot (never the last).
        guard: Reports failures.

    Attributes:
        folder: Folder of raw maps and page, or None.
        writers: Writers of scalars and pictures.
    """

    def __init__(
        self,
        probe: Probe,
        folder: RunFolder | None,
        writers: Sequence[Writer],
        level: Level,
        metrics: Sequence[DriftMetric],
        write_page: PageWriter | None,
        guard: Guard,
    ) -> None:
        self.folder, self.writers = folder, tuple(writers)
        self._probe, self._level, self._metrics, self._guard = probe, level, metrics, guard
        self._page = write_page
        self._begun = False
        self._written: set[str] = set()
        self._rows: dict[int, dict[str, float]] = {}

    def add(self, history: History, measured: Mapping[str, float], now: Snapshot) -> None:
        """Write the latest snapshot.

        Args:
            history: The snapshots so far.
            measured: Every scalar of the latest snapshot.
            now: The latest snapshot, with its maps before pooling.
        """
        self._keep_row(history, measured)
        values = logged_at(self._level, measured)
        self._written = set(values)
        if not self._begun:
            self._begun = True
            self._to_folder(lambda folder: self._probe.save(folder / "probe.safetensors"))
        self._to_folder(lambda folder: now.save(folder / f"step_{now.step:08d}.safetensors"))
        if self.writers:
            pictures = dict(figures(history, self._probe, self._level))
            self._to_writers(lambda writer: writer.scalars(values, now.step))
            self._to_writers(lambda writer: writer.pictures(pictures, now.step))
        self._write_page(history, is_last=False)

    def end(self, history: History, measured: Mapping[str, float], text: str) -> None:
        """Write what is known only at the end.

        Args:
            history: The snapshots.
            measured: Every scalar of the latest snapshot, now that it has been checked.
            text: The summary.
        """
        now = history.now
        self._to_folder(lambda folder: now.save_checked(folder / f"step_{now.step:08d}.safetensors"))
        self._to_folder(lambda folder: write_text(folder / "summary.txt", text + "\n"))
        self._keep_row(history, measured)
        page = self._write_page(history, is_last=True)
        if not self.writers:
            return
        new = self._new(measured, list(now.maps))
        if new:
            self._to_writers(lambda writer: writer.scalars(new, now.step))
        moving = dict(animations(history, self._probe)) if self._level == "full" else {}
        end = RunEnd(now.step, text, dict(last_filmstrips(history, self._probe)), moving, page)
        self._to_writers(lambda writer: writer.finish(end))

    def _new(self, measured: Mapping[str, float], methods: Sequence[str]) -> dict[str, float]:
        """Scalars that the writers do not have yet."""
        values = logged_at(self._level, measured)
        new = {tag: value for tag, value in values.items() if tag not in self._written}
        if self._level == "full":
            finals = tags.final(methods, self._probe.regions)
            new |= {final: values[tag] for final, tag in finals.items() if tag in values}
        return new

    def _keep_row(self, history: History, measured: Mapping[str, float]) -> None:
        """Store every scalar of the latest snapshot for the page; drop those of snapshots that were thinned out."""
        steps = {snapshot.step for snapshot in history.snapshots}
        self._rows = {step: row for step, row in self._rows.items() if step in steps}
        self._rows[history.now.step] = {"step": history.now.step, **measured}

    def _write_page(self, history: History, is_last: bool) -> Path | None:
        """Write the page of the run so far; the file, if it was written.

        Snapshots from before a run was resumed have no scalars.
        """
        page, snapshots = self._page, history.snapshots
        if page is None:
            return None
        rows = [self._rows.get(one.step, {"step": one.step}) for one in snapshots]
        return self._to_folder(lambda folder: page(Run(folder, self._probe, snapshots, rows, self._metrics), is_last))

    def _to_folder(self, write: Callable[[Path], T]) -> T | None:
        folder = self.folder
        if folder is None:
            return None

        def make_and_write() -> T:
            check_space(folder.preferred)
            return write(folder.path)

        return self._guard.attempt(f"cannot write to the folder {folder}", make_and_write)

    def _to_writers(self, write: Callable[[Writer], None]) -> None:
        for writer in self.writers:
            self._guard.attempt(f"cannot write to {writer!r}", partial(write, writer))
