"""On real DINOv2 weights, where `VIT_EXPLAIN_WEIGHTS` names the file: the oracle again, at full size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from tests import oracle
from vit_explain_callback import AttentionFlow, AttentionRollout, GradientRollout, explain
from vit_explain_callback.cli.weights import Weights

WEIGHTS = os.environ.get("VIT_EXPLAIN_WEIGHTS", "")
pytestmark = pytest.mark.skipif(not WEIGHTS, reason="VIT_EXPLAIN_WEIGHTS is not set")


@pytest.fixture(scope="module")
def model() -> Any:
    backbone: Any = timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=0)
    assert Weights.read(Path(WEIGHTS)).load_into(backbone) == []
    torch.manual_seed(0)
    backbone.reset_classifier(10)
    return backbone


@pytest.fixture(scope="module")
def images() -> Tensor:
    """A bright disc on a dark slope, at two places: something for a real model to look at."""
    y, x = np.mgrid[0:112, 0:112] / 112
    pictures = [np.where((x - cx) ** 2 + (y - cy) ** 2 < 0.03, 2.0, x - 1.5) for cx, cy in ((0.3, 0.3), (0.7, 0.6))]
    return torch.from_numpy(np.stack(pictures)).float()[:, None].repeat(1, 3, 1, 1)


def test_maps_equal_the_oracle(model: Any, images: Tensor) -> None:
    methods = [AttentionRollout(), AttentionRollout("max", 0.9), GradientRollout(), GradientRollout("max", 0.5, 7)]
    found = oracle.matrices(model, images)
    explanation = explain(model, images, methods)
    start = torch.eye(65, dtype=torch.float64)[0]
    for method in methods:
        for image in range(2):
            attentions = [attention[image] for attention in found.attentions]
            gradients = [g[image] for g in found.gradients] if isinstance(method, GradientRollout) else None
            options = (method.head_fusion, method.discard_ratio, method.start_block)
            expected = oracle.rollout(attentions, gradients, start, *options)[1:].reshape(8, 8)
            actual = explanation.maps[method.name][image].double()
            assert ((actual - expected).norm() / expected.norm()).item() < 1e-4, method.name


def test_flow_equals_scipy_on_the_whole_graph(model: Any, images: Tensor) -> None:
    maps = explain(model, images[:1], [AttentionFlow(), AttentionFlow("max", 0.9)]).maps
    attentions = oracle.matrices(model, images[:1]).attentions
    unit, top = 2**28, len(attentions) * 65
    for name, fusion, ratio in (("flow", "mean", 0.0), ("flow_max_0.9", "max", 0.9)):
        tails, heads, capacities = [], [], []
        for level, attention in enumerate(attentions):
            matrix = oracle.discarded(oracle.fused_matrix(attention[0], None, fusion), ratio, 0) + torch.eye(65)
            rows, columns = matrix.nonzero(as_tuple=True)
            tails.append((level + 1) * 65 + rows)
            heads.append(level * 65 + columns)
            capacities.append((matrix / matrix.sum(dim=1, keepdim=True))[rows, columns] * unit)
        edges = (torch.cat(tails).numpy(), torch.cat(heads).numpy())
        graph = csr_array((torch.cat(capacities).int().numpy(), edges), (top + 65, top + 65))
        for patch in range(0, 64, 7):
            expected = maximum_flow(graph, top, 1 + patch).flow_value / unit
            assert maps[name].flatten()[patch].item() == pytest.approx(expected, abs=1e-5)


def test_late_rollout_looks_at_the_disc(model: Any, images: Tensor) -> None:
    maps = explain(model, images, [AttentionRollout(start_block=9)]).maps["rollout_from9"]
    disc = torch.nn.functional.adaptive_avg_pool2d((images[:, :1] == 2).float(), 8)[:, 0]
    share = (maps * disc).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
    assert (share > 2 * disc.mean(dim=(1, 2))).all()
