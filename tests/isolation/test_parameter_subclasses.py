"""Weights that are no plain parameters, as those that are quantised: nothing is asked of them that they cannot answer.

Of bitsandbytes and torchao themselves where they are installed, and of a stand-in that can do no more than they.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.models import CLASSES, random_images, randomised, tiny_vit
from tests.optional import optional
from tests.plain_vits import SIZE, PlainViT, built
from vit_explain_callback import MapFunction, explain

peft, transformers = optional("peft"), optional("transformers")

METHODS = ["rollout", "grad_rollout", "legrad", "chefer"]


class Int8Weight(Tensor):
    """Integers and a scale for each row that pass for floats: they can be multiplied with, moved and detached."""

    integers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=integers.device)
        made.integers, made.scale = integers, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, *_: Any) -> Any:
        return cls(parts["integers"], parts["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            dense = weight.integers.to(weight.scale.dtype) * weight.scale
            return nn.functional.linear(x, dense, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten.clone):
            return cls(func(args[0].integers), args[0].scale)
        raise NotImplementedError(f"Int8Weight dispatch: {func} of {tree_map(type, args)} is not implemented")


def stand_in(layer: nn.Linear) -> nn.Linear:
    weight = layer.weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).to(weight)
    made.bias = layer.bias
    made.weight = nn.Parameter(Int8Weight((weight / scale).round().to(torch.int8), scale), requires_grad=False)
    return made


def dense(layer: nn.Linear) -> nn.Linear:
    """What the stand-in computes, of plain weights."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).to(layer.weight)
    weight: Any = stand_in(layer).weight
    made.bias = layer.bias
    made.weight = nn.Parameter((weight.integers.to(weight.scale.dtype) * weight.scale).detach(), requires_grad=False)
    return made


def swapped(model: Any, swap: Callable[[nn.Linear], nn.Module], only: str = "") -> Any:
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and only in f"{path}.{name}":
                setattr(module, name, swap(child))
    return model


def adapted(model: Any) -> Any:
    """With low-rank adapters on the projections to queries, whatever they are called."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=sorted(names & {"qkv", "query", "q_proj"})))


def hugging_face() -> Any:
    shape: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
    shape["num_labels"] = CLASSES
    config = transformers.ViTConfig(**shape, intermediate_size=96, patch_size=8)
    return randomised(transformers.ViTForImageClassification(config), 0).eval()


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit, self.head = tiny_vit(num_classes=0), randomised(nn.Linear(48, CLASSES), 1)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.vit(images))


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "timm": (tiny_vit, (32, 32)),
    "a head on timm": (lambda: WithHead().eval(), (32, 32)),
    "Hugging Face": (hugging_face, (32, 32)),
    "one's own": (lambda: built(PlainViT).float(), SIZE),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_stand_in_gives_the_maps_of_what_it_stands_for(name: str, lora: bool) -> None:
    make, size = MODELS[name]
    images = random_images(2, size)
    found, expected = (swapped(make(), swap) for swap in (stand_in, dense))
    if lora:
        torch.manual_seed(0)
        found, expected = (adapted(model) for model in (found, expected))
        if not any(isinstance(module, Int8Weight) for module in found.parameters()):
            pytest.skip("the adapters unpacked the weights")
    maps = explain(expected, images, METHODS).maps
    for key, value in explain(found, images, METHODS).maps.items():
        torch.testing.assert_close(value, maps[key], rtol=1e-4, atol=1e-6)


def test_a_function_of_ones_own_and_quantised_buffers() -> None:
    """Its buffers are looked at afterwards, to see whether it changed them."""
    model = tiny_vit()
    weight: Any = stand_in(nn.Linear(4, 4)).weight
    model.register_buffer("spare", weight.detach())
    function = MapFunction("own", lambda model, images, target: images.detach().mean(dim=1))
    assert explain(model, random_images(2), [function]).maps["own"].shape == (2, 32, 32)


def quantised(kind: str) -> Any:
    bnb = pytest.importorskip("bitsandbytes")

    def swap(layer: nn.Linear) -> nn.Module:
        bias = layer.bias is not None
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias, compute_dtype=torch.float32)
        made.load_state_dict(layer.state_dict())
        return made

    return swapped(tiny_vit(embed_dim=96), swap, "blocks").to("cpu").eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bitsandbytes(kind: str, lora: bool) -> None:
    model = quantised(kind)
    explained_as_it_computes((adapted(model) if lora else model).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
def test_torchao(lora: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for make in (lambda: tiny_vit(embed_dim=96), hugging_face, lambda: WithHead().eval()):
        model = make()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        explained_as_it_computes((adapted(model) if lora else model).eval())


def explained_as_it_computes(model: Any) -> None:
    images = random_images(2)
    found = explain(model, images, ["rollout", "grad_rollout"])
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(found.logits, getattr(logits, "logits", logits), rtol=1e-3, atol=1e-3)
    assert all(maps.isfinite().all() and maps.std() > 0 for maps in found.maps.values())
