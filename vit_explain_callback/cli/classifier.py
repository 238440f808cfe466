"""A classifier with all that it takes to be asked about photographs: model, transform and names of classes."""

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
    """The evaluation transform of a timm model, for another size of image if one is given."""
    args = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    config = resolve_model_data_config(model, args)  # type: ignore[no-untyped-call]
    transform: Transform = create_transform(**config, is_training=False)
    return transform


@dataclass(frozen=True)
class Classifier:
    """A model for photographs.

    Attributes:
        name: What it was asked for by.
        model: Turns a batch of images into logits, (B, C); features where `num_classes` is 0.
        view: How it sees photographs.
        num_classes: C.
        class_names: Name of each class, or None.
        normalisation: Mean and standard deviation that its images are given, where it says so.
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
        """A timm model with weights from the hub, or from a file of timm, Lightning or safetensors.

        Args:
            name: Of the model.
            checkpoint: The file.
            image_size: Side of its images in pixels; default: the model's own.
            class_names: Name of each class; default: those of ImageNet if it has as many classes.
            prefix: Of the model's names in the file, needed where it holds several models.
            any_model: Whether one that is no ViT will do.

        Raises:
            OSError: If the weights cannot be fetched or found.
            ValueError: If there is no such model, if it is no ViT, or if file, size or names do not fit it.
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
            raise ValueError(f"Expected no `image_size` for {name}, but got {image_size}: it takes none.") from error
        except (OSError, RuntimeError) as error:
            if checkpoint is not None:
                raise
            raise OSError(
                f"The weights of {name} cannot be fetched from the hub ({_first_line(error)}). Offline, give a file of "
                "them with --checkpoint FILE."
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
        """An image classifier of transformers, from the hub or from a folder.

        Args:
            name: On the hub, or the path of a folder.
            class_names: Name of each class; default: those of its configuration.

        Raises:
            ImportError: If transformers is not installed.
            OSError: If it cannot be fetched or found.
            ValueError: If it is no image classifier, or the names do not fit.
        """
        try:
            from transformers import AutoImageProcessor, AutoModelForImageClassification
        except ImportError as error:
            raise ImportError(
                'Expected transformers to be installed for --hf, but it is not: pip install "vit-explain-callback[hf]".'
            ) from error
        try:
            with _quiet_hub(), quiet_transformers():
                # Before the model: it is smaller, and as likely to be missing.
                processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                    name, trust_remote_code=False
                )
                model, loading_info = AutoModelForImageClassification.from_pretrained(
                    name, output_loading_info=True, trust_remote_code=False
                )
        except OSError as error:
            raise OSError(
                f"{name} is neither a folder of an image classifier and its image processor nor to be had from the hub "
                f"({_first_line(error)}). Offline, give a folder made with `save_pretrained`."
            ) from error
        if loading_info["missing_keys"]:
            missing = ", ".join(sorted(loading_info["missing_keys"])[:3])
            raise ValueError(
                f"Expected {name} to hold a whole image classifier, but it lacks {missing}: fine-tune it first."
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
        """The class that an index or a name stands for; of a name with synonyms, as `tabby, tabby cat`, each will do.

        Raises:
            ValueError: If it stands for none, or for several.
        """
        if self.num_classes == 0:
            raise ValueError(f"Expected no class for {self.name}, but got {text!r}: it has no classifier.")
        if text.lstrip("-").isdecimal():
            if 0 <= int(text) < self.num_classes:
                return int(text)
            raise ValueError(f"Expected a class in 0 … {self.num_classes - 1} (of {self.name}), but got {text}.")
        if self.class_names is None:
            raise ValueError(
                f"Expected an index, as {self.name} names no classes, but got {text!r}: say --class_names."
            )
        query = text.strip().casefold()
        exact = [index for index, name in enumerate(self.class_names) if name.casefold() == query]
        matches = exact or [index for index, name in enumerate(self.class_names) if query in _synonyms(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            several = ", ".join(f"{index} ({self.class_names[index]})" for index in matches)
            raise ValueError(f"Expected one class, but {text!r} is the name of several: give an index of {several}.")
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
        """A short name: the first of its synonyms."""
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
    """The hub's client logs each of its attempts; the error says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers draws a bar and logs a table for each file; errors say it all."""
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
