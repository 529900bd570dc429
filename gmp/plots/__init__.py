"""Pictures, drawn with matplotlib without touching its global state: functions from data to a Figure, a file a family.

matplotlib is imported when the first picture is drawn, so that nothing else waits for it.
"""

from __future__ import annotations

from .drift import plot_drift_lines, plot_drift_map
from .figure import COLOURS, new_figure, pixels, png, save, svg
from .geometry import plot_distributions, plot_layers
from .plane import plot_pairs, plot_prompts
from .runs import plot_losses, plot_measures, plot_nearest, smooth
from .similarity import plot_neighbours, plot_similarity

__all__ = (
    "COLOURS", "new_figure", "pixels", "plot_distributions", "plot_drift_lines", "plot_drift_map", "plot_layers",
    "plot_losses", "plot_measures", "plot_nearest", "plot_neighbours", "plot_pairs", "plot_prompts", "plot_similarity",
    "png", "save", "smooth", "svg",
)  # fmt: skip
