"""What a snapshot says: the scalars and pictures of a run's history, by TensorBoard tag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vit_explain_callback.drift import METRICS, map_statistics
from vit_explain_callback.filmstrip import filmstrip
from vit_explain_callback.overlay import Picture, colour_limit, difference, overlay, resized, unnormalise, with_strip
from vit_explain_callback.probe import ProbeBatch
from vit_explain_callback.snapshot import History, Snapshot

_SIDE = 224
_FILMSTRIP_MAPS = 9


@dataclass(frozen=True)
class Report:
    """Turns the history of a run into scalars and pictures.

    Attributes:
        probe: The probe batch.
        pictures: The images that are shown, the first of the probe batch, all of one size.
        class_names: Name of each class, or None to show indices.
    """

    probe: ProbeBatch
    pictures: list[Picture]
    class_names: Sequence[str] | None = None

    @classmethod
    def of(
        cls,
        probe: ProbeBatch,
        num_shown: int,
        normalised: tuple[Sequence[float], Sequence[float]] | None,
        class_names: Sequence[str] | None,
    ) -> Report:
        """Undo the normalisation (mean, std) of the images that are shown, with a longer side of 224 pixels.

        Without a normalisation, the range of the images is stretched to that of a picture.
        """
        if normalised is None:
            low, high = probe.images.amin().item(), probe.images.amax().item()
            channels = probe.images.shape[1]
            scale = 1 / max(high - low, 1e-6)
            normalised = [-low * scale] * channels, [scale] * channels
        height, width = probe.images.shape[2:]
        size = [round(side * _SIDE / max(height, width)) for side in (height, width)]
        pictures = [resized(unnormalise(image, *normalised), *size) for image in probe.images[:num_shown]]
        return cls(probe, pictures, class_names)

    def scalars(self, history: History) -> dict[str, float]:
        """Scalars of the latest snapshot, averaged over the probe batch; degenerate maps are left out of averages.

        An average over nothing is NaN. The baseline is compared with itself.
        """
        now, baseline = history.snapshots[-1], history.baseline
        previous = history.snapshots[-2] if len(history.snapshots) > 1 else now
        values = {
            "probe/target_probability": _mean(now.target_probability),
            "probe/changed_predictions": _mean((now.prediction != baseline.prediction).double()),
        }
        if self.probe.labels is not None:
            values["probe/accuracy"] = _mean((now.prediction == self.probe.labels).double())
        for method, maps in now.maps.items():
            values |= {f"map_stats/{method}/{stat}": _mean(v) for stat, v in map_statistics(maps).items()}
            for name, reference in (("baseline", baseline), ("previous", previous)):
                for metric, measure in METRICS.items():
                    values[f"drift_{name}/{method}/{metric}"] = _mean(measure(maps, reference.maps[method]))
        return values

    def figures(self, history: History) -> Iterator[tuple[str, Picture]]:
        """Tag and picture of each figure of the latest snapshot: filmstrips, overlays and differences."""
        now, baseline = history.snapshots[-1], history.baseline
        columns = history.columns(_FILMSTRIP_MAPS)
        captions = [[self._caption(snapshot, row) for row in range(len(self.pictures))] for snapshot in columns]
        titles = [f"target {self._class_name(target)}" for target in now.target[: len(self.pictures)].tolist()]
        for method, maps in now.maps.items():
            limit = colour_limit(baseline.maps[method])
            strip = filmstrip(self.pictures, titles, columns, captions, method, limit)
            yield f"explain_filmstrip/{method}", strip
            for index, picture in enumerate(self.pictures):
                text = f"step {now.step} · {self._caption(now, index)}"
                yield f"explain_overlay/{method}/{index}", with_strip(overlay(picture, maps[index], limit), text)
                if now is not baseline:
                    change = difference(picture, maps[index], baseline.maps[method][index], limit)
                    yield f"explain_diff/{method}/{index}", with_strip(change, text)

    def _caption(self, snapshot: Snapshot, row: int) -> str:
        prediction = self._class_name(int(snapshot.prediction[row]))
        return f"{prediction} · p={snapshot.target_probability[row].item():.2f}"

    def _class_name(self, index: int) -> str:
        known = self.class_names is not None and index < len(self.class_names)
        return str(self.class_names[index]) if known and self.class_names else f"class {index}"


def _mean(values: Tensor) -> float:
    return torch.nanmean(values).item()
