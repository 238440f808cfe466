"""Pictures of explanation maps: overlays, filmstrips, figures, the heat map of blocks, animations."""

# Imported at once: some functions have the name of their module, which a later import would put in their place.
from vit_explain_callback.visualization.encode import animation, jpeg, png
from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.heatmap import block_heatmap
from vit_explain_callback.visualization.overlay import (
    Picture,
    colour_limit,
    difference,
    outlined,
    overlay,
    times_uniform,
    unnormalise,
)
from vit_explain_callback.visualization.text import colour_bar

__all__ = [
    "Picture",
    "animation",
    "block_heatmap",
    "colour_bar",
    "colour_limit",
    "difference",
    "filmstrip",
    "jpeg",
    "outlined",
    "overlay",
    "png",
    "times_uniform",
    "unnormalise",
]
