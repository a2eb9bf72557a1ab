"""Pictures of what an encoder sees, and of what it is shown."""

from dinoct.data.views import middle_window
from dinoct.viz.maps import patch_norms
from dinoct.viz.monitor import PICTURES, draw_monitor
from dinoct.viz.slices import sample_slices, whole_slice
from dinoct.viz.views import draw_views, first_views, views_title

__all__ = [
    "PICTURES",
    "draw_monitor",
    "draw_views",
    "first_views",
    "middle_window",
    "patch_norms",
    "sample_slices",
    "views_title",
    "whole_slice",
]
