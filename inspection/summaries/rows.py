"""The rows of a summary, and the texts of their cells in a table."""

from dataclasses import dataclass

HEADINGS = ("path", "layer", "output", "parameters", "bytes", "FLOPs")


@dataclass(frozen=True)
class Row:
    """One path of a model. Numbers are totals of everything at and below the path, over all copies and calls.

    Attributes:
        path: names joined by "/".
        layer: the layer with its arguments and the number of copies that a scan or `L.Vmap` makes of it. Empty for a
            scope; "parameter" or "state" for a variable that belongs to no layer.
        output: dtypes and shapes of the layer's output, or of the variable.
        copies: how many copies a stack of layers makes; 1 outside stacks.
        calls: how often the model calls the layer.
        params: numbers in the parameters.
        state: numbers in the state.
        nbytes: bytes of parameters and state.
        flops: floating-point operations; None if no layer is called at or below the path.
        shared: True if its parameters are used in more than one place.
    """

    path: str
    layer: str
    output: str
    copies: int
    calls: int
    params: int
    state: int
    nbytes: int
    flops: int | None
    shared: bool

    @property
    def label(self) -> str:
        """The layer, with the number of calls if above 1, and "(shared)" if its parameters are used elsewhere too."""
        calls = f", {self.calls} calls" if self.calls > 1 else ""
        return self.layer + calls + (" (shared)" if self.shared else "")

    def cells(self) -> tuple[str, ...]:
        """The texts of the row in the columns `HEADINGS`."""
        return (
            self.path,
            _short(self.label, 60),
            _short(self.output, 40),
            f"{self.params:,}" if self.params else "",
            size(self.nbytes) if self.nbytes else "",
            "" if self.flops is None else f"{self.flops:,}",
        )


def size(n: int) -> str:
    """A number of bytes with a unit, in powers of 1000.

    >>> size(999), size(49_380), size(3_100_000_000)
    ('999 B', '49.4 kB', '3.1 GB')
    """
    amount, units = float(n), ["B", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{n} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
