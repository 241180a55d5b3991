"""Inspection of a model or a training run: summaries, graphs, layouts on a mesh, profiles, FLOPs.

Nothing here changes the model or the run. `sw.summary` and `sw.graph` are this room's `summary` and `graph`. The rooms
that this one imports (core, parallel, data, train) do not import it.
"""

from sapwood.inspection.graphs.graph import Graph, graph
from sapwood.inspection.layouts.activations import Activation, activations
from sapwood.inspection.layouts.table import Layout, show
from sapwood.inspection.layouts.training import layout
from sapwood.inspection.profiles.measure import Profile, profile
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
