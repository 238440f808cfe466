"""What a snapshot says: the scalars and pictures of a run's history, by TensorBoard tag."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit_explain_callback._files import read_tensors, write_tensors
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.tracking.probe import ProbeBatch
from vit_explain_callback.tracking.scalars import scalars, scale
from vit_explain_callback.tracking.snapshot import History, Snapshot
from vit_explain_callback.visualization.captions import caption, title
from vit_explain_callback.visualization.encode import animation
from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.overlay import (
    Picture,
    colour_limit,
    difference,
    overlay,
    range_of,
    resized,
    unnormalise,
)
from vit_explain_callback.visualization.text import with_strip

_SIDE = 224
_FILMSTRIP_MAPS = 4


@dataclass(frozen=True)
class Report:
    """Turns the history of a run into scalars and pictures.

    Attributes:
        labels: (B,) of the probe images, or None where they are not known.
        pictures: The images that are shown, the first of the probe batch, all of one size.
        class_names: Name of each class, or None to show indices.
        regions: Masks of the probe images by name, (B, H, W) boolean.
    """

    labels: Tensor | None
    pictures: list[Picture]
    class_names: Sequence[str] | None
    regions: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        probe: ProbeBatch,
        num_shown: int,
        normalised: tuple[Sequence[float], Sequence[float]] | None,
        class_names: Sequence[str] | None,
        regions: Mapping[str, Tensor],
    ) -> Report:
        """Undo the normalisation (mean, std) of the images that are shown, with a longer side of 224 pixels.

        Without a normalisation, the range of the images is stretched to that of a picture.
        """
        normalised = normalised or range_of(probe.images)
        height, width = probe.images.shape[2:]
        size = [round(side * _SIDE / max(height, width)) for side in (height, width)]
        pictures = [resized(unnormalise(image, *normalised), *size) for image in probe.images[:num_shown]]
        return cls(probe.labels, pictures, class_names, regions)

    def save(self, path: Path) -> None:
        """Write a safetensors file: `pictures`, `labels`, `region/{name}`, and class names in its metadata."""
        tensors = {f"region/{name}": masks for name, masks in self.regions.items()}
        tensors["pictures"] = torch.stack([torch.tensor(picture) for picture in self.pictures])
        if self.labels is not None:
            tensors["labels"] = self.labels
        names = None if self.class_names is None else [str(name) for name in self.class_names]
        write_tensors(path, tensors, {"class_names": json.dumps(names)})

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        tensors, metadata = read_tensors(path)
        names = json.loads(metadata["class_names"])
        regions = {name.removeprefix("region/"): mask for name, mask in tensors.items() if name.startswith("region/")}
        return cls(tensors.get("labels"), list(tensors["pictures"].numpy()), names, regions)

    def scalars(self, history: History) -> dict[str, float]:
        """Scalars of the latest snapshot."""
        return scalars(history, self.labels, self.regions)

    def figures(self, history: History) -> Iterator[tuple[str, Picture]]:
        """Tag and picture of each figure of the latest snapshot: filmstrips, overlays and differences."""
        now, baseline = history.now, history.baseline
        columns = history.columns(_FILMSTRIP_MAPS)
        rows = range(len(self.pictures))
        captions = [[self._caption(snapshot, row, "\n") for row in rows] for snapshot in columns]
        titles = [title(int(now.target[row]), self._label(row), self.class_names, "\n") for row in rows]
        for method, maps in now.maps.items():
            limit = colour_limit(baseline.maps[method])
            shown = slice(len(self.pictures))
            drift = [spearman(c.maps[method][shown], baseline.maps[method][shown]).tolist() for c in columns]
            steps, each = [column.step for column in columns], [column.maps[method] for column in columns]
            levels = scale(baseline, method, "spearman") or (math.nan, math.nan)
            strip = filmstrip(
                self.pictures, titles, steps, each, captions, drift, method, limit, *levels, list(self.regions.values())
            )
            yield f"explain_filmstrip/{method}", strip
            for index, picture in enumerate(self.pictures):
                text = f"step {now.step} · {self._caption(now, index)}"
                yield f"explain_overlay/{method}/{index}", with_strip(overlay(picture, maps[index], limit), text)
                if now is not baseline:
                    change = difference(picture, maps[index], baseline.maps[method][index], limit)
                    yield f"explain_diff/{method}/{index}", with_strip(change, text)

    def animations(self, history: History) -> Iterator[tuple[str, bytes]]:
        """Tag and GIF file of each shown image: its overlays over the run."""
        for method, maps in history.baseline.maps.items():
            limit = colour_limit(maps)
            for index, picture in enumerate(self.pictures):
                frames = [
                    with_strip(
                        overlay(picture, snapshot.maps[method][index], limit),
                        f"step {snapshot.step} · {self._caption(snapshot, index)}",
                    )
                    for snapshot in history.snapshots
                ]
                yield f"explain_gif/{method}/{index}", animation(frames)

    def _caption(self, snapshot: Snapshot, row: int, separator: str = " · ") -> str:
        probabilities = snapshot.logits[row].double().softmax(dim=0)
        prediction, target = int(snapshot.prediction[row]), int(snapshot.target[row])
        return caption(prediction, target, self._label(row), probabilities, self.class_names, separator)

    def _label(self, row: int) -> int | None:
        return None if self.labels is None else int(self.labels[row])
