"""The one command for a GPU, tried on the CPU with a tiny model: what it runs, what it says, and how it ends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import cost, gpu
from tests.benchmarks.contenders import BACKWARD, FORWARD
from tests.benchmarks.cost import Configuration


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "in_new_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setitem(cost.MODELS, "Ti16", "test_vit")  # of six blocks, sixty-four wide
    monkeypatch.setattr(gpu, "TINY", [Configuration("Ti16", 16, 1, dtype) for dtype in ("float32", "bfloat16")])


def result(**changed: Any) -> dict[str, Any]:
    seen = {"kernels": {"flash_attention": 12}, "names": ["flash_fwd"], "busy": 0.5}
    found = {
        "name": "a",
        "seconds": [{FORWARD: 1.0, "rollout": 1.2, BACKWARD: 2.0, "grad_rollout": 2.6}],
        "skipped": {},
        "watched": dict.fromkeys(gpu.COMPARED, seen),
        "peak_bytes": {},
    }
    return found | changed


def test_the_command_says_which_kernel_ran_and_whether_the_targets_are_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--device", "cpu", "--rounds", "2", "--output", str(tmp_path / "gpu.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    for dtype in ("float32", "bfloat16"):
        name = f"Ti16-16-b1-{dtype}"
        for limit in (FORWARD, BACKWARD):
            assert f"{name}: {limit}: GPU's idle time not known; 6 × flash_attention_for_cpu" in printed
        assert any(line.startswith(f"{name}: grad_rollout: GPU's idle time") for line in printed)
        ends = [line for line in printed[-4:] if line.startswith(f"{name}: ")]
        assert [line.split(": ")[1] for line in ends] == ["rollout", "grad_rollout"]
        assert all(", met (" in line or ", missed (" in line for line in ends)
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["machine"]["versions"]["torch"]
    assert [len(each["seconds"]) for each in written["configurations"]] == [2, 2]
    assert written["configurations"][0]["peak_bytes"].keys() == gpu.COMPARED.keys()


def test_an_explanation_that_runs_another_kernel_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = result()["watched"]
    other = result(watched=seen | {"rollout": {"kernels": {"attention_math": 12}, "names": [], "busy": None}})
    assert gpu.other_kernels(result()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda _: {})
    monkeypatch.setattr(gpu, "examine", lambda *_: other)
    assert gpu.main(["--no-tests"]) == 1
    told = "ANOTHER KERNEL: a: rollout ran attention_math, but plain forward ran flash_attention"
    assert told in capsys.readouterr().out
    monkeypatch.setattr(gpu, "examine", lambda *_: result())
    assert gpu.main(["--no-tests"]) == 0


def test_targets_and_idle_time_are_told_apart() -> None:
    assert gpu.targets(result()) == [
        "a: rollout: 1.20 × plain forward, met (at most 1.25)",
        "a: grad_rollout: 1.30 × plain forward + backward, missed (at most 1.25)",
    ]
    assert gpu.report(result())[0] == "a: plain forward: GPU idle for 50%; 12 × flash_attention flash_fwd"
    without = result(seconds=[{FORWARD: 1.0, "rollout": 1.2}], skipped={BACKWARD: "too large"})
    assert gpu.targets(without)[1] == "a: grad_rollout: not measured"


def test_what_no_time_is_left_for_and_what_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--device", "cpu", "--minutes", "0"]) == 1
    assert "Ti16-16-b1-bfloat16: left out, as 0 s were left" in capsys.readouterr().out

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "examine", fail)
    assert gpu.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "Ti16-16-b1-float32: FAILED, RuntimeError: out of memory" in printed
    assert "NOTHING was measured" in printed


def test_tests_that_fail_or_take_too_long_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert not gpu.run_tests(60)
    assert "FAILED (pytest ended with 1)" in capsys.readouterr().out

    def never_end(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", never_end)
    assert not gpu.run_tests(60)
    assert "stopped after 60 s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_expected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "Expected a GPU that CUDA sees" in capsys.readouterr().err
