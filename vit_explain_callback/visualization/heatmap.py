"""The heat map of blocks by steps: which block changed, and when."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from vit_explain_callback.visualization.encode import rendered
from vit_explain_callback.visualization.overlay import Picture

_SIZE, _DPI = (7.0, 5.2), 100  # read at half that size in TensorBoard
_AXES, _BAR = (0.115, 0.14, 0.7, 0.78), (0.85, 0.14, 0.035, 0.78)  # left, bottom, width, height
_LARGE, _SMALL = 17, 15
_TICKS = 5
_UNKNOWN = "#d0d0d0"


def block_heatmap(
    values: ArrayLike,
    steps: Sequence[int],
    blocks: Sequence[int] | None = None,
    title: str = "what each block attends to",
    bar_label: str = "rank correlation with baseline",
) -> Picture:
    """Draw a value of each block at each step, such as the rank correlation of its readout row with the baseline's.

    The scale is always from 0 to 1: pale is unchanged, dark is changed, and grey is not known. The first block is at
    the bottom, as it is in a network that is drawn upwards.

    Args:
        values: (L, T), in [-1, 1] or NaN; what is below 0 is drawn as 0.
        steps: Of the T columns, baseline first.
        blocks: Number of each of the L blocks, counted from 1; None for 1 to L.
        title: Of the picture.
        bar_label: Of the colour bar.

    Returns:
        The picture, (520, 700, 3).

    Raises:
        ValueError: If the values are not one for each block and step.
    """
    table = np.asarray(values, dtype=np.float64)
    blocks = range(1, len(table) + 1) if blocks is None else blocks
    if table.shape != (len(blocks), len(steps)):
        raise ValueError(
            f"Expected `values` of shape ({len(blocks)}, {len(steps)}), for each block and step, but got {table.shape}."
        )
    figure = Figure(figsize=_SIZE, dpi=_DPI)
    # Places of its own, as a layout that fits itself takes half the time of a drawing.
    axes, beside = figure.add_axes(_AXES), figure.add_axes(_BAR)
    colours = matplotlib.colormaps["magma"].with_extremes(bad=_UNKNOWN)
    drawn = axes.imshow(table, aspect="auto", origin="lower", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=_LARGE, loc="left", parse_math=False)
    axes.set_xlabel("step", fontsize=_LARGE)
    axes.set_ylabel("block", fontsize=_LARGE)
    # The first and the last step matter most; of the blocks, an even spacing.
    columns = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(len(steps), _TICKS)).tolist()})
    rows = range(0, len(blocks), -(-len(blocks) // (_TICKS + 1)))
    axes.set_xticks(columns, [str(steps[column]) for column in columns], fontsize=_SMALL)
    axes.set_yticks(rows, [str(blocks[row]) for row in rows], fontsize=_SMALL)
    bar = figure.colorbar(drawn, cax=beside, ticks=[0, 0.5, 1])
    bar.ax.tick_params(labelsize=_SMALL)
    bar.set_label(bar_label, fontsize=_SMALL)
    return rendered(figure)
