"""What every test of the command needs: small models, and a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from tests.cli.photographs import checkpoint, photograph
from tests.models import randomised


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models that the command makes by name are small; from the hub come random weights."""
    create = timm.create_model

    def create_small(name: str, pretrained: bool = False, **options: Any) -> Any:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        model: Any = create(name, **((shape if name.startswith(("vit", "deit")) else {}) | options))
        model.pretrained_cfg["input_size"] = (3, 32, 32)
        return randomised(model, 7).eval() if pretrained else model

    monkeypatch.setattr(timm, "create_model", create_small)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_models: None) -> Path:
    """A folder with a photograph, a checkpoint of five classes, and nothing else."""
    monkeypatch.chdir(tmp_path)
    photograph("both.png", 0)
    save_file(checkpoint().state_dict(), "own.safetensors")
    return tmp_path
