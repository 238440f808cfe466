"""The explanation of a batch: maps, logits and targets, and how it shows itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vit_explain_callback.metrics.attention import BlockStatistics
from vit_explain_callback.metrics.probability import class_probabilities
from vit_explain_callback.system.files import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_tensors,
    read_json,
    read_tensors,
    write_tensors,
)
from vit_explain_callback.visualization.captions import class_caption, range_caption
from vit_explain_callback.visualization.encode import jpeg, rendered
from vit_explain_callback.visualization.grid import Cell, draw_grid
from vit_explain_callback.visualization.overlay import Picture, colour_limit, overlay, range_of, unnormalise

_NUM_SHOWN = 8
_LARGEST = 1e6  # of a mean or deviation


@dataclass(frozen=True)
class Explanation:
    """The explanation of a batch. In a notebook it is shown as a figure.

    Attributes:
        maps: Relevance of each patch by method name, (B, grid_h, grid_w), raw: in a rollout, patches and prefix
            tokens together sum to 1; a flow is at most 1; `grad_attention` has both signs; a `MapFunction` has its own
            grid. Float32, or float64 for a float64 model.
        logits: (B, C).
        target: Class whose logit the gradients are of, (B,).
        blocks: What each block attends to, if asked for.
        images: The images that were passed in, (B, C, H, W), not a copy; None where the explanation does not keep them.
        normalisation: Mean and standard deviation that the images were normalised with, if the model says so.
        class_names: Name of each class, or None to show indices.
    """

    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor
    blocks: BlockStatistics | None = None
    images: Tensor | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    class_names: Sequence[str] | None = None

    def __repr__(self) -> str:
        maps = ", ".join(f"{name} {tuple(maps.shape)}" for name, maps in self.maps.items())
        return f"Explanation({len(self.logits)} images: {maps})"

    @classmethod
    def joined(cls, parts: Sequence[Explanation]) -> Explanation:
        """Concatenate explanations along the batch dimension."""
        blocks = [part.blocks for part in parts if part.blocks is not None]
        images = [part.images for part in parts if part.images is not None]
        return cls(
            maps={name: torch.cat([part.maps[name] for part in parts]) for name in parts[0].maps},
            logits=torch.cat([part.logits for part in parts]),
            target=torch.cat([part.target for part in parts]),
            blocks=BlockStatistics.joined(blocks) if blocks else None,
            images=torch.cat(images) if len(images) == len(parts) else None,
            normalisation=parts[0].normalisation,
            class_names=parts[0].class_names,
        )

    @property
    def prediction(self) -> Tensor:
        """(B,) predicted classes."""
        return self.logits.argmax(dim=1)

    @property
    def probabilities(self) -> Tensor:
        """(B, C) softmax of the logits, in float64; on the CPU where the logits are on MPS, which has no float64."""
        return class_probabilities(self.logits)

    @property
    def target_probability(self) -> Tensor:
        """(B,) probability of the target class, in [0, 1]."""
        probabilities = self.probabilities
        return probabilities.gather(1, self.target[:, None].to(probabilities.device))[:, 0]

    def cpu(self) -> Explanation:
        """A copy on the CPU, with logits in float32 at least."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return Explanation(
            {name: maps.cpu() for name, maps in self.maps.items()},
            logits.cpu(),
            self.target.cpu(),
            None if self.blocks is None else self.blocks.cpu(),
            None if self.images is None else self.images.cpu(),
            self.normalisation,
            self.class_names,
        )

    def overlay(self, method: str | None = None, index: int = 0) -> Picture:
        """The map of one image laid over it, (H, W, 3) uint8; colours as for the whole batch.

        Args:
            method: Name of the method; default: the first.
            index: Of the image.

        Raises:
            KeyError: If there is no such method.
            IndexError: If there is no such image.
            ValueError: If the images were not kept.
        """
        method = next(iter(self.maps)) if method is None else method
        if method not in self.maps:
            raise KeyError(f"Expected `method` to be one of {', '.join(self.maps)}, but got {method!r}.")
        maps = self.maps[method]
        return overlay(self._picture(index), maps[index], colour_limit(maps))

    def plot(self, num_shown: int = _NUM_SHOWN) -> Figure:
        """A matplotlib figure: rows are images, columns are the image and every method.

        Each column has its own colour scale, up to the limit in its heading, in multiples of uniform relevance.

        Args:
            num_shown: Images drawn, the first of the batch.

        Raises:
            ValueError: If the images were not kept.
        """
        signed = {name: bool((maps < 0).any()) for name, maps in self.maps.items()}
        headings = [f"{name}\n{range_caption(colour_limit(maps), signed[name])}" for name, maps in self.maps.items()]
        names, rows = self.class_names, []
        for index in range(min(num_shown, len(self.logits))):
            predicted, target = int(self.prediction[index]), int(self.target[index])
            cells = [
                Cell(self._picture(index), f"predicted {class_caption(predicted, self.probabilities[index], names)}")
            ]
            cells += [
                Cell(self.overlay(name, index), f"target {class_caption(target, self.probabilities[index], names)}")
                for name in self.maps
            ]
            rows.append(cells)
        return draw_grid(
            rows, ["image", *headings], limit_meaning="the limit over each column", signed=any(signed.values())
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file of `tensors`, whole or not at all."""
        names = None if self.class_names is None else [str(name) for name in self.class_names]
        # Safetensors does not keep the order of tensors, which is that of the columns in `plot`.
        about = {"methods": list(self.maps), "normalisation": self.normalisation, "class_names": names}
        write_tensors(Path(path), self.tensors(), {name: json.dumps(value) for name, value in about.items()})

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read what `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file, or one that was changed since.
        """
        path = Path(path)
        tensors, metadata = read_tensors(path)
        if "methods" not in metadata:
            raise ValueError(f"Expected {path} to be written by `Explanation.save`, but it was not.")
        methods = _names(path, metadata, "methods")
        class_names = None if metadata.get("class_names") == "null" else _names(path, metadata, "class_names")
        check_explanation(path, tensors, methods)
        explanation = cls.from_tensors(tensors)
        return replace(
            explanation,
            maps={name: explanation.maps[name] for name in methods},
            normalisation=_normalisation(path, metadata),
            class_names=class_names,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `map/{method}`, `logits`, `target`, `block/{statistic}` and `images`."""
        tensors = {f"map/{name}": maps for name, maps in self.maps.items()}
        tensors |= {"logits": self.logits, "target": self.target}
        if self.blocks is not None:
            tensors |= {f"block/{name}": statistic for name, statistic in vars(self.blocks).items()}
        if self.images is not None:
            tensors["images"] = self.images
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Explanation:
        """The explanation with these `tensors`; tensors of other names are ignored.

        Raises:
            KeyError: If `logits` or `target` is missing.
        """
        blocks = tensors_under("block", tensors)
        return cls(
            tensors_under("map", tensors),
            tensors["logits"],
            tensors["target"],
            BlockStatistics(**blocks) if blocks else None,
            tensors.get("images"),
        )

    def _picture(self, index: int) -> Picture:
        if self.images is None:
            raise ValueError(
                "Expected the explanation to hold its images, but it holds None: add them with "
                "`dataclasses.replace(explanation, images=images)`."
            )
        return unnormalise(self.images[index], *(self.normalisation or range_of(self.images)))

    def _repr_jpeg_(self) -> bytes | None:
        """JPEG, as a PNG of photographs takes four times the space in a notebook file."""
        return None if self.images is None else jpeg(rendered(self.plot()))

    def _repr_html_(self) -> str | None:
        """The picture and a line on the images that it leaves out; None where it shows all, as JPEG then suffices."""
        left = len(self.logits) - _NUM_SHOWN
        if self.images is None or left <= 0:
            return None
        data = base64.b64encode(jpeg(rendered(self.plot()))).decode()
        more = f"<p>{left} more images: <code>plot(num_shown={len(self.logits)})</code></p>"
        return f'<img alt="explanation" src="data:image/jpeg;base64,{data}">{more}'


def tensors_under(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `group/`, by name without that prefix."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _names(path: Path, metadata: Mapping[str, str], key: str) -> list[str]:
    names = read_json(path, metadata, key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected `{key}` in {path} to be a list of names, but got {metadata[key][:80]}.")
    return names


def _normalisation(path: Path, metadata: Mapping[str, str]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    value = read_json(path, metadata, "normalisation")
    if value is None:
        return None
    if not _are_channels(value):
        text = metadata["normalisation"][:80]
        raise ValueError(f"Expected `normalisation` in {path} to be a mean and a deviation a channel, but got {text}.")
    mean, std = (tuple(map(float, numbers)) for numbers in value)  # type: ignore[attr-defined]
    return mean, std


def _are_channels(value: object) -> bool:
    """Whether this is two lists of finite numbers, of equal length."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, list) and each for each in value):
        return False
    numbers = [*value[0], *value[1]]
    are_numbers = all(isinstance(number, int | float) and abs(number) < _LARGEST for number in numbers)
    return are_numbers and len(value[0]) == len(value[1])


def side_names(method: str) -> tuple[str, str]:
    """Names of the sides of a method's maps, as each method may have its own grid."""
    return f"grid_h of {method}", f"grid_w of {method}"


def check_explanation(path: str | Path, tensors: Mapping[str, Tensor], methods: Sequence[str]) -> None:
    """Check that the tensors of a file make an explanation.

    Raises:
        ValueError: If not; the error names the file and the tensor.
    """
    grid = ("grid_h", "grid_w")
    shapes: dict[str, tuple[str, ...]] = {"logits": ("B", "C"), "target": ("B",)}
    shapes |= {f"map/{name}": ("B", *side_names(name)) for name in methods}
    if any(name.startswith("block/") for name in tensors):
        maps = ("rows", "columns")
        shapes |= {
            f"block/{field.name}": ("B", "L", *(grid if field.name in maps else ()))
            for field in fields(BlockStatistics)
        }
    unknown = [name for name in tensors if name.startswith("block/") and name not in shapes]
    if unknown:
        raise ValueError(f"Expected {path} to hold statistics of blocks that are known, but got `{unknown[0]}`.")
    if "images" in tensors:
        shapes["images"] = ("B", "channels", "height", "width")
    check_tensors(path, tensors, shapes)
    for name in shapes:
        check_dtype(path, tensors, name, INTEGERS if name == "target" else FLOATS)
    target, classes = tensors["target"], tensors["logits"].shape[1]
    if target.min() < 0 or target.max() >= classes:
        raise ValueError(
            f"Expected `target` in {path} to be classes in 0 … {classes - 1}, but got {target.tolist()[:8]}."
        )
