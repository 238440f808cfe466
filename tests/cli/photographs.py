"""Photographs of noise, a model for them, and the words that make the command explain them with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

from tests.models import randomised

NAME = "vit_tiny_patch16_224"
ANIMALS = ["cat", "dog", "hare", "fox", "owl"]
OWN = ["--model", NAME, "--checkpoint", "own.safetensors", "--device", "cpu", "--class_names", *ANIMALS]


def checkpoint(seed: int = 3, **options: Any) -> Any:
    return randomised(timm.create_model(NAME, **({"num_classes": 5} | options)), seed).eval()


def photograph(path: str, seed: int, size: tuple[int, int] = (40, 48)) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def index(folder: str = "explanations") -> Any:
    return json.loads((Path(folder) / "explanations.json").read_text(encoding="utf-8"))
