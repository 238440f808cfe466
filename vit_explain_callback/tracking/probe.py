"""The probe: the fixed images that are explained again and again, with labels, regions and names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_explain_callback.explanation import tensors_under
from vit_explain_callback.system.files import (
    INTEGERS,
    check_dtype,
    check_tensors,
    read_json,
    read_tensors,
    savable,
    write_tensors,
)
from vit_explain_callback.visualization.overlay import Picture, range_of, resized, shown_bands, unnormalise
from vit_explain_callback.visualization.selection import spread_over_classes

_SIDE = 224
_ABOUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "class_names": (lambda value: value is None or _is_names(value), "a list of names, or null"),
    "regression": (lambda value: isinstance(value, bool), "true or false"),
    "multilabel": (lambda value: isinstance(value, bool), "true or false"),
    "num_shown": (lambda value: type(value) is int and 0 < value < 2**31, "a number of images"),
    "fingerprint": (lambda value: value is None or isinstance(value, str), "text, or null"),
}


@dataclass(frozen=True)
class Probe:
    """Images with labels, regions and names, on the CPU; create one with `Probe.of`.

    Attributes:
        images: (B, C, H, W), as the model takes them; None if the probe was read from a run's folder.
        pictures: Every image for display, (h, w, 3) uint8, all of one size.
        labels: (B,) class indices, -1 for an unlabelled image; None if there are no labels.
        regions: Masks of the images by name, (B, H, W) boolean.
        class_names: Name of each class, or None to show indices.
        regression: Whether the outputs are quantities instead of logits of classes.
        multilabel: Whether each class is a separate yes-or-no question.
        num_shown: Maximum number of images drawn.
        fingerprint: Hash that is equal for the same images and labels in another process.
    """

    images: Tensor | None
    pictures: Sequence[Picture]
    labels: Tensor | None = None
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    class_names: Sequence[str] | None = None
    regression: bool = False
    num_shown: int = 6
    fingerprint: str | None = None
    multilabel: bool = False

    @classmethod
    def of(
        cls,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        regions: Mapping[str, Tensor] | None = None,
        class_names: Sequence[str] | None = None,
        regression: bool = False,
        multilabel: bool = False,
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
        num_shown: int = 6,
    ) -> Probe:
        """Create a probe from a batch; pictures get a longer side of 224 pixels.

        Args:
            images: (B, C, H, W), as the model takes them.
            labels: (B,) class indices.
            regions: Masks of the images by name, (B, H, W) boolean.
            class_names: Name of each class.
            regression: Whether the outputs are quantities.
            multilabel: Whether each class is a separate yes-or-no question, with probability sigmoid(logit).
            normalisation: Mean and standard deviation of each channel, undone for display. Without them, the range of
                the images is stretched. Images with other than one or three channels show the first, or the first
                three.
            num_shown: Maximum number of images drawn, spread over the classes.

        Raises:
            ValueError: If a region does not hold one mask for each image, or channels do not match.
        """
        regions = {savable(name): masks for name, masks in (regions or {}).items()}
        class_names = None if class_names is None else [savable(str(name)) for name in class_names]
        check_regions(regions, len(images))
        bands = shown_bands(images)
        fits = normalisation is not None and len(normalisation[0]) == images.shape[1]
        mean, std = normalisation if fits and normalisation else range_of(bands)
        mean, std = mean[: bands.shape[1]], std[: bands.shape[1]]
        height, width = images.shape[2:]
        size = [round(side * _SIDE / max(height, width)) for side in (height, width)]
        pictures = [resized(unnormalise(image, mean, std), *size) for image in bands]
        shown = min(num_shown, len(images))
        digest = fingerprint(images, labels)
        return cls(images, pictures, labels, regions, class_names, regression, shown, digest, multilabel)

    @property
    def shown(self) -> list[int]:
        """Indices of the images that are drawn, spread over the classes."""
        labels = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels
        return spread_over_classes(labels, self.num_shown)

    def __len__(self) -> int:
        return len(self.pictures)

    def save(self, path: Path) -> None:
        """Write a safetensors file: `pictures`, `labels`, `region/{name}`, and the rest in its metadata."""
        tensors = {f"region/{name}": masks for name, masks in self.regions.items()}
        tensors["pictures"] = torch.stack([torch.tensor(picture) for picture in self.pictures])
        if self.labels is not None:
            tensors["labels"] = self.labels
        about = {
            "class_names": self.class_names,
            "regression": self.regression,
            "multilabel": self.multilabel,
            "num_shown": self.num_shown,
            "fingerprint": self.fingerprint,
        }
        write_tensors(path, tensors, {name: json.dumps(value) for name, value in about.items()})

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file, or has been changed.
        """
        tensors, metadata = read_tensors(path)
        about: dict[str, Any] = {name: read_json(path, metadata, name) for name in _ABOUT}
        for name, (is_right, expected) in _ABOUT.items():
            if not is_right(about[name]):
                raise ValueError(f"Expected `{name}` in {path} to be {expected}, but got {metadata[name][:80]}.")
        regions = tensors_under("region", tensors)
        _check_tensors(path, tensors, regions)
        labels = tensors["labels"].long() if "labels" in tensors else None
        return cls(None, list(tensors["pictures"].numpy()), labels, regions, **about)


def check_regions(regions: Mapping[str, Tensor], images: int) -> None:
    """Refuse regions that do not have one mask per image.

    Raises:
        ValueError: If a region has more or fewer masks than images.
    """
    for name, masks in regions.items():
        if len(masks) != images:
            raise ValueError(
                f"Expected `regions[{name!r}]` to hold one mask for each of the {images} probe images, but got "
                f"{len(masks)}."
            )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], regions: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not make a probe."""
    shapes: dict[str, tuple[str, ...]] = {"pictures": ("B", "height", "width", "channels")}
    shapes |= {"labels": ("B",)} if "labels" in tensors else {}
    check_tensors(path, tensors, shapes)
    for name in regions:  # masks have the size of the images that the model takes
        check_tensors(path, tensors, {"pictures": shapes["pictures"], f"region/{name}": ("B", "mask_h", "mask_w")})
        check_dtype(path, tensors, f"region/{name}", (torch.bool,))
    check_dtype(path, tensors, "pictures", (torch.uint8,))
    if "labels" in tensors:
        check_dtype(path, tensors, "labels", INTEGERS)
    if tensors["pictures"].shape[3] != 3:
        raise ValueError(f"Expected `pictures` in {path} of three colours, but got {tensors['pictures'].shape[3]}.")


def fingerprint(images: Tensor, labels: Tensor | None) -> str:
    """SHA-256 of the pixels, shape and labels: equal for the same probe in another process."""
    digest = hashlib.sha256(repr((images.dtype, tuple(images.shape))).encode())
    for tensor in (images, labels):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
