"""The folder of a run: its own, made whole, and nothing outside it is written."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from tests.models import random_images, tiny_vit
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking import run_folder as space
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import load_run
from vit_explain_callback.tracking.run_folder import RunFolder
from vit_explain_callback.tracking.writers import FolderWriter


def tracker(folder: Path | RunFolder, seed: int = 1) -> ExplanationTracker:
    folder = RunFolder(folder) if isinstance(folder, Path) else folder
    explainer, probe = Explainer(tiny_vit(), ["rollout"]), Probe.of(random_images(2, seed=seed))
    return ExplanationTracker(explainer, probe, folder=folder, writers=[FolderWriter(folder)], checks=None)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / "a") for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["a", "a_1", "a_2"]
    assert RunFolder(tmp_path / "a", folders[1].run).path == tmp_path / "a_1"
    (tmp_path / "b").mkdir()
    assert RunFolder(tmp_path / "b").path == tmp_path / "b"  # as yet empty
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").touch()
    assert RunFolder(tmp_path / "c").path == tmp_path / "c_1"


def test_a_second_run_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    for step, seed in ((0, 1), (5, 2)):
        one = tracker(tmp_path / "a", seed)
        before = contents(tmp_path)
        one.observe(step)
        one.finish()
        assert {path: content for path, content in contents(tmp_path).items() if path in before} == before
    assert [load_run(tmp_path / name).steps for name in ("a", "a_1")] == [[0], [5]]


def test_a_run_that_goes_on_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    first, other = tracker(tmp_path / "a"), tracker(tmp_path / "a")
    for one in (first, other):
        one.observe(0)
    resumed = tracker(tmp_path / "a")
    resumed.load_state_dict(other.state_dict())
    resumed.observe(3)
    assert [load_run(tmp_path / name).steps for name in ("a", "a_1")] == [[0], [0, 3]]
    assert not (tmp_path / "a_2").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_no_file_is_written_through_a_symbolic_link(tmp_path: Path) -> None:
    first = tracker(tmp_path / "run" / "a")
    first.observe(0)
    first.finish()
    written = sorted((tmp_path / "run" / "a").iterdir())
    assert {path.suffix for path in written} == {".safetensors", ".png", ".txt", ".html"}
    victims = tmp_path / "victims"
    victims.mkdir()
    for path in written:
        content = path.read_bytes()
        (victims / path.name).write_bytes(content if path.name == "run.txt" else b"precious")
        path.unlink()
        path.symlink_to(victims / path.name)
        path.with_name(f"{path.name}.partial").symlink_to(victims / f"{path.name}.partial")
    before = contents(victims)
    run = first.state_dict()["run"]
    assert RunFolder(tmp_path / "run" / "a", run).path.name == "a_1"  # a mark that is a link says nothing
    mark = tmp_path / "run" / "a" / "run.txt"
    mark.unlink()
    mark.write_text(run, encoding="utf-8")
    again = tracker(RunFolder(tmp_path / "run" / "a", run))
    with pytest.warns(UserWarning, match="is a symbolic link"):
        again.observe(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once by the folder, once by the writer
        again.finish()
    assert contents(victims) == before


def test_a_nearly_full_disk_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "SPARE_BYTES", 2**62)
    with pytest.warns(UserWarning, match=r"cannot write to the folder .* MB can be written to"):
        tracker(tmp_path / "a").observe(0)
    assert contents(tmp_path) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no sizes of files")
def test_the_largest_size_of_a_file_counts_as_space(tmp_path: Path) -> None:
    import resource

    known = resource.getrlimit(resource.RLIMIT_FSIZE)
    space.check_space(tmp_path / "not" / "there" / "yet")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (space.SPARE_BYTES + 1000, known[1]))
        space.check_space(tmp_path)
        (tmp_path / "log").write_bytes(bytes(1001))
        with pytest.raises(OSError, match=r"64\.0 MB can be written to"):
            space.check_space(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, known)
