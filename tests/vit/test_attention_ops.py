"""Attention formed in the open: the same maps as from the fused kernel, and only where it is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models import random_images, tiny_vit
from vit_explain_callback import explain
from vit_explain_callback.vit import attention_ops
from vit_explain_callback.vit import recorder as capture
from vit_explain_callback.vit.attention_ops import computes_explicitly, explicit_attention
from vit_explain_callback.vit.recorder import AttentionRecorder

ALL = slice(None)


def heads(dtype: torch.dtype = torch.float64, count: int = 3, tokens: int = 7) -> torch.Tensor:
    return torch.randn(2, count, tokens, 4, dtype=dtype, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_what_the_kernel_multiplies_with_the_values(dtype: torch.dtype, scale: float | None) -> None:
    query, key = heads(dtype), heads(dtype, tokens=9)
    identity = torch.eye(9, dtype=torch.float64).expand(2, 3, 9, 9)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), identity, scale=scale)
    found = explicit_attention(query, key, scale)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_maps_and_logits_are_those_of_the_fused_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit().to(dtype), random_images(3).to(dtype)
    names = ["rollout", "rollout_max_0.9", "attention"]
    in_the_open = explain(model, images, names, block_statistics=True)
    monkeypatch.setattr(attention_ops, "EXPLICIT_ENTRIES", 0)
    fused = explain(model, images, names, block_statistics=True)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(in_the_open.logits, fused.logits, rtol=tolerance, atol=tolerance)
    for name in names:
        torch.testing.assert_close(in_the_open.maps[name], fused.maps[name], rtol=tolerance, atol=tolerance)


def test_a_pass_that_only_explains_forms_it_and_one_with_gradients_runs_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, images = tiny_vit(), random_images(1)
    formed: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> bool:
        formed.append(computes_explicitly(*args, **kwargs))
        return formed[-1]

    monkeypatch.setattr(capture, "computes_explicitly", noted)
    explain(model, images, ["grad_rollout"])
    assert formed == [False] * len(model.blocks)
    formed.clear()
    explain(model, images, ["rollout"])
    assert formed == [True] * len(model.blocks)


def test_a_recorder_forms_nothing_unless_it_is_told_to() -> None:
    model, images = tiny_vit(), random_images(1)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        logits = model(images)
    with torch.no_grad():
        assert logits.equal(model(images))
    assert all(call.output.shape[-1] > 0 for call in recorder.calls)


@torch.no_grad()
def test_what_is_unusual_is_left_to_the_kernel() -> None:
    few = heads()
    assert computes_explicitly(few, few, few)
    assert computes_explicitly(few, few, few, scale=2.0, dropout_p=0.0, is_causal=False, enable_gqa=False)
    assert not computes_explicitly(few, few, few, torch.zeros(7, 7))
    assert not computes_explicitly(few, few, few, is_causal=True)
    assert not computes_explicitly(few, few, few, dropout_p=0.1)
    assert not computes_explicitly(few, few, few, None, 0.1)
    assert not computes_explicitly(few, heads(count=1), heads(count=1), enable_gqa=True)
    assert not computes_explicitly(few[:, 0], few[:, 0], few[:, 0])
    assert not computes_explicitly(few.float(), few, few)
    assert not computes_explicitly(few.to("meta"), few.to("meta"), few.to("meta"))
    many = heads(tokens=513)
    assert not computes_explicitly(many, many, many)
    with torch.autocast("cpu"):
        assert not computes_explicitly(few, few, few)
    with torch.enable_grad():
        assert not computes_explicitly(few, few, few)
