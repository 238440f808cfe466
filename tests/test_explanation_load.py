"""`Explanation.load` on files that were edited or cut off: whole, or one sentence that names the file and the key.

| attempt | asserted |
|---|---|
| each tensor, and each text, missing, of another shape, of another dtype | `ValueError` that names file and key |
| text that is no JSON, or other JSON | the same |
| targets that are no class; statistics of blocks that do not exist | the same |
| 500 files with bytes changed, or cut off | `ValueError` that names the file, or an explanation that shows itself |
| 500 files with tensors and texts taken out, put in, renamed, cast and reshaped | the same, and the key |
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.models import random_images, tiny_vit
from vit_explain_callback import Explanation, explain

Content = tuple[dict[str, Tensor], dict[str, str]]
NORMALISATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    names = ["cat", "dog", "hare", "fox", "owl"]
    found = explain(tiny_vit(), random_images(3).clamp(-2, 2), class_names=names, block_statistics=True)
    path = tmp_path / "a.safetensors"
    replace(found, normalisation=NORMALISATION).save(path)
    return path


def read(path: Path) -> Content:
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata())  # noqa: SIM118


def write(path: Path, content: Content) -> None:
    tensors, texts = content
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=texts)


TENSORS = ["logits", "target", "map/rollout", "map/grad_rollout", "block/rows", "block/entropy"]
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a dimension more": lambda tensor: tensor[None],
    "a dimension less": lambda tensor: tensor[0],
    "an image less": lambda tensor: tensor[:-1],
    "nothing": lambda tensor: tensor[:0],
    "complex": lambda tensor: tensor.to(torch.complex64),
    "truth": lambda tensor: tensor > 0,
    "eight bits": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "the other kind": lambda tensor: tensor.long() if tensor.is_floating_point() else tensor.float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*TENSORS, "images"])
def test_a_tensor_that_was_changed_is_named(file: Path, name: str, change: str) -> None:
    tensors, texts = read(file)
    write(file, (tensors | {name: CHANGES[change](tensors[name])}, texts))
    with pytest.raises(ValueError, match=f"Expected `.*` in {file}") as caught:
        Explanation.load(file)
    # Of two that do not go together, the later one is named.
    assert f"`{name}`" in str(caught.value) or "B = 2" in str(caught.value)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_missing_is_named(file: Path, name: str) -> None:
    tensors, texts = read(file)
    del tensors[name]
    write(file, (tensors, texts))
    with pytest.raises(ValueError, match=f"Expected {file} to hold `{name}`"):
        Explanation.load(file)


WRONG = ["", "{", "3", '"rollout"', "[]", "[3]", "{}", "[[NaN], [1]]", "[" * 10**5, "1" * 5000]
UNPAIRED = ["[[1], [1, 1]]", "[[1]]", '[["a"], ["b"]]', "[1, 1]", f"[[{'9' * 400}], [1]]", "[[], []]"]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["methods", "normalisation", "class_names"])
def test_a_text_that_was_changed_is_named(file: Path, name: str, value: str) -> None:
    tensors, texts = read(file)
    write(file, (tensors, texts | {name: value}))
    with pytest.raises(ValueError, match=f"Expected `{name}` in {file}") as caught:
        Explanation.load(file)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", UNPAIRED)
def test_a_normalisation_has_a_mean_and_a_deviation_a_channel(file: Path, value: str) -> None:
    tensors, texts = read(file)
    write(file, (tensors, texts | {"normalisation": value}))
    with pytest.raises(ValueError, match="a mean and a deviation a channel"):
        Explanation.load(file)


@pytest.mark.parametrize("name", ["normalisation", "class_names"])
def test_a_text_that_is_missing_is_named(file: Path, name: str) -> None:
    tensors, texts = read(file)
    del texts[name]
    write(file, (tensors, texts))
    with pytest.raises(ValueError, match=f"Expected {file} to hold `{name}`"):
        Explanation.load(file)


def test_targets_are_classes_methods_have_maps_and_statistics_are_known(file: Path) -> None:
    tensors, texts = read(file)
    for target in ([0, 1, 5], [-1, 0, 1]):
        write(file, (tensors | {"target": torch.tensor(target)}, texts))
        with pytest.raises(ValueError, match=r"`target` in .* to be classes in 0 … 4"):
            Explanation.load(file)
    write(file, (tensors, texts | {"methods": json.dumps(["rollout", "flow"])}))
    with pytest.raises(ValueError, match="to hold `map/flow`"):
        Explanation.load(file)
    write(file, (tensors | {"block/mood": torch.zeros(3, 2)}, texts))
    with pytest.raises(ValueError, match="but got `block/mood`"):
        Explanation.load(file)


def loads_or_is_said(path: Path) -> str:
    """What was said of a file; nothing if it is loaded, and then it shows itself."""
    try:
        loaded = Explanation.load(path)
    except ValueError as error:
        said = str(error)
        assert str(path) in said
        assert "\n" not in said.strip()
        return said
    assert loaded.prediction.shape == loaded.target.shape == (len(loaded.probabilities),)
    if loaded.images is not None and loaded.images.isfinite().all() and loaded.images.shape[1] == 3:
        assert loaded.overlay().shape[2] == 3
    return ""


def test_files_with_other_bytes(file: Path) -> None:
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    draw = random.Random(0)
    said = []
    for attempt in range(500):
        edited = bytearray(whole)
        where = [8, header, len(whole)][attempt % 3]
        for _ in range(draw.randint(1, 4)):
            edited[draw.randrange(where)] = draw.randrange(256)
        file.write_bytes(edited[: draw.randrange(len(whole))] if attempt % 10 == 0 else edited)
        said.append(loads_or_is_said(file))
    assert 100 < sum(map(bool, said)) < 450


def edited(content: Content, other: Content, draw: random.Random) -> Content:
    tensors, texts = dict(content[0]), dict(content[1])
    name, text = draw.choice(sorted(tensors)), draw.choice(sorted(texts))
    match draw.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[draw.choice([name + "x", "map/", "block/x", "x"])] = tensors.pop(name)
        case 2:
            tensors[name] = draw.choice(list(CHANGES.values()))(tensors[name])
        case 3:
            tensors[name] = draw.choice(list(other[0].values()))
        case 4:
            del texts[text]
        case 5:
            texts[text] = draw.choice(["null", "[]", '["rollout"]', "{", "[[0, 0, 0], [1, 1, 1]]"])
        case 6:
            texts[text] = texts[draw.choice(sorted(texts))]
    return tensors, texts


def test_files_with_other_content(file: Path) -> None:
    content = read(file)
    draw = random.Random(1)
    said = []
    for _ in range(500):
        changed = content
        for _ in range(draw.randint(1, 2)):
            changed = edited(changed, content, draw)
        write(file, changed)
        said.append(loads_or_is_said(file))
    assert 300 < sum(map(bool, said)) < 500
    keys = [*TENSORS, "map/", "block/", "images", "methods", "normalisation", "class_names", "Explanation.save"]
    assert [line for line in said if line and not any(key in line for key in keys)] == []
