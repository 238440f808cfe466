"""Runs of several real processes on the CPU: shares, gathered maps, failures on one of them, sharded parameters."""

from __future__ import annotations

import math
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bits import differing
from tests.models import tiny_vit
from tests.processes import ROOT, pythons
from tests.runs import Pictures
from vit_explain_callback import explain
from vit_explain_callback.tracking.distributed import Ranks

SECONDS = 240
IMAGES = 5
# Each process learns from the user's step how the model is run, tries whether its parts give the same, of one image
# alone too, and looks for the ViT in them.
LEARNT = [IMAGES, IMAGES, 1, IMAGES]


def start(folder: Path, *options: str, devices: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """A run of several processes, started as Lightning starts them; one that hangs is killed and fails the test."""
    folder.mkdir()
    command = ["-m", "tests.processes_run", "--output", str(folder), "--num-images", str(IMAGES)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    environments = [{**shared, "WORLD_SIZE": str(devices), "LOCAL_RANK": str(rank)} for rank in range(devices)]
    return pythons([[*command, "--devices", str(devices), *options]] * devices, ROOT, environments, SECONDS)


def ranks(folder: Path, *options: str, devices: int = 2) -> list[dict[str, Any]]:
    """What each process saw, with the callback; the weights are those of a run without it."""
    for done in start(folder, *options, devices=devices):
        assert done.returncode == 0, done.stderr
    seen = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank_*.pt"))]
    for rank in seen:
        assert differing(rank["with"]["weights"], rank["without"]["weights"]) == []
        assert rank["without"]["explained"] == []
        assert rank["with"]["reductions"] == rank["without"]["reductions"]
    return [rank["with"] for rank in seen]


def assert_first_maps_are_those_of_one_process(seen: dict[str, Any]) -> None:
    data = Pictures()
    images, labels = seen["probe"]
    places = [next(i for i, known in enumerate(data.images) if known.equal(image)) for image in images]
    assert len(set(places)) == IMAGES
    assert labels.equal(data.labels[places])
    assert sorted(labels.tolist()) == [0, 1, 2, 3, 4]
    expected = explain(tiny_vit(), images, target=labels)
    for name, maps in expected.maps.items():
        torch.testing.assert_close(seen["snapshots"][0][f"map/{name}"], maps, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen["snapshots"][0]["logits"], expected.logits)


def forward_passes(share: int, between: list[int] | None = None) -> list[int]:
    """Images in each forward pass of 5 snapshots, of which the first two and the last are checked.

    After the first, one image shows what the head reads. The noise takes the nudged images, and at the baseline, on
    every process alike, the mirrored ones. Faithfulness takes ten passes for each of two methods and, the first time,
    for a random order, and 13 of two images, on every process alike, to see that tokens can be left out.
    """
    baseline = [share, 1, IMAGES, share]
    second = [share, share, *[2] * 13, *[share] * 30]
    return [*baseline, *second, *([share] * 3 if between is None else between), share, *[2] * 13, *[share] * 20]


@pytest.mark.parametrize("devices", [2, 4])
def test_ddp_divides_the_probe_batch_and_every_process_knows_the_whole(devices: int, tmp_path: Path) -> None:
    seen = ranks(tmp_path / "run", devices=devices)
    assert len(seen) == devices
    for one in seen:
        assert one["explained"] == LEARNT + forward_passes(math.ceil(IMAGES / devices))
        assert differing(one["snapshots"], seen[0]["snapshots"]) == []
        assert differing(one["metrics"], seen[0]["metrics"]) == []
        assert one["metrics"]
        assert len(one["reductions"]) >= 4  # a snapshot adds none
        assert one["said"] == []
    assert [snapshot["step"] for snapshot in seen[0]["snapshots"]] == [0, 1, 2, 3, 4]
    assert_first_maps_are_those_of_one_process(seen[0])
    assert len(list(tmp_path.rglob("step_*.safetensors"))) == 5  # rank zero alone writes


def test_a_forward_that_waits_for_all_processes_with_fewer_images_than_these(tmp_path: Path) -> None:
    seen = ranks(tmp_path / "run", "--talking", "--num-images", "2", devices=3)
    for one in seen:
        assert one["explained"] == seen[0]["explained"]
        assert differing(one["snapshots"], seen[0]["snapshots"]) == []
        assert [snapshot["step"] for snapshot in one["snapshots"]] == list(range(len(one["snapshots"])))
    images, labels = seen[0]["probe"]
    expected = explain(tiny_vit(), images, target=labels)
    for name, maps in expected.maps.items():
        torch.testing.assert_close(seen[0]["snapshots"][0][f"map/{name}"], maps, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_sharded_parameters_need_every_process_in_every_forward_pass(strategy: str, tmp_path: Path) -> None:
    seen = ranks(tmp_path / "run", "--strategy", strategy)
    for one in seen:
        assert one["explained"] == forward_passes(IMAGES)
        assert differing(one["snapshots"], seen[0]["snapshots"]) == []
        assert [snapshot["step"] for snapshot in one["snapshots"]] == [0, 1, 2, 3, 4]
    assert_first_maps_are_those_of_one_process(seen[0])


def test_a_fault_on_one_process_is_shared_by_all_and_training_goes_on(tmp_path: Path) -> None:
    """At step 2 one process fails: no snapshot. At step 3 it is short of memory: all explain their shares in halves."""
    seen = ranks(tmp_path / "run", "--faulty")
    for one in seen:
        assert [snapshot["step"] for snapshot in one["snapshots"]] == [0, 1, 3, 4]
    assert seen[0]["explained"] == LEARNT + forward_passes(3, [3, 3, 2, 1, 3])
    assert seen[1]["explained"] == LEARNT + forward_passes(3, [2, 1, 3])  # where it fails, nothing is counted
    (said,) = seen[0]["said"]
    assert "the snapshot at step 2 failed: RuntimeError('this process cannot')" in said


def test_heads_divided_over_processes_are_refused(tmp_path: Path) -> None:
    each = start(tmp_path / "run", "--strategy", "tensor_parallel")
    assert all(done.returncode != 0 for done in each)
    assert "Expected every process to compute all heads of an attention" in "".join(done.stderr for done in each)


def test_shares_cover_all_images_once_and_are_of_one_size() -> None:
    for count in range(1, 10):
        for images in range(1, 12):
            whole = torch.arange(images)
            shares = [Ranks(rank, count).share(images) for rank in range(count)]
            assert {len(share.of(whole)) for share in shares} == {math.ceil(images / count)}
            assert torch.cat([share.of(whole)[: share.num_counted] for share in shares]).equal(whole)
            assert Ranks(count - 1, count, divided=False).share(images).of(whole).equal(whole)
