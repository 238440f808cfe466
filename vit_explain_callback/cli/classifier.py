"""A classifier of photographs: model, transform and class names."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from vit_explain_callback.cli.photograph import Transform, View
from vit_explain_callback.cli.weights import Weights, model_with_weights
from vit_explain_callback.vit.timm import Normalisation, normalisation, refuse_other_timm_models

_MAX_SUGGESTIONS = 5


def timm_transform(model: nn.Module, image_size: int | None = None) -> Transform:
    """Create the evaluation transform of a timm model, for another image size if one is passed."""
    args = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    config = resolve_model_data_config(model, args)  # type: ignore[no-untyped-call]
    transform: Transform = create_transform(**config, is_training=False)
    return transform


@dataclass(frozen=True)
class Classifier:
    """A classifier of photographs.

    Attributes:
        name: Name on the command line.
        model: Turns a batch of images into logits, (B, C), or into features if `num_classes` is 0.
        view: Transform, and the part of a photograph that it uses.
        num_classes: Number of classes C.
        class_names: Name of each class, or None.
        normalisation: Mean and standard deviation of the transform, or None.
    """

    name: str
    model: nn.Module
    view: View
    num_classes: int
    class_names: Sequence[str] | None
    normalisation: Normalisation = None

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"Expected `class_names` to name each of the {self.num_classes} classes of {self.name}, but got "
                f"{len(self.class_names)} names."
            )

    @classmethod
    def from_timm(
        cls,
        name: str,
        checkpoint: Path | None = None,
        image_size: int | None = None,
        class_names: Sequence[str] | None = None,
        prefix: str | None = None,
        any_model: bool = False,
    ) -> Classifier:
        """Create a timm model with weights from the hub, or from a timm, Lightning or safetensors file.

        Args:
            name: Name of the model in timm.
            checkpoint: File of weights; default: weights from the hub.
            image_size: Side length of its images in pixels; default: the model's.
            class_names: Name of each class; default: those of ImageNet if the number of classes matches.
            prefix: Prefix of the model's tensor names, needed if the file holds several models.
            any_model: Whether models other than ViTs are accepted.

        Raises:
            OSError: If the weights cannot be fetched or do not exist.
            ValueError: If the model does not exist or is not a ViT, or if file, size or names do not fit it.
        """
        _check_timm_name(name)
        options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        try:
            if checkpoint is not None:
                model = model_with_weights(name, Weights.read(checkpoint, prefix), **options)
            else:
                with _quiet_hub():
                    model = timm.create_model(name, pretrained=True, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            raise ValueError(f"Expected no `image_size` for {name}, whose is fixed, but got {image_size}.") from error
        except (OSError, RuntimeError) as error:
            if checkpoint is not None:
                raise
            raise OSError(
                f"The weights of {name} cannot be fetched from the hub ({_first_line(error)}). Offline, pass a file of "
                "weights with --checkpoint FILE."
            ) from error
        if not any_model:
            refuse_other_timm_models(model)
        _check_image_size(name, model, image_size)
        subset = infer_imagenet_subset(model) if class_names is None and model.num_classes else None
        if subset is not None:
            class_names = list(ImageNetInfo(subset).label_descriptions())
        view = View(timm_transform(model, image_size))
        return cls(name, model, view, model.num_classes, class_names, normalisation(model))

    @classmethod
    def from_hugging_face(cls, name: str, class_names: Sequence[str] | None = None) -> Classifier:
        """Load an image classifier of transformers, from the hub or from a folder.

        Args:
            name: Name on the hub, or path of a folder.
            class_names: Name of each class; default: those of its configuration.

        Raises:
            ImportError: If transformers is not installed.
            OSError: If it cannot be fetched or does not exist.
            ValueError: If it is not an image classifier, or if the names do not fit.
        """
        try:
            from transformers import AutoImageProcessor, AutoModelForImageClassification
        except ImportError as error:
            raise ImportError(
                'Expected transformers to be installed for --hf, but it is not: pip install "vit-explain-callback[hf]".'
            ) from error
        try:
            with _quiet_hub(), quiet_transformers():
                # Before the model: it is smaller and as likely to be missing.
                processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                    name, trust_remote_code=False
                )
                model, loading_info = AutoModelForImageClassification.from_pretrained(
                    name, output_loading_info=True, trust_remote_code=False
                )
        except OSError as error:
            raise OSError(
                f"{name} is neither a folder with an image classifier and its image processor nor available on the hub "
                f"({_first_line(error)}). Offline, pass a folder written by `save_pretrained`."
            ) from error
        if loading_info["missing_keys"]:
            missing = ", ".join(sorted(loading_info["missing_keys"])[:3])
            raise ValueError(
                f"Expected {name} to be a complete image classifier, but it lacks {missing}. Fine-tune it first."
            )

        def transform(image: Image.Image) -> Tensor:
            pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
            return pixels

        if class_names is None:
            class_names = [
                model.config.id2label.get(index, f"class {index}") for index in range(model.config.num_labels)
            ]
        mean, std = (getattr(processor, said, None) for said in ("image_mean", "image_std"))
        mean_std = (tuple(mean), tuple(std)) if mean and std else None
        return cls(name, model.eval(), View(transform), model.config.num_labels, class_names, mean_std)

    def class_index(self, text: str) -> int:
        """Look up a class by index or name; any synonym in a name such as `tabby, tabby cat` matches.

        Raises:
            ValueError: If no class or several classes match.
        """
        if self.num_classes == 0:
            raise ValueError(f"Expected no class for {self.name}, which has no classifier, but got {text!r}.")
        if text.lstrip("-").isdecimal():
            if 0 <= int(text) < self.num_classes:
                return int(text)
            raise ValueError(f"Expected a class in 0 … {self.num_classes - 1} (of {self.name}), but got {text}.")
        if self.class_names is None:
            raise ValueError(
                f"Expected a class index, as {self.name} has no class names, but got {text!r}. Pass --class_names."
            )
        query = text.strip().casefold()
        exact = [index for index, name in enumerate(self.class_names) if name.casefold() == query]
        matches = exact or [index for index, name in enumerate(self.class_names) if query in _synonyms(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            several = ", ".join(f"{index} ({self.class_names[index]})" for index in matches)
            raise ValueError(f"Expected one class, but {text!r} names several: pass one of the indices {several}.")
        raise ValueError(f"Expected a class of {self.name}, but got {text!r}. {self._suggestions(query)}")

    def _suggestions(self, query: str) -> str:
        assert self.class_names is not None
        containing = [
            i for i, name in enumerate(self.class_names) if query in name.casefold().replace(",", " ").split()
        ]
        named = {synonym: index for index, name in enumerate(self.class_names) for synonym in _synonyms(name)}
        similar = [named[word] for word in difflib.get_close_matches(query, named, _MAX_SUGGESTIONS)]
        suggested = list(dict.fromkeys(containing[:_MAX_SUGGESTIONS] + similar))[:_MAX_SUGGESTIONS]
        if not suggested:
            suggested = list(range(min(_MAX_SUGGESTIONS, len(self.class_names))))
            return f"Its classes are {', '.join(self.class_names[i] for i in suggested)}" + (
                "." if len(self.class_names) <= _MAX_SUGGESTIONS else " …"
            )
        return f"Close: {'; '.join(f'{index} {self.class_names[index]}' for index in suggested)}."

    def class_name(self, index: int) -> str:
        """The first synonym in the name of a class."""
        return f"class {index}" if self.class_names is None else str(self.class_names[index]).split(",")[0]


def _synonyms(name: str) -> list[str]:
    return [synonym.strip().casefold() for synonym in name.split(",")]


def _check_timm_name(name: str) -> None:
    plain = name.split(".")[0]
    if ":" not in name and not timm.is_model(plain):
        suggested = difflib.get_close_matches(plain, timm.list_models("*vit*") + timm.list_models("*deit*"), 3)
        raise ValueError(
            f"Expected `model` to be the name of a timm model, but got {name}"
            + (f": did you mean {' or '.join(suggested)}?" if suggested else ".")
        )


def _check_image_size(name: str, model: Any, image_size: int | None) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if image_size is not None and patch is not None and any(image_size % side for side in patch):
        raise ValueError(
            f"Expected `image_size` to be a multiple of the {patch[0]}-pixel patches of {name}, but got {image_size}."
        )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's client, which logs each attempt; the error states the cause."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the bars and tables that transformers prints for each file; errors state the cause."""
    from transformers.utils import logging

    log: Any = logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
