"""Several real processes explain a model whose forward waits for all of them: none waits for ever."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.in_step_run import Talking, run
from tests.processes import ROOT, pythons
from vit_explain_callback.tracking.distributed import Ranks

SECONDS = 200
"""After which processes that wait for one another are ended, and the test fails."""


def each(folder: Path, count: int, images: int, **options: Any) -> list[dict[str, Any]]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = ["-m", "tests.in_step_run", f"--count={count}", f"--images={images}", f"--folder={folder}", *given]
    done = pythons([[*command, f"--rank={rank}"] for rank in range(count)], ROOT, [{}] * count, SECONDS)
    assert [one.returncode for one in done] == [0] * count, "\n".join(one.stderr[-2000:] for one in done)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
    for one in found:
        assert one["passes"] == found[0]["passes"] or found[0]["errors"]
        assert one["errors"].keys() == found[0]["errors"].keys()
        assert one["total"] == count * (count - 1) / 2
        assert one["said"] == [] or one is found[0]
    return found


@functools.cache
def of_one_process(images: int, fault: str) -> dict[str, Any]:
    return run(Talking("", fault), images, Ranks(), None)


def assert_as_one_process(found: list[dict[str, Any]], images: int, fault: str = "") -> None:
    """The same maps, gains, scalars and words as of one process, in which the same fails."""
    expected = of_one_process(images, fault)
    for one in found:
        assert one["errors"].keys() == expected["errors"].keys()
        for snapshot, other in zip(one["snapshots"], expected["snapshots"], strict=True):
            assert snapshot.keys() == other.keys()
            assert snapshot["step"] == other["step"]
            for name in snapshot.keys() - {"step"}:
                torch.testing.assert_close(snapshot[name], other[name], rtol=1e-4, atol=1e-6, equal_nan=True)
        assert one["values"].keys() == expected["values"].keys()
        for step, values in one["values"].items():
            assert values == pytest.approx(expected["values"][step], rel=1e-3, abs=1e-5, nan_ok=True)
        assert one["summary"] == expected["summary"]


@pytest.mark.parametrize(("count", "images"), [(3, 2), (2, 5), (9, 16)])
def test_processes_with_fewer_images_than_others_make_the_same_passes(count: int, images: int, tmp_path: Path) -> None:
    assert_as_one_process(each(tmp_path, count, images), images)


@pytest.mark.parametrize("collective", ["gathered", "with_gradients", "functional", "objects"])
def test_any_collective_of_the_model_finds_all_processes(collective: str, tmp_path: Path) -> None:
    assert_as_one_process(each(tmp_path, 3, 4, collective=collective, batch_size=1), 4)


@pytest.mark.parametrize("collective", ["reduced", "gathered"])
def test_short_of_memory_all_halve_together(collective: str, tmp_path: Path) -> None:
    found = each(tmp_path, 3, 5, collective=collective, fault="memory")
    assert found[0]["errors"] == {}
    assert found[0]["passes"] == found[1]["passes"] == found[2]["passes"]
    assert_as_one_process(found, 5, "memory")


SAID = {
    "raises": "KeyError('this process cannot')",
    "unsendable": "this process cannot",
    "no memory": "out of memory",
    "once more": "Expected every process to run the model equally often, with the same collective operations",
}


@pytest.mark.parametrize("fault", SAID)
def test_a_process_that_fails_inside_a_forward_lets_none_wait(fault: str, tmp_path: Path) -> None:
    for one in (found := each(tmp_path, 3, 4, fault=fault)):
        assert list(one["errors"]) == [1]
        assert SAID[fault] in one["errors"][1]
    assert_as_one_process(found, 4, fault)


def test_a_model_that_catches_whatever_is_raised_cannot_go_on_alone(tmp_path: Path) -> None:
    for one in (found := each(tmp_path, 3, 4, fault="raises", collective="swallowed")):
        assert list(one["errors"]) == [1]
    assert_as_one_process(found, 4, "raises")


def test_a_check_that_fails_on_one_process_takes_no_maps_with_it(tmp_path: Path) -> None:
    found = each(tmp_path, 3, 4, fault="in a check")
    assert found[0]["errors"] == {}
    (said,) = found[0]["said"]
    assert "cannot measure the faithfulness of the maps" in said
    assert_as_one_process(found, 4, "in a check")
