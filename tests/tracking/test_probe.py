"""The probe: its fingerprint, its pictures and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import random_images
from vit_explain_callback.system.files import write_tensors
from vit_explain_callback.tracking.probe import Probe, fingerprint

IMAGES, LABELS = random_images(10, (2, 2)), torch.arange(10)


def test_the_fingerprint_tells_batches_apart() -> None:
    one = fingerprint(IMAGES, LABELS)
    assert one == fingerprint(IMAGES.clone(), LABELS.clone())
    others = [fingerprint(IMAGES, None), fingerprint(IMAGES.flip(0), LABELS), fingerprint(IMAGES, LABELS.flip(0))]
    others += [fingerprint(IMAGES.reshape(10, 2, 2, 3), LABELS), fingerprint(IMAGES.double(), LABELS)]
    assert len({one, *others}) == 6
    assert len({fingerprint(IMAGES.bfloat16(), None), fingerprint(IMAGES.half(), None)}) == 2


def test_a_probe_survives_its_file(tmp_path: Path) -> None:
    masks = {"object": torch.eye(2, dtype=torch.bool).expand(10, 2, 2)}
    probe = Probe.of(IMAGES, LABELS, regions=masks, class_names=["a", 3], num_shown=4)  # type: ignore[list-item]
    probe.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert loaded.images is None
    assert len(loaded) == len(probe) == 10
    assert np.array_equal(np.stack(loaded.pictures), np.stack(probe.pictures))
    assert loaded.labels is not None
    assert loaded.labels.equal(LABELS)
    assert loaded.regions["object"].equal(masks["object"])
    assert (loaded.class_names, loaded.num_shown, loaded.fingerprint) == (["a", "3"], 4, probe.fingerprint)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"pictures": torch.zeros(1)}, {"class_names": "null"})
    with pytest.raises(ValueError, match=r"a\.safetensors to hold `regression`, but it does not"):
        Probe.load(tmp_path / "a.safetensors")
