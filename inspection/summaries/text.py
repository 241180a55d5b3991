"""A `Summary` as a table: plain text, or a rich table for the terminal."""

from typing import TYPE_CHECKING, Any

from sapwood.inspection.summaries.rows import HEADINGS

if TYPE_CHECKING:
    from sapwood.inspection.summaries.summary import Summary

_NUMBERS = 3  # columns from this index on are numbers, aligned to the right


def title(summary: "Summary") -> str:
    """The first line of the table: the model as a function of shapes."""
    return f"{summary.model}({summary.inputs}) -> {summary.output}"


def text(summary: "Summary") -> str:
    """The table in plain text."""
    body = [row.cells() for row in summary.rows]
    widths = [max(len(cells[k]) for cells in [HEADINGS, *body]) for k in range(len(HEADINGS))]
    rule = "  ".join("-" * width for width in widths)
    lines = [_line(cells, widths) for cells in [HEADINGS, *body]]
    return "\n".join([title(summary), lines[0], rule, *lines[1:], rule, summary.totals])


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.rjust(width) if k >= _NUMBERS else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def rich_table(summary: "Summary") -> Any:
    """The table as a rich renderable."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title(summary), style="bold"), caption=Text(summary.totals), box=box.SIMPLE_HEAD,
        title_justify="left", caption_justify="left", pad_edge=False,
    )  # fmt: skip
    styles = ("", "cyan", "green", "", "dim", "")
    for k, heading in enumerate(HEADINGS):
        table.add_column(
            heading, style=styles[k], justify="right" if k >= _NUMBERS else "left", no_wrap=k != 1, overflow="fold"
        )
    for row in summary.rows:
        path, *cells = row.cells()
        above, slash, name = path.rpartition("/")
        table.add_row(Text.assemble((above + slash, "dim"), (name, "bold" if row.layer else "")), *map(Text, cells))
    return table
