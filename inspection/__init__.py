"""What looks at a model or a run and changes nothing: summaries, drawings, layouts on a mesh, profiles, FLOPs.

`sw.summary` and `sw.graph` are the same as here. Nothing below imports this room.
"""

from sapwood.inspection.graphs.graph import Graph, graph
from sapwood.inspection.layouts.activations import Activation, activations
from sapwood.inspection.layouts.table import Layout, show
from sapwood.inspection.layouts.training import layout
from sapwood.inspection.profiles.profile import Profile, profile
from sapwood.inspection.summaries.summary import Summary, summary

__all__ = [
    "Activation",
    "Graph",
    "Layout",
    "Profile",
    "Summary",
    "activations",
    "graph",
    "layout",
    "profile",
    "show",
    "summary",
]
