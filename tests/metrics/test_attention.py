"""Block statistics against a second, naive implementation in float64, and laws that they obey."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_images, tiny_vit
from tests.oracle import matrices
from vit_explain_callback import explain
from vit_explain_callback.metrics.attention import BlockMeter
from vit_explain_callback.vit.tokens import TokenLayout, mean_of

PATCH = 8
GRID = (4, 6)
P = GRID[0] * GRID[1]


def naive(attention: Tensor, prefix: int, readout: list[int], class_token: int | None) -> dict[str, Any]:
    """Statistics of one image and block from (H, N, N), entry by entry."""
    heads, tokens, _ = attention.shape
    entropies = torch.zeros(heads, tokens, dtype=torch.float64)
    distances = torch.zeros(heads, P, dtype=torch.float64)
    columns = torch.zeros(P, dtype=torch.float64)
    for head in range(heads):
        for query in range(tokens):
            entropies[head, query] = sum(-a * math.log(a) for a in attention[head, query].tolist() if a > 0)
        for query in range(P):
            among = attention[head, prefix + query, prefix : prefix + P]
            among = among / among.sum()
            columns += among / heads
            for key in range(P):
                down, right = query // GRID[1] - key // GRID[1], query % GRID[1] - key % GRID[1]
                distances[head, query] += among[key] * PATCH * math.hypot(down, right)
    entropies /= math.log(tokens)
    row = sum(attention[:, token].mean(dim=0) for token in readout) / len(readout)
    return {
        "rows": row[prefix : prefix + P].view(GRID),  # type: ignore[index]
        "columns": columns.view(GRID),
        "entropy": entropies.mean(),
        "lowest_head_entropy": entropies.mean(dim=1).min(),
        "distance": distances.mean(),
        "class_self": math.nan if class_token is None else attention[:, class_token, class_token].mean(),
        "sink_share": columns.max() / P,  # the hundredth of 24 patches is one
    }


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("methods", [["rollout"], ["grad_rollout_max_0.5"], ["rollout_from3"]])
def test_statistics_equal_those_of_explicit_matrices(
    options: dict[str, Any], methods: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vit(img_size=(32, 48), **options).double()
    images = random_images(3, (32, 48)).double()
    attentions = matrices(model, images).attentions
    prefix = attentions[0].shape[-1] - P
    averaged = options.get("global_pool") == "avg"
    readout = list(range(prefix, prefix + P)) if averaged else [0]
    by_block = [[naive(each, prefix, readout, None if averaged else 0) for each in block] for block in attentions]
    head = attentions[0][0, 0].numel()
    # All at once; an image and its heads, one head, ten rows, a row at a time.
    for entries in (2**25, 3 * head, head, 10 * attentions[0].shape[-1], 1):
        monkeypatch.setattr("vit_explain_callback.methods.engine.CHUNK_ENTRIES", entries)
        monkeypatch.setattr("vit_explain_callback.methods.engine.HEAD_ENTRIES", entries)
        blocks = explain(model, images, methods, batch_size=2, block_statistics=True).blocks
        assert blocks is not None
        for block, by_image in enumerate(by_block):
            for image, expected in enumerate(by_image):
                for name, value in expected.items():
                    found = getattr(blocks, name)[image, block]
                    torch.testing.assert_close(
                        found, torch.as_tensor(value).double(), rtol=1e-9, atol=1e-12, equal_nan=True
                    )


def metered(attention: Tensor) -> Any:
    meter = BlockMeter(TokenLayout(P + 1, 1, GRID, 0, mean_of(range(1), P + 1)), (32, 48), 1, [1], torch.zeros(()))
    meter.add(0, slice(0, 1), slice(0, 1), slice(0, P + 1), attention[None, None])
    return meter.result()


def test_attention_to_oneself_alone() -> None:
    found = metered(torch.eye(P + 1))
    assert found.entropy.item() == found.distance.item() == 0
    assert found.class_self.item() == 1
    assert found.columns.flatten().tolist() == pytest.approx([1] * P)


def test_uniform_attention() -> None:
    found = metered(torch.full((P + 1, P + 1), 1 / (P + 1)))
    assert found.entropy.item() == pytest.approx(1)
    assert found.sink_share.item() == pytest.approx(1 / P)
    assert found.rows.flatten().tolist() == pytest.approx([1 / (P + 1)] * P)


def test_one_patch_that_all_attend_to_is_a_sink() -> None:
    attention = torch.full((P + 1, P + 1), 0.1 / P)
    attention[:, 8] = 0.9
    assert metered(attention).sink_share.item() > 0.85
    assert metered(attention).columns.argmax() == 7


def test_statistics_are_left_out_unless_asked_for() -> None:
    assert explain(tiny_vit(), random_images(1), ["rollout"]).blocks is None
