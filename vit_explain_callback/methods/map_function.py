"""A user's function as a method: it returns a map of each image.

Shapes: B images, C classes or channels, h and w the map's own grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vit_explain_callback.isolation.wrappers import has_twin
from vit_explain_callback.methods.base import Method

_RESERVED = "random"  # the control of faithfulness


@dataclass(frozen=True)
class MapFunction:
    """A method of your own that needs no attention, and so no ViT; accepted wherever a method's name is.

    The function is called with

    - `model`: a copy of the model, in evaluation mode, whose parameters ask for no gradients. `model(images)` gives the
      logits (B, C) that are explained, and gradients of them reach whatever lies between. Modules are those of the
      copy: `model.layer4` or `model.get_submodule("layer4")`, never a module that was looked up beforehand.
    - `images`: (B, C, H, W), normalised as the model expects.
    - `target`: (B,) classes.

    It returns (B, h, w), floating-point, on the device of the images or on the CPU. Any grid will do, the images' own
    included; it must be the same in every snapshot. More relevant is greater, and what speaks against the class may be
    below zero. Random streams begin at the same place in each call, so that sampling is no drift.

    The model that is trained is left alone: where the function leaves gradients, hooks or flags changed on that one,
    they are put back, and the map is refused.

    Args:
        name: Key of the maps and part of TensorBoard tags: letters, digits, `_`, `.` and `-`.
        function: Called as `function(model, images, target)`.
        needs_target: Whether maps depend on the class; else they are computed once for several.

    Raises:
        TypeError: If `function` cannot be called.
        ValueError: If `name` has other characters, or is `random`, which the control of faithfulness is called.

    Example:
        >>> def saliency(model, images, target):
        ...     images.requires_grad_()
        ...     logits = model(images).gather(1, target[:, None])
        ...     return torch.autograd.grad(logits.sum(), images)[0].abs().amax(dim=1)
        >>> from vit_explain_callback import explain
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
        >>> explain(model, torch.randn(2, 3, 16, 16), [MapFunction("saliency", saliency)]).maps["saliency"].shape
        torch.Size([2, 16, 16])
    """

    name: str
    # Not `Tensor`: LightningCLI would then take no function whose return type is not annotated.
    function: Callable[[nn.Module, Tensor, Tensor], Any]
    needs_target: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name) or self.name == _RESERVED:
            raise ValueError(
                "Expected `name` of letters, digits, `_`, `.` and `-`, and not `random`, as in `grad_cam`, but got "
                f"{self.name!r}."
            )
        if not callable(self.function):
            raise TypeError(
                f"Expected the `function` of `{self.name}` to be called as `function(model, images, target)`, but got "
                f"{self.function!r:.80}."
            )

    @property
    def kind(self) -> str:
        """Its name: there are no options."""
        return self.name

    def maps(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Call the function: its maps (B, h, w), on the device of the images, in float32 or float64.

        Raises:
            RuntimeError: If the function fails, or does not return maps.
        """
        try:
            maps = self.function(model, images, target)
        except Exception as error:
            raise RuntimeError(
                f"Expected the function of `{self.name}` to give maps of {len(images)} images, but it raised {error!r}."
            ) from error
        if not isinstance(maps, Tensor) or not maps.is_floating_point():
            got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
            raise RuntimeError(f"{self._expected('a floating-point tensor of')} (B, h, w), but it gave {got}.")
        if maps.ndim != 3 or len(maps) != len(images) or 0 in maps.shape:
            raise RuntimeError(f"{self._expected('maps of shape')} ({len(images)}, h, w), but got {tuple(maps.shape)}.")
        if maps.device.type not in ("cpu", images.device.type):
            raise RuntimeError(
                f"{self._expected('maps on')} {images.device} or the CPU, but they are on {maps.device}."
            )
        return maps.detach().to(images.device, torch.promote_types(maps.dtype, torch.float32))

    def _expected(self, what: str) -> str:
        return f"Expected the function of `{self.name}` to give {what}"


AnyMethod: TypeAlias = Method | MapFunction
"""Any object that is accepted as a method."""


def of_attention(methods: Sequence[AnyMethod]) -> list[Method]:
    """The methods that need the attention of a ViT."""
    return [method for method in methods if isinstance(method, Method)]


def of_functions(methods: Sequence[AnyMethod]) -> list[MapFunction]:
    """The methods that need only a model."""
    return [method for method in methods if isinstance(method, MapFunction)]


def check_functions(functions: Sequence[MapFunction], model: nn.Module, query: tuple[int, int] | None) -> None:
    """Refuse functions where they cannot be run.

    Raises:
        ValueError: If the model has no copy for them to work on, or relevance is to start from a patch.
    """
    names = ", ".join(f"`{function.name}`" for function in functions)
    if functions and not has_twin(model):
        raise ValueError(
            f"Expected a model that can be copied for {names}, but {type(model).__name__} is scripted, or its "
            "parameters are spread over processes. Leave the functions out, or explain checkpoints of the run with "
            "`explain`."
        )
    if functions and query is not None:
        raise ValueError(
            f"Expected no `query` for {names}: functions are given images and classes. Ask for `attention` or "
            "`rollout`."
        )


def check_vit_options(methods: Sequence[AnyMethod], options: Mapping[str, object]) -> None:
    """Refuse options that describe a ViT where no method needs one.

    Raises:
        ValueError: If one is not None.
    """
    vit_options = [f"`{name}`" for name in ("vit", "prefix_tokens", "grid_size") if options.get(name) is not None]
    if vit_options and not of_attention(methods):
        raise ValueError(
            f"Expected no {' or '.join(vit_options)} for {', '.join(method.name for method in methods)} alone, as "
            "functions look for no ViT: leave it out. `forward` says how to get logits."
        )


def check_removal(removal: str, methods: Sequence[AnyMethod]) -> None:
    """Refuse to leave out tokens for functions, whose grid need not be that of the tokens.

    Raises:
        ValueError: If `removal` is "tokens" and there is a function.
    """
    names = [f"`{method.name}`" for method in methods if isinstance(method, MapFunction)]
    if removal == "tokens" and names:
        raise ValueError(
            f"Expected `removal='mean_colour'` for {', '.join(names)}, whose cells are no tokens, but got 'tokens'."
        )
