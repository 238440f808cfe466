"""Run folders and checkpoints' states that were edited: read whole, or one sentence that names what is wrong.

| attempt | asserted |
|---|---|
| 1,000 run folders with tensors and texts taken out, put in, renamed, cast, reshaped; bytes changed; cut off | |
| | `ValueError` or `FileNotFoundError` of one line that names the file, or a run whose page can be written |
| 1,000 states with entries taken out, put in, and made other things | the run goes on, or a new baseline is said once |
| a state without a version, or with another | a new baseline, said once |
"""

from __future__ import annotations

import copy
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.models import random_images, tiny_vit
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import load_run
from vit_explain_callback.tracking.summary import summary

WHOLE = Probe.of(
    random_images(3),
    torch.tensor([0, 1, 2]),
    regions={"object": torch.rand(3, 32, 32) > 0.5},
    class_names=["cat", "dog", "hare", "fox", "owl"],
    num_shown=1,
)
TENSORS: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor[None],
    lambda tensor: tensor[0],
    lambda tensor: tensor[:-1],
    lambda tensor: tensor[:0],
    lambda tensor: tensor.to(torch.float64),
    lambda tensor: tensor.to(torch.float16),
    lambda tensor: tensor.to(torch.int32),
    lambda tensor: tensor > 0,
    lambda tensor: tensor.transpose(0, -1),
    lambda tensor: torch.full_like(tensor, 99),
    lambda tensor: -tensor.to(torch.float32),
    lambda tensor: tensor.to(torch.float32) * torch.nan,
]
WORDS = ["null", "[]", "{}", '""', "-1", "1e400", "NaN", "[[[", '["a", 3]', "true", "7", "\x1b[31m", "9" * 40]


VIT = tiny_vit()


def make_tracker(folder: Path | None = None) -> ExplanationTracker:
    return ExplanationTracker(Explainer(VIT, ["rollout", "grad_rollout"]), WHOLE, folder=folder, checks=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "explanations"
    tracker = make_tracker(folder)
    for step in (0, 4, 8):
        tracker.observe(step)
    return folder


def edit_file(path: Path, dice: random.Random) -> None:
    kind = dice.randrange(10)
    if kind == 0:
        path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])
    elif kind == 1:
        content = bytearray(path.read_bytes())
        for _ in range(dice.randint(1, 20)):
            content[dice.randrange(min(len(content), 2000))] = dice.randrange(256)
        path.write_bytes(content)
    elif kind == 2:
        path.unlink()
    else:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            texts = dict(opened.metadata() or {})
        for _ in range(dice.randint(1, 2)):
            edit_content(tensors, texts, dice)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=texts)


def edit_content(tensors: dict[str, Tensor], texts: dict[str, str], dice: random.Random) -> None:
    name = dice.choice([*tensors, *texts])
    kind = dice.randrange(4)
    if name in texts:
        texts[name] = dice.choice(WORDS)
        if kind == 0:
            del texts[name]
    elif kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[dice.choice([f"{name}x", "map/flow", "nudged/flow", "gain/x", "block/x", "region/"])] = tensors[name]
    else:
        try:
            tensors[name] = dice.choice(TENSORS)(tensors[name])
        except (RuntimeError, IndexError):  # as a minus of truth, or a part of what has no dimensions
            del tensors[name]


def test_edited_run_folders(whole: Path, tmp_path: Path) -> None:
    dice, read = random.Random(0), 0
    for attempt in range(1000):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        edit_file(dice.choice(sorted(folder.glob("*.safetensors"))), dice)
        try:
            run = load_run(folder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert run.scalars[-1]
                if read % 10 == 0:
                    assert run.summary
                    assert run.pictures
            read += 1
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            assert str(folder) in text, (attempt, text)
            assert "\n" not in text, text
            assert len(text) < 1000, text
        shutil.rmtree(folder)
        assert list(tmp_path.iterdir()) == []
    assert 20 < read < 500


def other(value: Any, dice: random.Random) -> Any:
    if isinstance(value, Tensor) and dice.random() < 0.7:
        try:
            return dice.choice(TENSORS)(value)
        except (RuntimeError, IndexError):
            return None
    return dice.choice([None, -1, 0, 2**70, 1.5, "x", [], {}, True, torch.tensor(1), [1], {1: 2}, float("nan")])


def edit_state(state: dict[Any, Any], dice: random.Random) -> None:
    snapshots = state.get("snapshots")
    if isinstance(snapshots, list) and snapshots and dice.random() < 0.7:
        index = dice.randrange(len(snapshots))
        place: Any = snapshots[index]
        if not isinstance(place, dict) or not place or dice.random() < 0.1:
            snapshots[index] = other(place, dice)
            return
    else:
        place = state
    if not place:
        return
    name = dice.choice(list(place))
    kind = dice.randrange(4)
    if kind == 0:
        del place[name]
    elif kind == 1:
        place[dice.choice([f"{name}x", 3, "map/flow", "nudged/flow", "block/x"])] = place[name]
    else:
        place[name] = other(place[name], dice)


def test_edited_states_of_checkpoints(whole: Path) -> None:
    tracker, dice = make_tracker(), random.Random(0)
    for step in (0, 4, 8):
        tracker.observe(step)
    state, went_on = tracker.state_dict(), 0
    new = tracker.history.now
    for _ in range(1000):
        edited = copy.deepcopy(state)
        for _ in range(dice.randint(1, 2)):
            edit_state(edited, dice)
        resumed = make_tracker()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.load_state_dict(edited)
        said = [str(warning.message) for warning in caught]
        assert (resumed.history.count == 0) == (len(said) == 1), said
        assert all("so a new baseline is taken" in text and len(text) < 1000 for text in said), said
        if resumed.history.count:
            went_on += 1
            resumed.history.add(new)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # means of NaN
                assert resumed.scalars()
                assert summary(resumed.history, resumed.probe)
    assert 50 < went_on < 700


@pytest.mark.parametrize("version", [None, 0, 1, "2"])
def test_a_state_of_another_version_begins_anew(version: Any) -> None:
    tracker = make_tracker()
    tracker.observe(0)
    state = tracker.state_dict()
    assert state["version"] == 2
    state["version"] = version
    if version is None:
        del state["version"]
    resumed = make_tracker()
    with pytest.warns(UserWarning, match=r"cannot be read \(Expected `version` to be 2.*a new baseline is taken"):
        resumed.load_state_dict(state)
    assert resumed.history.count == 0
    resumed.load_state_dict(tracker.state_dict())
    assert resumed.history.count == 1
