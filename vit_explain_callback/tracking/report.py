"""What a snapshot says: the scalars and pictures of a run's history, by TensorBoard tag."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit_explain_callback._files import read_tensors, write_tensors
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.tracking.probe import ProbeBatch
from vit_explain_callback.tracking.scalars import scalars
from vit_explain_callback.tracking.snapshot import History, Snapshot
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
    with_strip,
)

_SIDE = 224
_FILMSTRIP_MAPS = 9


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
        captions = [[self._caption(snapshot, row) for row in range(len(self.pictures))] for snapshot in columns]
        titles = [f"target {self._class_name(target)}" for target in now.target[: len(self.pictures)].tolist()]
        for method, maps in now.maps.items():
            limit = colour_limit(baseline.maps[method])
            shown = slice(len(self.pictures))
            drift = [spearman(c.maps[method][shown], baseline.maps[method][shown]).tolist() for c in columns]
            strip = filmstrip(self.pictures, titles, columns, captions, drift, method, limit)
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

    def _caption(self, snapshot: Snapshot, row: int) -> str:
        prediction = self._class_name(int(snapshot.prediction[row]))
        return f"{prediction} · p={snapshot.target_probability[row].item():.2f}"

    def _class_name(self, index: int) -> str:
        known = self.class_names is not None and index < len(self.class_names)
        return str(self.class_names[index]) if known and self.class_names else f"class {index}"
