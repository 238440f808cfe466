"""The attention of one block and of one head against its matrices, also from any patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.methods.agreement import assert_maps_equal, relative_error, start_row
from tests.models import FAMILIES, Family, random_images, tiny_vit
from vit_explain_callback import Attention, AttentionRollout, explain
from vit_explain_callback.methods import Method
from vit_explain_callback.methods import engine as fold

VARIANTS = [Attention(), Attention("max", 1), Attention("min", -2), Attention(block=2, head=3), Attention(head=1)]


def one_block(method: Method, attentions: list[Tensor], blocks: int) -> Tensor:
    """The fused matrix, (N, N)."""
    assert isinstance(method, Attention)
    attention = attentions[method.block - 1 if method.block > 0 else blocks + method.block]
    return attention[method.head - 1] if method.head else oracle.fused_matrix(attention, None, method.head_fusion)


def attended(family: Family, attentions: list[Tensor], _gradients: list[Tensor], method: Method) -> Tensor:
    blocks = len(attentions) - (family.readout == "pool")
    return start_row(family, attentions) @ one_block(method, attentions, blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_equal_the_oracle(name: str) -> None:
    assert_maps_equal(name, VARIANTS, attended)


@pytest.mark.parametrize("entries", [5 * 17, 17 * 17, 2 * 17 * 17])
def test_one_head_is_found_in_any_chunk_of_heads(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny_vit().double(), random_images(2)
    methods = [Attention(head=1), Attention(head=2), Attention(head=3)]
    whole = explain(model, images, methods).maps
    monkeypatch.setattr(fold, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(fold, "HEAD_ENTRIES", entries)
    for name, maps in explain(model, images, methods).maps.items():
        torch.testing.assert_close(maps, whole[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["vit_wide", "vit_map", "dinov2_registers", "vit_gap"])
def test_a_patch_is_followed_instead_of_the_readout(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.create(), random_images(2, family.image_size)
    found = oracle.matrices(model, images)
    row, column = family.grid[0] - 1, 1
    methods = [Attention(), Attention(block=1, head=2), AttentionRollout(), AttentionRollout("max", 0.5, -2)]
    maps = explain(model, images, methods, query=(row, column)).maps
    start = torch.zeros(family.tokens, dtype=torch.float64)
    start[family.prefix + row * family.grid[1] + column] = 1
    blocks = len(model.blocks)
    for image in range(2):
        attentions = [a[image] for a in found.attentions[:blocks]]
        for method in methods:
            if isinstance(method, AttentionRollout):
                first = method.layers(blocks)[0]
                options = (method.head_fusion, method.discard_ratio, first, family.class_token)
                expected = oracle.rollout(attentions, None, start, *options)
            else:
                expected = start @ one_block(method, attentions, blocks)
            expected = expected[family.prefix :].reshape(family.grid)
            assert relative_error(maps[method.name][image], expected) < 1e-4, method.name


def test_a_query_changes_neither_the_blocks_nor_the_next_call() -> None:
    model, images = tiny_vit(), random_images(2)
    plain = explain(model, images, ["attention"], block_statistics=True)
    asked = explain(model, images, ["attention"], block_statistics=True, query=(0, 0))
    assert not asked.maps["attention"].equal(plain.maps["attention"])
    assert asked.blocks is not None
    assert plain.blocks is not None
    assert asked.blocks.rows.equal(plain.blocks.rows)
    assert explain(model, images, ["attention"]).maps["attention"].equal(plain.maps["attention"])


@pytest.mark.parametrize("query", [(4, 0), (0, 4), (-1, 0), (1, 1, 1)])
def test_a_query_outside_the_grid_is_refused(query: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"`query` to be a \(row, column\) in 0 … 3 and 0 … 3, but got"):
        explain(tiny_vit(), random_images(1), ["attention"], query=query)


def test_a_query_of_a_method_that_depends_on_the_class_is_refused() -> None:
    with pytest.raises(ValueError, match="no `query` for chefer: gradients depend on a class"):
        explain(tiny_vit(), random_images(1), ["attention", "chefer"], query=(0, 0))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Attention(block=4), r"`block` in 1 … 3 \(the model's blocks\) or -3 … -1 .* attention_block4 has 4"),
        (Attention(block=-4), "attention_block-4 has -4"),
        (Attention(head=4), r"`head` in 1 … 3 \(the heads of block 3\), but got attention_head4"),
    ],
)
def test_blocks_and_heads_that_the_model_lacks_are_refused(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(tiny_vit(), random_images(1), [method])


def test_a_head_alone_is_not_fused() -> None:
    with pytest.raises(ValueError, match="either a `head_fusion` or one `head`"):
        Attention("max", head=1)
