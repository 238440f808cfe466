"""Any explainer as a method: a function that gives a map of each image.

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
    """A method of one's own that needs no attention, and so no ViT: it may stand wherever a method's name may.

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
        """What the function gives, (B, h, w), on the device of the images, in float32 or float64.

        Raises:
            RuntimeError: If the function fails, or gives something else.
        """
        try:
            found = self.function(model, images, target)
        except Exception as error:
            raise RuntimeError(
                f"Expected the function of `{self.name}` to give maps of {len(images)} images, but it raised {error!r}."
            ) from error
        if not isinstance(found, Tensor) or not found.is_floating_point():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise RuntimeError(f"{self._expected('a floating-point tensor of')} (B, h, w), but it gave {got}.")
        if found.ndim != 3 or len(found) != len(images) or 0 in found.shape:
            raise RuntimeError(
                f"{self._expected('maps of shape')} ({len(images)}, h, w), but got {tuple(found.shape)}."
            )
        if found.device.type not in ("cpu", images.device.type):
            raise RuntimeError(
                f"{self._expected('maps on')} {images.device} or the CPU, but they are on {found.device}."
            )
        return found.detach().to(images.device, torch.promote_types(found.dtype, torch.float32))

    def _expected(self, what: str) -> str:
        return f"Expected the function of `{self.name}` to give {what}"


AnyMethod: TypeAlias = Method | MapFunction
"""What may stand where a method is asked for."""


def of_attention(methods: Sequence[AnyMethod]) -> list[Method]:
    """Those that need the attention of a ViT."""
    return [method for method in methods if isinstance(method, Method)]


def of_functions(methods: Sequence[AnyMethod]) -> list[MapFunction]:
    """Those that need a model only."""
    return [method for method in methods if isinstance(method, MapFunction)]


def check_functions(functions: Sequence[MapFunction], model: nn.Module, query: tuple[int, int] | None) -> None:
    """Refuse functions for what they cannot be asked.

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
    """Refuse those of a model's options that say something of a ViT, where no method needs one.

    Raises:
        ValueError: If one is not None.
    """
    given = [f"`{name}`" for name in ("vit", "prefix_tokens", "grid_size") if options.get(name) is not None]
    if given and not of_attention(methods):
        raise ValueError(
            f"Expected no {' or '.join(given)} for {', '.join(method.name for method in methods)} alone, as functions "
            "look for no ViT: leave it out. `forward` says how to get logits."
        )


def check_removal(removal: str, methods: Sequence[AnyMethod]) -> None:
    """Refuse to leave tokens out for maps whose grid need not be that of the tokens.

    Raises:
        ValueError: If that is asked for.
    """
    names = [f"`{method.name}`" for method in methods if isinstance(method, MapFunction)]
    if removal == "tokens" and names:
        raise ValueError(
            f"Expected `removal='mean_colour'` for {', '.join(names)}, whose cells are no tokens, but got 'tokens'."
        )
