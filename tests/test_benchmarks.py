"""The benchmarks' own logic, on tiny models: what they compare is the same thing, and what they print can be read."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmarks import adapters, cost, leak, measure, model, noise, snapshot, structure, training_memory
from tests.benchmarks.contenders import BACKWARD, CONTENDERS, FIVE, FORWARD, materialised_maps
from tests.models import random_images, steady_vit, tiny_vit
from vit_explain_callback import explain
from vit_explain_callback.methods.names import method_from_name


def test_the_materialising_way_gives_the_maps_of_this_package() -> None:
    vit, images = tiny_vit().double(), random_images(3).double()
    names = [*FIVE, "rollout_0.9", "rollout_min", "grad_rollout_min_0.5_from2"]
    expected = explain(vit, images, names).maps
    found = materialised_maps(vit, [method_from_name(name) for name in names], images)
    assert found.keys() == expected.keys()
    for name, maps in expected.items():
        # The benchmark multiplies in float32, as one would.
        torch.testing.assert_close(found[name].double(), maps.flatten(1), rtol=1e-4, atol=1e-7)
    assert all(block.attn.fused_attn and not block.attn.attn_drop._forward_pre_hooks for block in vit.blocks)


def test_every_contender_has_a_limit_that_is_one() -> None:
    assert {contender.limit for contender in CONTENDERS.values()} == {FORWARD, BACKWARD}
    assert {contender.ours for contender in CONTENDERS.values()} - {None} <= CONTENDERS.keys()


def test_the_cost_benchmark_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "DEFAULT", [cost.Configuration("Ti16", 32, 1)])
    # In this process: another would not see the tiny configuration, and would take seconds to start.
    monkeypatch.setattr(cost, "in_new_process", lambda work, *arguments: work(*arguments))
    cost.main(
        ["--rounds", "2", "--threads", "1", "--contenders", "*grad_rollout", "--output", str(tmp_path / "c.json")]
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Ti16-32-b1-float32")]
    assert [row.split("|")[2].strip() for row in rows] == [
        FORWARD,
        BACKWARD,
        "grad_rollout",
        "materialised grad_rollout",
    ]
    written = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    (result,) = written["configurations"]
    assert len(result["seconds"]) == 2
    assert all(seconds > 0 for taken in result["seconds"] for seconds in taken.values())
    assert result["peak_bytes"].keys() == result["seconds"][0].keys()
    assert written["machine"]["versions"]["torch"]


def test_a_ratio_is_taken_within_each_round() -> None:
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 30.0, "b": 10.0}, {"a": 4.0, "b": 1.0}]
    assert cost.ratio(rounds, "a", "b") == "3.00 (2.20–3.80)"
    assert cost.ratio(rounds, "a", "c") == cost.ratio(rounds, "a", None) == ""


def test_peak_memory_sees_what_is_gone_at_the_end() -> None:
    size = 64 * 2**20

    def spike() -> None:
        held = torch.ones(size // 4)
        time.sleep(0.05)  # for the samples
        del held

    for peak in (measure.peak_bytes(spike, "cpu"), measure._sampled_peak(spike)):
        assert 0.8 * size < peak < 1.5 * size


def test_a_snapshot_is_split_into_its_parts() -> None:
    shape = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
    found = snapshot.measure("vit_tiny_patch16_224", 2, 2, 2, "full", **shape)
    assert found["parts"].keys() == snapshot.PARTS.keys() | snapshot.RARE.keys() | snapshot.WHOLE.keys()
    assert len(found["parts"]["explain"]) == 3  # the baseline and two steps
    assert len(found["parts"]["checks"]) == 3  # the baseline, the first step and the end
    ones = {part: [1.0] for part in snapshot.PARTS | snapshot.RARE}
    whole = {"observe": [5.0, 8.0, 2.0, 2.0], "finish": [3.0]}
    printed = snapshot.lines({"step": 0.1, "parts": {**ones, **whole}})
    assert printed[0] == "one training step 100 ms; an epoch of 500 steps 50 s"
    assert printed[5].split() == ["a", "snapshot", "4000.0", "ms", "8.0000%", "of", "an", "epoch"]
    ratios = [line.split(" x ")[0].split()[-1] for line in printed if " x a later" in line]
    assert ratios == ["2.50", "4.00", "1.50"]
    assert printed[-1].split() == ["all", "checks", "1.00", "s", "50%", "of", "all", "explaining"]


def test_the_cost_model_finds_the_coefficients_that_made_the_times() -> None:
    coefficients = np.array([2e-12, 3e-9, 0.01])
    terms = [case.time_terms(2) for case in model.FITTED]
    found = model.fit(terms, [float(coefficients @ row) for row in terms])
    np.testing.assert_allclose(found, coefficients, rtol=1e-6)
    four, two = (model.Case(16, ranks, 2, 12, 3, 14).time_terms(2) for ranks in (4, 2))
    assert four[:2] == two[:2]  # ranks beyond the cores are no faster


def test_memory_in_training_is_told_as_a_ratio(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["training_memory", "--model", "vit_tiny_patch16_224", "--size", "96", "--batch", "1"]
    )
    training_memory.main()
    assert re.search(r"1 images: \d+\.\d\d x the limit of \d+ MiB", capsys.readouterr().out)


def test_many_snapshots_are_measured() -> None:
    series = leak.measure(6)
    memory = {"live", "resident", "cuda", "objects"}
    assert set(series) == {"milliseconds", *memory, "handles", "threads", "events", "maps", "pictures"}
    assert all(len(values) == 6 for values in series.values())
    for name in ("events", "maps"):
        assert all(after > before for before, after in itertools.pairwise(series[name]))
    assert series["handles"][2:] == [series["handles"][-1]] * 4
    assert series["threads"][2:] == [series["threads"][-1]] * 4
    assert series["pictures"] == [0.0] * 6
    first, line = leak.lines({"milliseconds": [9.0, 1, 2, 4], "events": [0.0, 9, 12, 15]}, 1)
    assert "takes 1 ms" in first
    assert "and 4 ms in the last" in first
    assert line.split() == ["events", "15", "bytes", "+3.00", "a", "step"]


def test_growth_is_seen_through_what_comes_and_goes_and_what_comes_once() -> None:
    """A sawtooth of 50 kB, and 8 MB that are taken once: no growth; half a kB a snapshot beside them is half a kB."""
    coming = [10.0 * (step % 5) + (8000 if step > 25 else 0) for step in range(45)]
    assert leak.slope(coming, 20, period=5) == 0
    assert leak.slope([value + 0.5 * step for step, value in enumerate(coming)], 20, period=5) == 0.5


def test_the_adapters_are_timed_beside_what_they_are_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    adapters.main(["--rounds", "1", "--vit-size", "32"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0].removeprefix("| ") for row in rows} == {"ViT-Ti/16 32", "tiny ResNet 64", "tiny Swin 64"}
    assert all(row[3].startswith("1.00 (1.00 – 1.00)") for row in rows if row[1] == row[2])
    assert len([row for row in rows if row[1] == row[2]]) == 3
    assert {"captum Saliency", "zennit EpsilonPlus"} <= {row[1] for row in rows}


def test_a_change_that_a_model_cannot_see_moves_nothing() -> None:
    """And another image is one unit away, by definition."""
    images = random_images(6, (4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    rows = [line.strip("| ").split(" | ") for line in noise.table(steady_vit(), images, torch.arange(6) % 5, 8)]
    assert rows[0][:3] == ["mirror", "1.00", "0.00, yes"]
    assert [cell.split(",")[0] for cell in rows[0][3:]] == ["1.00", "1.00"]
    assert float(rows[0][3].split(",")[1]) > float(rows[3][3].split(",")[1]), (
        "no change is told from another image best"
    )
    assert rows[-1][0] == "another image"
    assert [row[0] for row in rows[1:4]] == [f"shift by {pixels} of 8 pixels" for pixels in (1, 2, 4)]
    assert float(rows[1][2].split(",")[0]) < float(rows[3][2].split(",")[0])


def test_the_structure_of_a_package_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "vit_explain_callback"
    (package / "inner").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# A title\n\nsome words\n", encoding="utf-8")
    long = "def wanted(given):\n" + '    """Two\n\n    lines."""\n' + "    given.own(made=found)\n" * 41
    (package / "__init__.py").write_text(long, encoding="utf-8")
    (package / "inner" / "__init__.py").touch()
    callback = "class ViTExplainCallback:\n    def __init__(self, methods, *, images=None, **model): ...\n"
    (package / "inner" / "callback.py").write_text(f"{callback}known = 'found'  # kept\n", encoding="utf-8")
    structure.main([str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}|(?<=Callback)\s+", line) for line in printed[:7]] == [
        ["Python files", "3, 48 lines in 2 packages"],
        ["median file", "3 lines"],
        ["longest file", "45 lines, __init__.py"],
        ["longest function", "42 lines, __init__.py:wanted"],
        ["functions", "2, 1 over 40 lines without docstrings"],
        ["README.md", "5 words, 3 lines"],
        ["ViTExplainCallback", "2 options, and **kwargs"],
    ]
    assert [line.split() for line in printed[8:]] == [
        ["package", *structure.EMPTY_WORDS, "all"],
        # One each of `made=`, `.own` and `found` a line; of `given` the parameter as well.
        ["(top)", "41", "41", "42", "0", "41", "0", "0", "1", "166"],
        ["inner", "0", "0", "0", "1", "0", "0", "0", "0", "1"],
        ["all", "41", "41", "42", "1", "41", "0", "0", "1", "167"],
    ]
