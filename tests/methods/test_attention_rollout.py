"""The pure functions against the naive oracle, and the laws they obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from vit_explain_callback import attention_rollout, gradient_rollout
from vit_explain_callback.methods.attention_rollout import rollout_step
from vit_explain_callback.methods.heads import HeadFuser, discard_lowest, fuse_heads


def random_attention(blocks: int, batch: int, heads: int, tokens: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, tokens)
    return [(3 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1) for _ in range(blocks)]


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 4),
    heads=st.integers(1, 4),
    tokens=st.integers(2, 9),
    fusion=st.sampled_from(["mean", "max", "min"]),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    class_token=st.sampled_from([0, None]),
    seed=st.integers(0, 2**31),
)
def test_both_rollouts_equal_the_oracle(
    blocks: int, heads: int, tokens: int, fusion: str, ratio: float, class_token: int | None, seed: int
) -> None:
    attentions = random_attention(blocks, 2, heads, tokens, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    gradients = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in attentions]
    start = torch.rand(tokens, generator=generator, dtype=torch.float64)
    for start_block in range(1, blocks + 1):
        options = {"head_fusion": fusion, "discard_ratio": ratio, "start_block": start_block}
        options |= {"readout": start, "class_token": class_token}
        plain = attention_rollout(attentions, **options)  # type: ignore[arg-type]
        weighted = gradient_rollout(attentions, gradients, **options)  # type: ignore[arg-type]
        for image in range(2):
            own, own_gradients = [a[image] for a in attentions], [g[image] for g in gradients]
            expected = oracle.rollout(own, None, start, fusion, ratio, start_block, class_token)
            torch.testing.assert_close(plain[image], expected, rtol=1e-12, atol=1e-15)
            # Where relu leaves many equal zeros, which of them are dropped makes no difference.
            expected = oracle.rollout(own, own_gradients, start, fusion, ratio, start_block, class_token)
            torch.testing.assert_close(weighted[image], expected, rtol=1e-12, atol=1e-15)


def test_identity_attention_keeps_relevance_where_it_is() -> None:
    identity = torch.eye(5).expand(2, 3, 5, 5)
    row = attention_rollout([identity] * 4, discard_ratio=0.5)
    assert row.tolist() == [[1, 0, 0, 0, 0]] * 2


def test_uniform_attention_spreads_it_evenly() -> None:
    uniform = torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64)
    # One block gives rownorm(1/4 + I) = 1/8 + I/2; each block halves what is left on the class token alone.
    row = attention_rollout([uniform] * 3)
    torch.testing.assert_close(row, torch.tensor([[1 / 8 + 7 / 32, 7 / 32, 7 / 32, 7 / 32]], dtype=torch.float64))


def test_the_row_keeps_its_sum_through_a_block() -> None:
    (attention,) = random_attention(1, 3, 1, 6, seed=0)
    row = torch.rand(3, 6, dtype=torch.float64)
    torch.testing.assert_close(rollout_step(row, attention[:, 0] * 7).sum(dim=1), row.sum(dim=1))


def test_zero_gradients_leave_the_residual_alone() -> None:
    attentions = random_attention(3, 1, 2, 5, seed=0)
    row = gradient_rollout(attentions, [torch.zeros_like(a) for a in attentions])
    assert row.tolist() == [[1, 0, 0, 0, 0]]


def test_gradient_rollout_ignores_negative_weights_after_fusion() -> None:
    attentions = random_attention(1, 1, 2, 3, seed=0)
    positive, negative = torch.full((1, 1, 3, 3), 1.0), torch.full((1, 1, 3, 3), -3.0)
    mixed = torch.cat([positive, negative], dim=1).double()
    equal_heads = [attentions[0][:, :1].expand(1, 2, 3, 3)]
    assert gradient_rollout(equal_heads, [mixed]).tolist() == [[1, 0, 0]]  # the mean is negative: nothing is left
    assert gradient_rollout(equal_heads, [mixed], head_fusion="max")[0, 1] > 0


def test_discarding_counts_per_image_and_spares_the_class_entry() -> None:
    fused = torch.stack([torch.arange(16.0).reshape(4, 4), 100 - torch.arange(16.0).reshape(4, 4)])
    kept = discard_lowest(fused, 0.5, class_token=0)
    assert (kept[0] == 0).sum() == 8  # entries 0 … 7, of which (0, 0) holds 0 anyway
    assert (kept[1] == 0).sum() == 8  # a threshold of its own
    fused[0, 0, 0] = 0.5
    assert discard_lowest(fused, 0.5, class_token=0)[0, 0, 0] == 0.5
    assert discard_lowest(fused, 0.5, class_token=None)[0, 0, 0] == 0
    assert discard_lowest(fused, 0.0, class_token=0) is fused
    assert (discard_lowest(fused, 0.99, class_token=None)[0] > 0).sum() == 1


def test_discarding_treats_ties_alike() -> None:
    fused = torch.full((1, 3, 3), 0.25)
    assert discard_lowest(fused, 0.5, None).equal(fused)  # nothing singles out one half of them


def test_heads_in_parts_equal_heads_at_once() -> None:
    (attention,) = random_attention(1, 2, 5, 4, seed=1)
    for fusion in ("mean", "max", "min"):
        fuser = HeadFuser(fusion)  # type: ignore[arg-type]
        for part in attention.split(2, dim=1):
            fuser.add(part)
        torch.testing.assert_close(fuser.result(), fuse_heads(attention, fusion))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="at least one head"):
        HeadFuser("max").result()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_fusion": "median"}, "`head_fusion` to be one of mean, max, min, but got 'median'"),
        ({"discard_ratio": 1.0}, r"`discard_ratio` in \[0, 1\), but got 1.0"),
        ({"discard_ratio": -0.1}, r"`discard_ratio` in \[0, 1\), but got -0.1"),
        ({"start_block": 0}, r"`start_block` in 1 … 2 \(the number of blocks\), but got 0"),
        ({"start_block": 3}, r"`start_block` in 1 … 2"),
        ({"readout": torch.ones(3)}, r"`readout` of shape \(4,\) or \(1, 4\), but got \(3,\)"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, object], message: str) -> None:
    attentions = random_attention(2, 1, 2, 4, seed=0)
    with pytest.raises(ValueError, match=message):
        attention_rollout(attentions, **options)  # type: ignore[arg-type]


def test_shapes_that_do_not_match_are_refused() -> None:
    attentions = random_attention(2, 1, 2, 4, seed=0)
    for wrong in ([], [attentions[0][0]], [attentions[0][..., :3]], [attentions[0], attentions[0][:, :1]]):
        with pytest.raises(ValueError, match=r"`attentions` to be L >= 1 tensors of one shape \(B, H, N, N\)"):
            attention_rollout(wrong)
    with pytest.raises(ValueError, match="Expected `gradients` of the same number and shapes"):
        gradient_rollout(attentions, attentions[:1])
