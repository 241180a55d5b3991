"""A `Summary` as a tree that opens and closes in a notebook: by treescope if it is installed, else in plain HTML."""

from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from sapwood.inspection.summaries.rows import Row, size
from sapwood.inspection.summaries.text import title

if TYPE_CHECKING:
    from sapwood.inspection.summaries.summary import Summary

_STYLE = (
    "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px;line-height:1.55;text-align:left"
)
_OPEN = 12  # a tree with at most this many rows is shown fully open


class _Node(NamedTuple):
    """A row with the nodes of the rows below it."""

    row: Row
    children: list


def _nodes(summary: "Summary") -> list[_Node]:
    roots: list[_Node] = []
    above: list[_Node] = []
    for row in summary.rows:
        while above and not row.path.startswith(above[-1].row.path + "/"):
            above.pop()
        node = _Node(row, [])
        (above[-1].children if above else roots).append(node)
        above.append(node)
    return roots


def _name(node: _Node, above: str) -> str:
    return node.row.path.removeprefix(above + "/") if above else node.row.path


def _facts(row: Row) -> str:
    parts = [row.output] if row.output else []
    held = [f"{n:,} {what}" for n, what in ((row.params, "parameters"), (row.state, "of state")) if n]
    if held:
        parts.append(f"{', '.join(held)} ({size(row.nbytes)})")
    if row.flops:
        parts.append(f"{row.flops:,} FLOPs")
    return " · ".join(parts)


def html(summary: "Summary") -> str:
    """The tree as HTML, for a notebook."""
    try:
        import treescope
    except ImportError:
        return plain_html(summary)
    return treescope.render_to_html(Tree(summary))


def plain_html(summary: "Summary") -> str:
    """The tree as nested `<details>` elements; it needs no treescope."""
    nodes = _nodes(summary)
    is_open = len(summary.rows) <= _OPEN
    body = "".join(_plain_node(node, "", is_open) for node in nodes)
    return (
        f'<div class="sapwood-summary" style="{_STYLE}"><strong>{escape(title(summary))}</strong>{body}'
        f"<div>{escape(summary.totals)}</div></div>"
    )


def _plain_node(node: _Node, above: str, is_open: bool) -> str:
    row = node.row
    line = (
        f"<b>{escape(_name(node, above))}</b> {escape(row.label)} "
        f'<span style="opacity:.65">{escape(_facts(row))}</span>'
    )
    if not node.children:
        return f'<div style="margin-left:2.1em">{line}</div>'
    below = "".join(_plain_node(child, row.path, is_open) for child in node.children)
    mark = " open" if is_open else ""
    return f'<details style="margin-left:1em"{mark}><summary style="cursor:pointer">{line}</summary>{below}</details>'


class Tree(NamedTuple):
    """A summary for treescope to render.

    It is a class of its own, since treescope would also ask a `Summary` for its `_repr_html_`, which calls treescope.
    """

    summary: "Summary"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import rendering_parts as parts

        rows = len(self.summary.rows)
        state = parts.ExpandState.EXPANDED if rows <= _OPEN else parts.ExpandState.WEAKLY_COLLAPSED
        children = [_treescope_node(node, "", state) for node in _nodes(self.summary)]
        children.append(parts.build_full_line_with_annotations(parts.comment_color(parts.text(self.summary.totals))))
        return parts.build_custom_foldable_tree_node(
            label=parts.text(title(self.summary)),
            contents=parts.fold_condition(expanded=parts.indented_children(children)),
            path=path,
            expand_state=parts.ExpandState.EXPANDED,
        )


def _treescope_node(node: _Node, above: str, state: Any) -> Any:
    from treescope import rendering_parts as parts

    row = node.row
    line = parts.siblings(
        parts.custom_style(parts.text(_name(node, above)), css_style="font-weight: bold"),
        parts.text(f" {row.label} " if row.label else " "),
        parts.comment_color(parts.text(_facts(row))),
    )
    if not node.children:
        return parts.build_full_line_with_annotations(line)
    children = [_treescope_node(child, row.path, state) for child in node.children]
    return parts.build_custom_foldable_tree_node(
        label=line,
        contents=parts.fold_condition(expanded=parts.indented_children(children)),
        expand_state=state,
    )
