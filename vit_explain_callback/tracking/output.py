"""Where a run goes: raw maps and the page to a folder, scalars and pictures to writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from vit_explain_callback._files import write_text
from vit_explain_callback.tracking.errors import Guard
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.pictures import animations, figures, last_filmstrips
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import Run
from vit_explain_callback.tracking.run_folder import RunFolder, check_space
from vit_explain_callback.tracking.scalars import Detail, final_tags, of_detail
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.tracking.writers import RunEnd, Writer

T = TypeVar("T")
PageWriter: TypeAlias = Callable[[Run, bool], Path | None]


class Output:
    """Writes a run down, on its first process. What fails is said once, and the rest goes on.

    Args:
        probe: The images.
        folder: Of raw maps and page, or None.
        writers: Of scalars and pictures.
        detail: Which of them.
        write_page: Writes the page of a run, told whether it is the last one, and gives the file if it did; or None.
        guard: What says that something failed.

    Attributes:
        folder: Of raw maps and page, or None.
        writers: Of scalars and pictures.
    """

    def __init__(
        self,
        probe: Probe,
        folder: RunFolder | None,
        writers: Sequence[Writer],
        detail: Detail,
        write_page: PageWriter | None,
        guard: Guard,
    ) -> None:
        self.folder, self.writers = folder, tuple(writers)
        self._probe, self._detail, self._guard = probe, detail, guard
        self._page = write_page
        self._begun = False
        self._written: set[str] = set()
        self._rows: dict[int, dict[str, float]] = {}

    def add(self, history: History, measured: Mapping[str, float], now: Snapshot) -> None:
        """Write the latest snapshot.

        Args:
            history: The snapshots so far.
            measured: Every scalar of it.
            now: It, with its maps as they were explained.
        """
        self._keep_row(history, measured)
        values = of_detail(measured, self._detail)
        self._written = set(values)
        if not self._begun:
            self._begun = True
            self._to_folder(lambda folder: self._probe.save(folder / "probe.safetensors"))
        self._to_folder(lambda folder: now.save(folder / f"step_{now.step:08d}.safetensors"))
        if self.writers:
            pictures = dict(figures(history, self._probe, self._detail))
            self._to_writers(lambda writer: writer.scalars(values, now.step))
            self._to_writers(lambda writer: writer.pictures(pictures, now.step))
        self._write_page(history, is_last=False)

    def end(self, history: History, measured: Mapping[str, float], text: str) -> None:
        """Write what is known at the end only.

        Args:
            history: The snapshots.
            measured: Every scalar of the latest one, now that it is checked.
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
        moving = dict(animations(history, self._probe)) if self._detail == "full" else {}
        end = RunEnd(now.step, text, dict(last_filmstrips(history, self._probe)), moving, page)
        self._to_writers(lambda writer: writer.finish(end))

    def _new(self, measured: Mapping[str, float], methods: Sequence[str]) -> dict[str, float]:
        """Scalars that the writers do not have yet."""
        values = of_detail(measured, self._detail)
        new = {tag: value for tag, value in values.items() if tag not in self._written}
        if self._detail == "full":
            finals = final_tags(methods, self._probe.regions)
            new |= {final: values[tag] for final, tag in finals.items() if tag in values}
        return new

    def _keep_row(self, history: History, measured: Mapping[str, float]) -> None:
        """Every scalar of the latest snapshot, for the page; those of snapshots that were thinned out go."""
        kept = {snapshot.step for snapshot in history.snapshots}
        self._rows = {step: row for step, row in self._rows.items() if step in kept}
        self._rows[history.now.step] = {"step": history.now.step, **measured}

    def _write_page(self, history: History, is_last: bool) -> Path | None:
        """The page of the run so far, if it was written.

        A snapshot of a run that was resumed has no scalars before it is loaded.
        """
        page, kept = self._page, history.snapshots
        if page is None:
            return None
        rows = [self._rows.get(one.step, {"step": one.step}) for one in kept]
        return self._to_folder(lambda folder: page(Run(folder, self._probe, kept, rows), is_last))

    def _to_folder(self, write: Callable[[Path], T]) -> T | None:
        folder = self.folder
        if folder is None:
            return None

        def make_and_write() -> T:
            check_space(folder.wanted)
            return write(folder.path)

        return self._guard.attempt(f"cannot write to the folder {folder}", make_and_write)

    def _to_writers(self, write: Callable[[Writer], None]) -> None:
        for writer in self.writers:
            self._guard.attempt(f"cannot write to {writer!r}", partial(write, writer))
