"""Files of weights: every kind that is read, none that runs code, and the one model meant where there are two.

| attempt | asserted |
|---|---|
| a pickle that touches a file, as pickle, zip, old and oldest format of torch, under seven suffixes | no file touched |
| a timm whose own loader runs pickles (1.0.12 to 1.0.24) | not used |
| state dictionaries as timm, DDP, `torch.compile` and Lightning wrap them | the same model |
| a student and a teacher in one file | both named; `--prefix` takes either |
| one model under two names; a teacher of another width | taken without asking |
| 300 files with bytes changed, or cut off | read, or one line that names the file |
| no tensors, tensors in a list, names that are numbers, a tensor that does not fit the conversion | one line |
"""

from __future__ import annotations

import argparse
import io
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.cli.photographs import ANIMALS, NAME, checkpoint
from vit_explain_callback.cli.command import main
from vit_explain_callback.cli.weights import Weights, model_with_weights


class Evil:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("touched", "w")


def as_pickle() -> bytes:
    return pickle.dumps({"state_dict": Evil()}, protocol=2)


def as_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": Evil()}, file)
    return file.getvalue()


def as_old_format() -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": Evil()}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_oldest_format() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(as_pickle())
            tar.addfile(member, io.BytesIO(as_pickle()))
    return file.getvalue()


def test_unpickling_it_touches_a_file(here: Path) -> None:
    pickle.loads(as_pickle())["state_dict"].close()
    assert Path("touched").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors", ""])
@pytest.mark.parametrize("content", [as_pickle, as_zip, as_old_format, as_oldest_format])
def test_no_file_of_weights_runs_code(
    here: Path,
    content: Callable[[], bytes],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # As in timm 1.0.12.
    monkeypatch.setattr(timm.models, "load_state_dict", lambda path: torch.load(path, weights_only=False))
    evil = Path(f"evil{suffix}")
    evil.write_bytes(content())
    assert main(["both.png", "--model", NAME, "--checkpoint", str(evil)]) == 2
    assert main(["drift", str(evil), "--model", NAME, "--images", ".", "--output", "out"]) == 2
    assert not Path("touched").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(f"{evil} cannot be read as weights" in line for line in said)


def test_what_would_run_code_is_named_with_the_cure(here: Path) -> None:
    Path("a.pth").write_bytes(as_zip())
    with pytest.raises(ValueError, match=r"more than tensors \(\S*open\).*torch.save\(state_dict, FILE\)"):
        Weights.read(Path("a.pth"))


def test_the_oldest_format_is_refused_by_itself(here: Path) -> None:
    """Torch before 2.6 reads it, whatever `weights_only` says."""
    Path("a.pth").write_bytes(as_oldest_format())
    with pytest.raises(ValueError, match="has torch's format of 2016"):
        Weights.read(Path("a.pth"))


def same_model(loaded: Any, expected: Any) -> bool:
    pairs = zip(loaded.state_dict().items(), expected.state_dict().items(), strict=True)
    return all(one == other and a.equal(b) for (one, a), (other, b) in pairs)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


WRAPPED: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]] = {
    "bare": lambda state, other: state,
    "state_dict": lambda state, other: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "model": lambda state, other: {"model": state, "optimizer": {"state": {}}},
    "state_dict_ema": lambda state, other: {"state_dict": other, "state_dict_ema": state},
    "model_ema": lambda state, other: {"model": other, "model_ema": state},
    "no average": lambda state, other: {"state_dict": state, "state_dict_ema": None},
    "DDP": lambda state, other: prefixed("module.", state),
    "compiled": lambda state, other: {"state_dict": prefixed("module._orig_mod.", state)},
    "Lightning": lambda state, other: {"state_dict": prefixed("net.vit.", state), "global_step": 70},
}


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ""])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_every_wrapper_is_taken_off(here: Path, wrapper: str, suffix: str) -> None:
    model, other = checkpoint(), checkpoint(seed=4)
    path = Path(f"weights{suffix}")
    torch.save(WRAPPED[wrapper](model.state_dict(), other.state_dict()), path)
    weights = Weights.read(path)
    assert same_model(model_with_weights(NAME, weights), model)
    assert weights.step == (70 if wrapper == "Lightning" else None)


@pytest.fixture
def both_models(here: Path) -> tuple[Any, Any]:
    student, teacher = checkpoint(5), checkpoint(6)
    state = prefixed("student.", student.state_dict()) | prefixed("teacher.vit.", teacher.state_dict())
    torch.save({"state_dict": state}, "both.ckpt")
    return student, teacher


def test_of_two_models_in_a_file_one_is_to_be_named(
    both_models: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["both.png", "--model", NAME, "--checkpoint", "both.ckpt", "--device", "cpu", "--class_names", *ANIMALS]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "begin with 'student.' and 'teacher.vit.': choose one, as in --prefix student." in said
    maps = []
    for prefix, model in zip(("student", "teacher.vit."), both_models, strict=True):
        assert same_model(model_with_weights(NAME, Weights.read(Path("both.ckpt"), prefix)), model)
        assert main([*words, "--prefix", prefix, "--output", prefix]) == 0
        maps.append(np.load(Path(prefix) / "both.rollout_max_0.9.npy"))
    assert not np.array_equal(*maps)
    drift = ["drift", "both.ckpt", "--model", NAME, "--images", ".", "--output", "out", "--check_every", "0"]
    assert main(drift) == 2
    assert main([*drift, "--prefix", "student"]) == 0


def test_a_prefix_that_is_not_there_is_refused_with_those_that_are(both_models: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"got 'pupil': it holds student, teacher\.vit\."):
        model_with_weights(NAME, Weights.read(Path("both.ckpt"), "pupil"))


def test_one_model_under_two_names_and_a_teacher_of_another_width_leave_no_choice(here: Path) -> None:
    model, wide = checkpoint(), checkpoint(4, embed_dim=96)
    torch.save(prefixed("net.", model.state_dict()) | prefixed("alias.", model.state_dict()), "a.pth")
    torch.save(prefixed("student.", model.state_dict()) | prefixed("big.", wide.state_dict()), "b.pth")
    for path in ("a.pth", "b.pth"):
        assert same_model(model_with_weights(NAME, Weights.read(Path(path))), model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no tensors by name"),
        ({"state_dict": {3: 4}}, "holds no tensors by name"),
        ([torch.zeros(2)], "but it holds a list"),
        ({"cls_token": "x", "unknown": torch.zeros(3)}, "holds no tensor that fits"),
        ({"patch_embed.proj.weight": torch.zeros(7)}, "does not fit VisionTransformer"),
        ({"visual.class_embedding": torch.zeros(7)}, "holds no tensor that fits"),
    ],
)
def test_what_is_no_model_is_said(here: Path, content: Any, message: str) -> None:
    torch.save(content, "a.pth")
    with pytest.raises(ValueError, match=message):
        model_with_weights(NAME, Weights.read(Path("a.pth")))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_edited_files_are_read_or_said(here: Path, suffix: str) -> None:
    model = checkpoint(embed_dim=12, depth=1)
    path = Path(f"a{suffix}")
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=suffix == ".pth")
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for attempt in range(100):
        edited = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            edited[draw.randrange([200, 3000, len(whole)][attempt % 3])] = draw.randrange(256)
        path.write_bytes(edited[: draw.randrange(len(whole))] if attempt % 10 == 0 else edited)
        try:
            model_with_weights(NAME, Weights.read(path), embed_dim=12, depth=1)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert 30 < refused < 100


def test_a_safetensors_file_of_another_case(here: Path) -> None:
    save_file(checkpoint().state_dict(), "A.SAFETENSORS")
    assert same_model(model_with_weights(NAME, Weights.read(Path("A.SAFETENSORS"))), checkpoint())
