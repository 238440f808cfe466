"""Every timm name of the ViT families: maps equal to the oracle, or a refusal with its reason.

    python -m tests.coverage_sweep --output sweep.json

Models are shrunk through timm's own keyword arguments, so that the whole sweep fits a laptop. Names already in the
output file are not tried again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from tests import oracle
from tests.models import randomised
from vit_explain_callback import AttentionRollout, GradientRollout, explain

FAMILIES = (
    "vision_transformer",
    "deit",
    "beit",
    "eva",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "naflexvit",
    "cait",
    "tnt",
    "convit",
)
REFUSED_FAMILIES = (
    "vision_transformer_sam",
    "swin_transformer",
    "swin_transformer_v2",
    "mvitv2",
    "pvt_v2",
    "xcit",
    "pit",
    "crossvit",
    "volo",
    "davit",
    "levit",
    "hiera",
    "twins",
)
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
METHODS = (AttentionRollout(), AttentionRollout("max", 0.5), GradientRollout(), GradientRollout("max", 0.5, 2))


def family_of(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.split(".")[-1]


def names_of(families: tuple[str, ...]) -> list[str]:
    """All names of the ViT families; of the others, whose models do not shrink, two that are not among the largest."""
    names: dict[str, list[str]] = {family: [] for family in families}
    for name in timm.list_models(pretrained=False):
        if (family := family_of(name)) in names:
            names[family].append(name)
    large = ("large", "huge", "giant", "gigantic")
    for family in REFUSED_FAMILIES:
        names[family] = [name for name in names.get(family, []) if not any(word in name for word in large)][:2]
    return [name for family in families for name in names[family]]


def shrunk(name: str) -> tuple[Any, tuple[int, int]]:
    """The model with as few tokens, blocks and channels as timm lets one ask for, and its image size."""
    config = timm.models.get_pretrained_cfg(name)
    native = config.input_size[1:] if config is not None else (224, 224)
    attempts: list[dict[str, Any]] = []
    for side_option in ({"img_size": 64}, {"img_size": 128}, {}):
        for shape in (SMALL, {**SMALL, "num_kv_heads": (3, 1)}, {"depth": 2}, {}):
            attempts.append({**side_option, **shape})
    error: Exception | None = None
    for options in attempts:
        try:
            model = timm.create_model(name, num_classes=5, **options)
            side = options.get("img_size")
            patch = getattr(getattr(model, "patch_embed", None), "patch_size", (16, 16))
            if side is not None and side % patch[0]:
                side = 4 * patch[0]
                model = timm.create_model(name, num_classes=5, **{**options, "img_size": side})
            size = native if side is None else (side, side)
            model = randomised(model, seed=0).eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, *size))
            return model, size
        except Exception as caught:  # timm says in many ways that a name does not take an option
            error = caught
    raise RuntimeError(f"{name} cannot be created") from error


def expected(model: Any, found: oracle.Matrices, method: Any, tokens: int, image: int) -> Tensor:
    """The oracle's row, from what timm documents about `num_prefix_tokens` and `global_pool`."""
    gradients_wanted = isinstance(method, GradientRollout)
    attentions = [a[image] for a in found.attentions]
    gradients = [g[image] for g in found.gradients] if gradients_wanted else None
    prefix = model.num_prefix_tokens
    class_token = 0 if getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None) else None
    if attentions[-1].shape[-2] != attentions[-1].shape[-1]:
        row = oracle.fused_matrix(attentions.pop(), gradients.pop() if gradients else None, method.head_fusion).mean(0)
        start = torch.cat([torch.zeros(tokens - len(row)), row / row.sum()]).double()
    else:
        start = torch.zeros(tokens, dtype=torch.float64)
        if model.global_pool == "token":
            start[: 2 if getattr(model, "dist_token", None) is not None else 1] = 1
        else:
            start[0 if getattr(model, "pool_include_prefix", False) else prefix :] = 1
        start = start / start.sum()
    options = (method.head_fusion, method.discard_ratio, method.start_block, class_token)
    return oracle.rollout(attentions, gradients, start, *options)[prefix:]


def try_name(name: str) -> dict[str, str]:
    """`correct`, `refused` or `failed`, with what was said."""
    torch.manual_seed(0)
    model, size = shrunk(name)
    model = model.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    try:
        explanation = explain(model, images, METHODS)
    except ValueError as error:
        said = str(error)
        return {"outcome": "refused" if said.startswith("Expected") else "failed", "said": said}
    found = oracle.matrices(model, images)
    tokens = found.attentions[0].shape[-1]
    for method in METHODS:
        for image in range(2):
            wanted = expected(model, found, method, tokens, image)
            actual = explanation.maps[method.name][image]
            difference = (actual.flatten() - wanted).norm() / wanted.norm()
            if not difference < 1e-9 and wanted.isfinite().all() and wanted.norm() > 0:
                return {"outcome": "failed", "said": f"{method.name} differs from the oracle by {difference:.1e}"}
            if math.prod(actual.shape) != tokens - model.num_prefix_tokens:
                return {"outcome": "failed", "said": f"a grid of {tuple(actual.shape)} for {tokens} tokens"}
    return {"outcome": "correct", "said": f"{size[0]}x{size[1]}, {tokens} tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sweep.json"))
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, *REFUSED_FAMILIES])
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in tqdm([name for name in names_of(tuple(args.families)) if name not in results]):
        try:
            results[name] = try_name(name)
        except Exception as error:
            results[name] = {"outcome": "failed", "said": repr(error)}
        results[name]["family"] = family_of(name)
        args.output.write_text(json.dumps(results, indent=1))
    print(f"{'family':28} {'tried':>6} {'correct':>8} {'refused':>8} {'failed':>7}")
    for family in args.families:
        count = Counter(result["outcome"] for result in results.values() if result["family"] == family)
        print(f"{family:28} {count.total():6} {count['correct']:8} {count['refused']:8} {count['failed']:7}")


if __name__ == "__main__":
    main()
