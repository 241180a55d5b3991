"""The look of a drawing, shared by its SVG and HTML forms: texts of boxes, colors of layers, and distances.

Lengths are in pixels. Shapes and labels are shortened so that boxes stay small; the tooltip holds the full text.
"""

import re
from html import escape
from typing import TYPE_CHECKING

from sapwood.inspection.graphs.boxes import Group, Node

if TYPE_CHECKING:
    from sapwood.inspection.graphs.graph import Graph

HUES = (205, 150, 265, 28, 340, 180, 95, 45, 300, 12)
"""The hues of layer classes in degrees, in the order in which the classes appear in a drawing."""

LANE = 14  # width of a column that holds only lanes
GAP_X, GAP_Y = 22, 30  # between columns and rows
PAD = 16  # inside a group


def hues(graph: "Graph") -> dict[str, int]:
    """The hue of each layer class in a drawing, and of scopes."""
    sorts = dict.fromkeys(layer_class(node) for node in graph.root.nodes() if node.kind in ("layer", "scope"))
    return {name: HUES[k % len(HUES)] for k, name in enumerate(sorts)}


def layer_class(node: Node) -> str:
    """The class of a node's layer: "Dense" for "3 × Remat of Dense(features=8)"; "scope" for other nodes."""
    return node.label.split(" × ")[-1].split(" of ")[-1].split("(")[0] if node.kind == "layer" else "scope"


def lines(item: Node | Group) -> list[str]:
    """The lines of text under a box's name: the label, then shape and number of parameters."""
    found = [shorten(item.label, 30)] if item.label and item.kind != "op" else []
    facts = [compact(item.shape)] if item.shape and item.kind != "op" else []
    if item.params:
        facts.append(f"{count(item.params)} params")
    return [*found, *([" · ".join(facts)] if facts else [])]


def tooltip(item: Node | Group) -> str:
    """The tooltip of a box: path, label, shape and number of parameters, one a line."""
    facts = [item.path, item.label, item.shape, f"{item.params:,} parameters" if item.params else ""]
    return "\n".join(fact for fact in facts if fact)


def compact(shape: str) -> str:
    """Shapes with short dtypes, cut to 34 characters.

    >>> compact("float32[8,10], bfloat16[2]")
    'f32[8,10], bf16[2]'
    """
    short = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i", "complex": "c"}
    return shorten(re.sub(r"\b(bfloat|float|uint|int|complex)(?=\d)", lambda found: short[found[0]], shape), 34)


def count(n: int) -> str:
    """A number of parameters, rounded, with the units k, M and B.

    >>> count(950), count(49_600), count(7_100_000_000)
    ('950', '49.6k', '7.1B')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}".removesuffix(".0") + unit
    return str(n)


def shorten(text: str, width: int) -> str:
    """A text cut to ``width`` characters; the last one is then an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"


def legend(graph: "Graph") -> str:
    """The title of the page or picture: the model's name and its number of parameters."""
    return escape(f"{graph.model}, {count(graph.root.params)} parameters")
