"""Models that are not timm's: Hugging Face, torchvision and plain PyTorch, whose layout is found by experiment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests import oracle
from tests.models import CLASSES, random_images, randomised, tiny_vit
from vit_explain_callback import GradRollout, Rollout, explain

transformers = pytest.importorskip("transformers")
METHODS = [Rollout(), Rollout("max", 0.5), GradRollout(), GradRollout("max", 0.5, 2)]
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}

CLASS, PATCHES = {0: 1.0}, {"patches": 1.0}
HUGGING_FACE: dict[str, tuple[int, dict[Any, float]]] = {  # name: prefix tokens, what the classifier reads
    "ViT": (1, CLASS),
    "DeiT": (2, CLASS),
    "Dinov2": (1, {0: 0.5, "patches": 0.5}),
    "Dinov2WithRegisters": (5, {0: 0.5, "patches": 0.5}),
    "Beit": (1, PATCHES),
    "Siglip": (0, PATCHES),
    "CLIP": (1, PATCHES),
    "DINOv3ViT": (3, CLASS),
}


def hugging_face(name: str, attention: str) -> Any:
    configuration = getattr(transformers, f"{name}Config")
    if name in ("Siglip", "CLIP"):
        config = configuration(vision_config=SMALL, text_config={}, num_labels=CLASSES)
    else:
        config = configuration(**SMALL, num_labels=CLASSES)
    config._attn_implementation = attention
    if name == "DINOv3ViT":
        config.num_register_tokens = 2
        return randomised(WithHead(transformers.DINOv3ViTModel(config)), seed=0).eval()
    return randomised(getattr(transformers, f"{name}ForImageClassification")(config), seed=0).eval()


class WithHead(nn.Module):
    """A classifier on a Hugging Face backbone's class token."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooler_output)


class Plain(nn.Module):
    """A ViT as people write it: class token at either end, any order of the dimensions, any pooling."""

    def __init__(self, pooling: str = "first", batch_first: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 48))
        self.positions = nn.Parameter(torch.zeros(1, 25, 48))
        layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, CLASSES)
        self.pooling, self.batch_first = pooling, batch_first

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(images), -1, -1)
        order = [patches, class_token] if self.pooling == "last" else [class_token, patches]
        tokens = torch.cat(order, dim=1) + self.positions
        tokens = self.encoder(tokens if self.batch_first else tokens.transpose(0, 1))
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        pooled = {
            "first": lambda: tokens[:, 0],
            "last": lambda: tokens[:, -1],
            "mean": lambda: tokens.mean(dim=1),
            "max": lambda: tokens.amax(dim=1),
            "weighted": lambda: (tokens * tokens[..., :1].softmax(dim=1)).sum(dim=1),
            "some": lambda: tokens[:, 3:7].mean(dim=1),
        }[self.pooling]()
        return self.head(pooled)


def check(model: Any, images: Tensor, grid: tuple[int, int], first: int, readout: dict[Any, float]) -> None:
    """Maps of `model` against the oracle, told by the test what the tokens are."""
    model = model.double()
    explanation = explain(model, images, METHODS)
    found = oracle.matrices(Logits(model), images)
    tokens, patches = found.attentions[0].shape[-1], slice(first, first + grid[0] * grid[1])
    start = torch.zeros(tokens, dtype=torch.float64)
    for key, weight in readout.items():
        rows = patches if key == "patches" else slice(0, tokens) if key == "all" else slice(key, key + 1)
        start[rows] += weight / len(start[rows])
    class_token = next((key for key in readout if isinstance(key, int)), None)
    for method in METHODS:
        for image in range(len(images)):
            blocks = [a[image] for a in found.attentions[:3]]
            gradients = [g[image] for g in found.gradients[:3]] if isinstance(method, GradRollout) else None
            options = (method.head_fusion, method.discard_ratio, method.start_layer, class_token)
            expected = oracle.rollout(blocks, gradients, start, *options)[patches].reshape(grid)
            torch.testing.assert_close(explanation.maps[method.name][image], expected, rtol=1e-9, atol=1e-12)


class Logits(nn.Module):
    """A model that returns the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return getattr(output, "logits", output)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_equal_the_oracle_and_both_attentions_agree(name: str) -> None:
    prefix, readout = HUGGING_FACE[name]
    model, images = hugging_face(name, "sdpa"), random_images(2)
    check(model, images, (4, 4), prefix, readout)
    fused = explain(model.double(), images, METHODS)
    eager = explain(hugging_face(name, "eager").double(), images, METHODS)
    for key, maps in fused.maps.items():
        # Some of the eager ones take their softmax in float32, whatever the model's dtype.
        torch.testing.assert_close(eager.maps[key].double(), maps, rtol=1e-4, atol=1e-6)


def test_a_timm_model_wrapped_by_hugging_face() -> None:
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=CLASSES, model_args={"img_size": 32, "depth": 2}
    )
    model = transformers.TimmWrapperForImageClassification(config).eval()
    images = random_images(2)
    for key, maps in explain(model, images).maps.items():
        torch.testing.assert_close(maps, explain(model.timm_model, images).maps[key])


def test_torchvision() -> None:
    options = {"num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96, "num_classes": CLASSES}
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **options)
    check(randomised(model, seed=0), random_images(2), (4, 4), 1, CLASS)


@pytest.mark.parametrize(
    ("pooling", "first", "readout"),
    [("first", 1, {0: 1.0}), ("last", 0, {24: 1.0}), ("mean", 1, {"all": 1.0})],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_plain_pytorch(pooling: str, first: int, readout: dict[Any, float], batch_first: bool) -> None:
    model = randomised(Plain(pooling, batch_first), seed=0)
    check(model, random_images(2, (32, 48)), (4, 6), first, readout)


@pytest.mark.parametrize("pooling", ["max", "weighted", "some"])
def test_a_readout_that_cannot_be_told_is_refused(pooling: str) -> None:
    with pytest.raises(ValueError, match="no row of the rollout stands for its prediction"):
        explain(randomised(Plain(pooling), seed=0), random_images(2, (32, 48)))


def test_a_compiled_model_gives_the_same_maps() -> None:
    model, images = tiny_vit(), random_images(2)
    expected = explain(model, images)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(images)
    for key, maps in explain(compiled, images).maps.items():
        torch.testing.assert_close(maps, expected.maps[key])
    model.compile(backend="eager")
    model(images)
    for key, maps in explain(model, images).maps.items():
        torch.testing.assert_close(maps, expected.maps[key])


def test_models_without_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected attention among the tokens of an image in ResNet, but saw none"):
        explain(torchvision.models.resnet18(num_classes=3), random_images(1, (64, 64)))
    with pytest.raises(ValueError, match="windowed, hierarchical and convolutional"):
        explain(torchvision.models.swin_t(num_classes=3), random_images(1, (64, 64)))
