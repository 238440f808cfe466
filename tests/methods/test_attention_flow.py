"""Attention flow against networkx, its laws, and the same through `explain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.flow import preflow_push
from torch import Tensor

from tests import oracle
from tests.models import FAMILIES, random_images
from tests.runs import fit, quiet, saved
from vit_explain_callback import AttentionFlow, ViTExplainCallback, attention_flow, explain
from vit_explain_callback.methods.attention_flow import maximum_flow


def naive(matrices: Sequence[Tensor], readout: Tensor, sink: int) -> float:
    """Maximum flow with networkx on the whole graph, nodes named (level, token); `matrices` first block first.

    In whole units: with floating-point capacities, its preflow-push fails on rounding.
    """
    unit = 2**40
    graph = nx.DiGraph()
    top = len(matrices)
    graph.add_nodes_from(["source", (0, sink)])
    for token, share in enumerate(readout.tolist()):
        graph.add_edge("source", (top, token), capacity=int(share * unit))
    for level, matrix in enumerate(matrices):
        for row, values in enumerate(matrix.tolist()):
            for column, capacity in enumerate(values):
                if capacity > 0:
                    graph.add_edge((level + 1, row), (level, column), capacity=int(capacity * unit))
    value, _ = nx.maximum_flow(graph, "source", (0, sink), flow_func=preflow_push)
    return float(value) / unit


def stack(seed: int, tokens: int, blocks: int, zeros: float, sharp: float) -> list[Tensor]:
    """Row-normalised random matrices with a share of zeros, some of them with rows of the identity alone."""
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for _ in range(blocks):
        fused = torch.rand(tokens, tokens, generator=generator, dtype=torch.float64) ** sharp
        fused = fused * (torch.rand(tokens, tokens, generator=generator) >= zeros)
        matrix = fused + torch.eye(tokens, dtype=torch.float64) * torch.rand(1, generator=generator)
        matrices.append(matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1e-12))
    return matrices


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 12),
    blocks=st.integers(1, 5),
    zeros=st.sampled_from([0.0, 0.3, 0.7, 0.95]),
    sharp=st.sampled_from([1.0, 8.0]),
    spread=st.booleans(),
)
def test_flow_is_that_of_networkx(
    seed: int, tokens: int, blocks: int, zeros: float, sharp: float, spread: bool
) -> None:
    matrices = stack(seed, tokens, blocks, zeros, sharp)
    readout = torch.eye(tokens, dtype=torch.float64)[0]
    if spread:
        readout = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        readout /= readout.sum()
    found = maximum_flow(matrices, readout, range(tokens))
    expected = [naive(matrices, readout, sink) for sink in range(tokens)]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("averaged", [False, True])
def test_the_strongest_edges_and_the_whole_graph_agree(zeros: float, averaged: bool) -> None:
    """With more tokens than edges are kept at first, so that some sinks are proven early and others are not."""
    tokens = 80
    matrices = stack(3, tokens, 3, zeros, 8.0)
    readout = torch.full((tokens,), 1 / tokens) if averaged else torch.eye(tokens)[0]
    sinks = range(0, tokens, 7)
    found = maximum_flow(matrices, readout, sinks)
    expected = [naive(matrices, readout, sink) for sink in sinks]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-6)
    bound = matrices[0].sum(dim=0).clamp(max=1)[list(sinks)]
    reached = (found.values - bound).abs() < 1e-6
    assert found.certified <= reached.double().mean() + 1e-9


def test_a_class_token_that_attends_evenly_needs_all_of_its_edges() -> None:
    tokens = 120
    matrices = [matrix / matrix.sum(dim=1, keepdim=True) for matrix in 1 + 0.1 * torch.rand(4, tokens, tokens)]
    found = maximum_flow(matrices, torch.eye(tokens)[0], range(3))
    assert found.certified == 1
    assert found.values.tolist() == pytest.approx(matrices[0].sum(dim=0).clamp(max=1)[:3].tolist(), abs=1e-6)


def test_flow_is_bounded_by_both_cuts_and_grows_with_capacity() -> None:
    matrices = stack(1, 9, 4, 0.3, 2.0)
    readout = torch.eye(9)[0]
    values = maximum_flow(matrices, readout, range(9)).values
    assert (values <= matrices[0].sum(dim=0).clamp(max=1) + 1e-9).all()
    for block in range(4):
        wider = [matrix * (1.5 if index == block else 1) for index, matrix in enumerate(matrices)]
        assert (maximum_flow(wider, readout, range(9)).values >= values - 1e-9).all()
        narrower = [matrix * (0.5 if index == block else 1) for index, matrix in enumerate(matrices)]
        assert (maximum_flow(narrower, readout, range(9)).values <= values + 1e-9).all()


def test_known_answers() -> None:
    identity = torch.eye(3).expand(2, 4, 3, 3)
    assert attention_flow([identity, identity]).tolist() == [[1.0, 0.0, 0.0]] * 2
    # Token 0 attends to token 1 alone, and 1 to 2: half stays, half moves on, in each of two blocks.
    chain = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])[None, None]
    assert attention_flow([chain, chain])[0].tolist() == pytest.approx([0.5, 1.0, 0.5])
    assert attention_flow([chain, chain], start_block=2)[0].tolist() == pytest.approx([0.5, 0.5, 0.0])


def attention(seed: int, batch: int = 2, heads: int = 3, tokens: int = 7, blocks: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(batch, heads, tokens, tokens, generator=generator)).softmax(-1) for _ in range(blocks)]


def test_laws_of_explicit_matrices() -> None:
    blocks = attention(0)
    together = attention_flow(blocks, head_fusion="max", discard_ratio=0.5)
    alone = [attention_flow([a[i : i + 1] for a in blocks], head_fusion="max", discard_ratio=0.5) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    permuted = attention_flow([a[:, :, order][..., order] for a in blocks])
    torch.testing.assert_close(permuted, attention_flow(blocks)[:, order])
    one_head = [a[:, :1] for a in blocks]
    for fusion in ("max", "min"):
        torch.testing.assert_close(attention_flow(one_head, head_fusion=fusion), attention_flow(one_head))


def test_what_is_not_finite_gives_nan() -> None:
    blocks = attention(0)
    blocks[1][1, 0, 2, 2] = math.nan
    values = attention_flow(blocks)
    assert values[0].isfinite().all()
    assert values[1].isnan().all()


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "vit_gap", "beit", "dinov2_registers", "vit_map"])
def test_flow_of_a_model_is_that_of_its_matrices(family: str) -> None:
    kind = FAMILIES[family]
    model, images = kind.create(), random_images(2)
    methods = [AttentionFlow(), AttentionFlow("max", 0.5), AttentionFlow("min", 0.0, 2)]
    maps = explain(model, images, methods).maps
    found = oracle.matrices(model, images)
    for method in methods:
        for image in range(2):
            blocks = [
                oracle.discarded(
                    oracle.fused_matrix(a[image], None, method.head_fusion), method.discard_ratio, kind.class_token
                )
                for a in found.attentions[: len(model.blocks)]
            ]
            matrices = [m + torch.eye(len(m), dtype=torch.float64) for m in blocks[method.start_block - 1 :]]
            matrices = [torch.stack([row / row.sum() for row in m]) for m in matrices]
            if kind.readout == "pool":
                pool = oracle.fused_matrix(found.attentions[-1][image], None, method.head_fusion)[0]
                readout = pool / pool.sum()
            else:
                readout = kind.start_row()
            expected = [naive(matrices, readout, kind.prefix + patch) for patch in range(16)]
            assert maps[method.name][image].flatten().tolist() == pytest.approx(expected, abs=1e-5), method.name


def test_flow_beside_other_methods_leaves_them_alone() -> None:
    model, images = FAMILIES["vit"].create(), random_images(2)
    together = explain(model, images, ["grad_rollout", "flow", "rollout_max"]).maps
    assert list(together) == ["grad_rollout", "flow", "rollout_max"]
    for name, maps in explain(model, images, ["grad_rollout", "rollout_max"]).maps.items():
        assert together[name].equal(maps)


def test_the_callback_takes_it(tmp_path: Any) -> None:
    trainer = fit(quiet(methods=["rollout", "flow"], num_images=4, on_error="raise"), tmp_path)
    maps = [snapshot.maps["flow"] for snapshot in saved(trainer)]
    assert len(maps) == 3
    assert all(((one >= 0) & (one <= 1 + 1e-6)).all() for one in maps)


def test_a_missing_solver_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_explain_callback.methods.attention_flow.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'vit-explain-callback\[flow\]'"):
        ViTExplainCallback(methods=["flow"])
