"""Several targets from one forward pass, and explanations that show and save themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.overrides import _get_current_function_mode as current_mode

from tests.models import FAMILIES, random_images, tiny_vit
from vit_explain_callback import Explanation, explain, explain_targets
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.methods import engine as fold
from vit_explain_callback.tracking.distributed import Ranks, explain_together
from vit_explain_callback.visualization.overlay import colour_limit, overlay, unnormalise

METHODS = ["grad_rollout", "rollout", "grad_rollout_max_0.9"]


@pytest.mark.parametrize("family", ["vit", "vit_map", "registers_gap"])
def test_many_targets_equal_one_at_a_time(family: str) -> None:
    model, images = FAMILIES[family].create(), random_images(3)
    targets = [3, None, torch.tensor([0, 1, 2])]
    found = explain_targets(model, images, targets, methods=METHODS, batch_size=2)
    assert len(found) == 3
    for target, explanation in zip(targets, found, strict=True):
        expected = explain(model, images, METHODS, target, batch_size=2)
        assert list(explanation.maps) == METHODS
        assert explanation.target.equal(expected.target)
        for name, maps in expected.maps.items():
            torch.testing.assert_close(explanation.maps[name], maps, equal_nan=True)
    assert not found[0].maps["grad_rollout"].equal(found[1].maps["grad_rollout"])


@pytest.mark.parametrize(("methods", "backward"), [(METHODS, 3), (["rollout"], 0)])
def test_one_forward_and_a_backward_for_each_target(
    methods: list[str], backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vit()
    seen = {"forward": 0, "backward": 0}
    forward = type(model).forward

    def counted_forward(self: Any, images: Any) -> Any:
        seen["forward"] += 1
        return forward(self, images)

    monkeypatch.setattr(type(model), "forward", counted_forward)
    grad = torch.autograd.grad

    def counted(*args: Any, **how: Any) -> Any:
        seen["backward"] += current_mode() is None  # a function mode is asked first, and calls it again
        return grad(*args, **how)

    by_target: dict[int, list[str]] = {}
    start = fold._Run.__init__

    def seen_run(self: Any, method: Any, target: int, *more: Any) -> None:
        by_target.setdefault(target, []).append(method.name)
        start(self, method, target, *more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(fold._Run, "__init__", seen_run)
    explainer = Explainer(model, methods)
    found = explainer.for_targets(random_images(2), [0, 1, 2], block_statistics=True)
    assert (seen["forward"], seen["backward"]) == (1, backward)
    assert [int(one.target[0]) for one in found] == [0, 1, 2]
    of_class = [name for name in methods if name != "rollout"]
    folded = list(by_target.values())
    assert folded == ([methods, of_class, of_class] if of_class else [methods])
    assert all(one.maps["rollout"].equal(found[0].maps["rollout"]) for one in found)
    assert all(one.blocks is not None for one in found)


def test_no_target_and_a_wrong_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one target"):
        explain_targets(tiny_vit(), random_images(1), [])
    with pytest.raises(ValueError, match=r"classes in 0 … 4"):
        explain_targets(tiny_vit(), random_images(1), [0, 5])


@pytest.fixture
def explanation() -> Explanation:
    names = ["cat", "dog", "hare", "fox", "owl"]
    return explain(tiny_vit(), random_images(3).clamp(-2, 2), METHODS, 1, class_names=names, block_statistics=True)


def test_the_images_are_kept_and_not_copied() -> None:
    images = random_images(2)
    found = explain(tiny_vit(), images, ["rollout"])
    assert found.images is images
    assert found.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_processes_do_not_send_images_to_one_another() -> None:
    found = explain_together(Ranks(), Explainer(tiny_vit(), ["rollout"]), random_images(2), None, None)
    assert found.images is None


def test_an_overlay_is_the_map_over_its_image(explanation: Explanation) -> None:
    assert explanation.images is not None
    picture = unnormalise(explanation.images[2], (0.5,) * 3, (0.5,) * 3)
    maps = explanation.maps["rollout"]
    expected = overlay(picture, maps[2], colour_limit(maps))
    assert np.array_equal(explanation.overlay("rollout", 2), expected)
    assert np.array_equal(explanation.overlay(), explanation.overlay("grad_rollout", 0))
    with pytest.raises(KeyError, match="one of grad_rollout, rollout"):
        explanation.overlay("flow")


def test_a_figure_has_a_row_for_each_image_and_a_column_for_each_method(explanation: Explanation) -> None:
    figure = explanation.plot(num_shown=2)
    assert len(figure.axes) == 2 * 4 + 1  # and the colour bar
    texts = [text.get_text() for text in figure.texts]
    for name, maps in explanation.maps.items():
        assert f"{name}\n0 to {colour_limit(maps):.3g} × uniform" in texts
    probability = explanation.logits.double().softmax(dim=1)
    assert texts.count(f"target dog · p {probability[0, 1]:.2f}") >= 3
    assert explanation.class_names is not None
    best = int(probability[1].argmax())
    assert f"predicted {explanation.class_names[best]} · p {probability[1, best]:.2f}" in texts
    shown = np.asarray(figure.axes[5].get_images()[0].get_array())
    assert np.array_equal(shown, explanation.overlay("grad_rollout", 1))


def test_notebooks_show_it(explanation: Explanation, tmp_path: Path) -> None:
    data = explanation._repr_jpeg_()
    assert data is not None
    (tmp_path / "a.jpg").write_bytes(data)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.width > 600
    assert explanation._repr_html_() is None  # the picture shows all, and a file need not hold it twice
    assert len(repr(explanation)) < 200
    assert "grad_rollout (" in repr(explanation)
    html = Explanation.joined([explanation] * 9)._repr_html_()
    assert html is not None
    assert html.startswith("<img alt=")
    assert "data:image/jpeg;base64," in html
    assert f"{9 * len(explanation.logits) - 8} more images" in html
    bare = replace(explanation, images=None)
    assert bare._repr_jpeg_() is None
    assert bare._repr_html_() is None
    with pytest.raises(ValueError, match="to hold its images"):
        bare.plot()


def test_what_is_saved_is_what_is_loaded(explanation: Explanation, tmp_path: Path) -> None:
    for one in (explanation, replace(explanation, images=None, blocks=None, class_names=None, normalisation=None)):
        one.save(tmp_path / "a.safetensors")
        loaded = Explanation.load(tmp_path / "a.safetensors")
        assert list(loaded.maps) == METHODS
        for name, maps in one.maps.items():
            assert loaded.maps[name].equal(maps)
        assert loaded.logits.equal(one.logits)
        assert loaded.target.equal(one.target)
        assert (loaded.normalisation, loaded.class_names) == (one.normalisation, one.class_names)
        for held, found in ((one.images, loaded.images), (one.blocks, loaded.blocks)):
            assert (held is None) == (found is None)
        if one.blocks is not None and one.images is not None:
            assert loaded.images is not None
            assert loaded.images.equal(one.images)
            for field in fields(one.blocks):
                torch.testing.assert_close(getattr(loaded.blocks, field.name), getattr(one.blocks, field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanation.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    write = Path.write_bytes

    def half(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="disk full"):
            explanation.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_other_files_are_not_explanations(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match=r"written by `Explanation.save`"):
        Explanation.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="safetensors file"):
        Explanation.load(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        Explanation.load(tmp_path / "c.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="has other permissions")
def test_a_saved_file_may_be_read_by_whom_the_user_lets_read_files(explanation: Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_attribute_gives_the_maps_of_a_call_by_name() -> None:
    explainer, images = Explainer(tiny_vit(), ["rollout", "grad_rollout"]), random_images(3)
    maps, expected = explainer.attribute(images, 1, batch_size=2), explainer(images, 1, batch_size=2).maps
    assert list(maps) == ["rollout", "grad_rollout"]
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", [Explainer.__call__, Explainer.attribute, Explainer.for_targets, explain_targets])
def test_all_but_model_images_methods_and_targets_is_named(call: Callable[..., Any]) -> None:
    *positional, last = [p.name for p in signature(call).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert set(positional) <= {"self", "model", "images"}
    assert last in ("target", "targets")
