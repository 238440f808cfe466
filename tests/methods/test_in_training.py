"""Every method in a run: training ends in the same bits, and the snapshots hold its maps."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.runs import Classifier, fit, quiet, saved
from vit_explain_callback.methods.names import METHODS


def test_a_run_with_every_method_ends_in_the_same_bits(tmp_path: Path) -> None:
    plain = Classifier()
    explained = Classifier()
    torch.manual_seed(3)
    fit(None, tmp_path / "plain", plain)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    callback = quiet(methods=list(METHODS), num_images=4, on_error="raise")
    trainer = fit(callback, tmp_path / "explained", explained)
    assert torch.get_rng_state().equal(expected)
    for (name, one), other in zip(plain.state_dict().items(), explained.state_dict().values(), strict=True):
        assert one.equal(other), name
    snapshots = saved(trainer)
    assert len(snapshots) == 3
    for snapshot in snapshots:
        assert set(snapshot.maps) == set(METHODS)
        assert all(maps.isfinite().all() for maps in snapshot.maps.values())
        assert (snapshot.maps["grad_attention"] < 0).any()
