"""Pictures of what a training did: curves, detections, pyramids, and a report of them in HTML."""

from .. import _detectron2  # noqa: F401

# isort: split
from .curves import plot_panels, plot_runs, read_metrics
from .pyramids import PyramidView, view_pyramids

__all__ = [
    "PyramidView",
    "plot_panels",
    "plot_runs",
    "read_metrics",
    "view_pyramids",
]
