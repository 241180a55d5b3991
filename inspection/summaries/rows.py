"""The rows of a summary, and how their cells are written."""

from dataclasses import dataclass

HEADINGS = ("path", "layer", "output", "parameters", "bytes", "FLOPs")


@dataclass(frozen=True)
class Row:
    """One place of a model. The numbers are those of everything at and below it, all copies and calls together.

    `layer` says how many copies a scan or `L.Vmap` makes of it. It is empty for a scope, and "parameter" or "state" for
    a variable that belongs to no layer, whose shape stands under `output`. `calls` is how often the model calls the
    layer, `flops` None where no layer is called, `shared` says that its parameters are used in more than one place.
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
        """The layer, how often it is called, and whether its parameters are used elsewhere too."""
        calls = f", {self.calls} calls" if self.calls > 1 else ""
        return self.layer + calls + (" (shared)" if self.shared else "")

    def cells(self) -> tuple[str, ...]:
        """The row as a table shows it."""
        return (
            self.path,
            _short(self.label, 60),
            _short(self.output, 40),
            f"{self.params:,}" if self.params else "",
            size(self.nbytes) if self.nbytes else "",
            "" if self.flops is None else f"{self.flops:,}",
        )


def size(n: int) -> str:
    """Bytes as a person reads them, in powers of 1000.

    >>> size(999), size(49_380), size(3_100_000_000)
    ('999 B', '49.4 kB', '3.1 GB')
    """
    amount, units = float(n), ["B", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{n} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
