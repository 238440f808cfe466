"""Functions of torch that somebody replaced by one that calls them, as loggers and profilers do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers.attention
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import random_images, tiny_vit
from tests.plain_vits import SIZE, PlainViT, built, scores_by
from tests.processes import python
from vit_explain_callback import explain
from vit_explain_callback.explanation import Explanation

METHODS = ["rollout", "grad_rollout", "legrad"]


def wrapping(original: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def logged(*args: Any, **kwargs: Any) -> Any:
        seen.append("called")
        return original(*args, **kwargs)

    return logged


def plain(original: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def logged(*args: Any, **kwargs: Any) -> Any:
        seen.append("called")
        return original(*args, **kwargs)

    return logged


def an_object(original: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    class Logged:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("called")
            return original(*args, **kwargs)

    return Logged()


def partial(original: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    return functools.partial(plain(original, seen))


def twice(original: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    return plain(wrapping(original, []), seen)


def unfused() -> Any:
    vit = tiny_vit().double()
    for block in vit.blocks:
        block.attn.fused_attn = False
    return vit


def by_torch() -> Any:
    from tests.models import randomised
    from tests.vit.test_beyond_timm import Plain

    return randomised(Plain(), 0).double().eval()


MODELS: dict[str, tuple[str, Callable[[], Any], tuple[int, int]]] = {
    "kernel": ("scaled_dot_product_attention", lambda: tiny_vit().double(), (32, 32)),
    "kernel of a model of one's own": ("scaled_dot_product_attention", lambda: built(PlainViT), SIZE),
    "softmax": ("softmax", lambda: built(PlainViT, scores_by(lambda s: F.softmax(s, dim=-1))), SIZE),
    "log-softmax": ("log_softmax", lambda: built(PlainViT, scores_by(lambda s: F.log_softmax(s, dim=-1).exp())), SIZE),
    "dropout": ("dropout", unfused, (32, 32)),
    "multi-head attention": ("multi_head_attention_forward", by_torch, (32, 48)),
}


@functools.cache
def unpatched(name: str) -> Explanation:
    _, make, size = MODELS[name]
    return explain(make(), random_images(2, size).double(), METHODS)


@pytest.mark.parametrize("patch", [wrapping, plain, an_object, partial, twice])
@pytest.mark.parametrize("name", MODELS)
def test_a_patch_that_passes_through_is_seen_through(
    name: str, patch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, make, size = MODELS[name]
    model, images = make(), random_images(2, size).double()
    expected = unpatched(name)
    seen: list[str] = []
    monkeypatch.setattr(F, function, patch(getattr(F, function), seen))
    with torch.no_grad():
        model(images)
    once = len(seen)
    found = explain(model, images, METHODS)
    assert once > 0
    for key, maps in expected.maps.items():
        torch.testing.assert_close(found.maps[key], maps, rtol=1e-9, atol=1e-12)
    seen.clear()
    explain(model, images, ["rollout"])
    assert len(seen) % once == 0, "called as often as the model calls it, in each pass"
    assert name != "kernel" or len(seen) == once, "this model is run once"


def test_the_name_in_the_layers_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another module of functions in the place of the one that timm imported."""
    model, images = tiny_vit().double(), random_images(2).double()
    expected = explain(model, images, METHODS)

    class Functions:
        scaled_dot_product_attention = staticmethod(plain(F.scaled_dot_product_attention, []))

        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

    monkeypatch.setattr(timm.layers.attention, "F", Functions())
    for key, maps in explain(model, images, METHODS).maps.items():
        torch.testing.assert_close(maps, expected.maps[key], rtol=1e-9, atol=1e-12)


def test_a_patch_that_computes_something_else_is_explained_as_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit().double(), random_images(2).double()
    before = explain(model, images, METHODS)
    original: Any = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: original(q, k, v, scale=0.01))
    sharp = explain(model, images, METHODS)
    monkeypatch.undo()
    for block in model.blocks:
        block.attn = ScaledDown(block.attn)
    for key, maps in explain(model, images, METHODS).maps.items():
        torch.testing.assert_close(sharp.maps[key], maps, rtol=1e-9, atol=1e-12)
        assert (maps - before.maps[key]).abs().max() > 1e-3


class ScaledDown(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(((q @ k.mT * 0.01).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "multi_head_attention_forward", "softmax"])
def test_a_patch_from_before_the_import(name: str) -> None:
    code = f"""
import warnings, torch, torch.nn.functional as F
warnings.simplefilter("ignore")
original = F.{name}
def logged(*args, **kwargs): return original(*args, **kwargs)
F.{name} = logged
from tests.vit.test_patched_functions import MODELS
from vit_explain_callback import explain
from tests.models import random_images
_, make, size = next(model for model in MODELS.values() if model[0] == {name!r})
print(explain(make(), random_images(1, size).double()).maps["rollout"].sum().item())
"""
    done = python("-c", code)
    _, make, size = next(model for model in MODELS.values() if model[0] == name)
    expected = explain(make(), random_images(1, size).double()).maps["rollout"].sum().item()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected, rel=1e-9)
