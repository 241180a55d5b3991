"""`Collector` gathers the effects of one run (`put`, `loss`, `sow`, `check`); `Updates` returns them.

The collector keys everything by absolute path. `Updates` holds nested dicts relative to the cursor that was run. A
check of known values raises at once and is not collected.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import CheckError, DeclarationError
from sapwood.core.paths import Path, join, nest
from sapwood.core.short_repr import in_brief
from sapwood.core.traces import is_traced


class Updates(NamedTuple):
    """The effects of a run, returned beside its result: nested dicts relative to the cursor that was run.

    ``state`` holds the next values of state entries, ``losses`` the auxiliary losses (scalars), ``captured`` the sown
    values, and ``checks`` one boolean array for each message, True if no check of that message failed.
    """

    state: dict
    losses: dict
    captured: dict
    checks: dict

    __repr__ = in_brief


def raise_if_failed(path: Path, message: str, ok: Any) -> None:
    """Raise a `CheckError` that names the first False entry of ``ok``, a boolean array that is not traced."""
    bad = np.argwhere(~np.asarray(ok))
    if len(bad):
        where = f" at entry {', '.join(map(str, bad[0]))}" if np.ndim(ok) else ""
        more = f" ({len(bad)} entries in all)" if len(bad) > 1 else ""
        error = CheckError(f"{join(path)}: {message}{where}{more}")
        error.entry = (int(bad[0][0]), len(ok)) if np.ndim(ok) else None
        raise error


class Collector:
    """The effects of one run of `pure`. Cursors hold it weakly; only the run itself keeps it alive.

    `root` is the path of the cursor that was run, and `trace` a mark of the trace in which effects are accepted.
    """

    __slots__ = (
        "__weakref__", "captured", "checks", "declared", "fresh", "init_key", "losses", "root", "state", "trace",
    )  # fmt: skip

    def __init__(self, root: Path, trace: Any, init_key: jax.Array | None = None):
        self.root = root
        self.trace = trace
        self.init_key = init_key  # set in a data-dependent `init`: variables that are not bound are made on first use
        self.fresh: dict[tuple[str, Path], Any] = {}
        self.declared: dict[Path, tuple[tuple[int, ...], Any]] = {}
        self.state: dict[Path, Any] = {}
        self.losses: dict[Path, Any] = {}
        self.captured: dict[Path, list] = {}
        self.checks: dict[Path, Any] = {}

    def loss(self, path: Path, x: Any) -> None:
        """Add the sum of ``x``, in float32, to the loss at ``path``."""
        x = jnp.sum(jnp.asarray(x, jnp.float32))
        self.losses[path] = self.losses[path] + x if path in self.losses else x

    def sow(self, path: Path, x: Any) -> None:
        """Keep a value. Several values at one path are returned as a tuple."""
        self.captured.setdefault(path, []).append(x)

    def check(self, path: Path, message: str, ok: Any) -> None:
        """Keep one bit for each message if ``ok`` is traced; raise at once if it is known and False."""
        if not is_traced(ok):
            return raise_if_failed(path, message, ok)
        key = (*path, message)
        ok = jnp.all(ok)
        self.checks[key] = self.checks[key] & ok if key in self.checks else ok

    def updates(self) -> Updates:
        """Everything collected, relative to the root of the run."""
        captured = {path: tuple(found) if len(found) > 1 else found[0] for path, found in self.captured.items()}
        return Updates(
            self._relative(self.state, "a state entry"),
            self._relative(self.losses, "a loss"),
            self._relative(captured, "a captured value"),
            self._relative(self.checks, "a check"),
        )

    def _relative(self, flat: dict[Path, Any], what: str) -> dict:
        for path in flat:
            for k in range(len(self.root) + 1, len(path)):
                if path[:k] in flat:
                    raise DeclarationError(
                        f"{join(path[:k])} is {what} and a scope that holds {join(path)}; give one of the two "
                        "another name"
                    )
        return nest((path[len(self.root) :], value) for path, value in flat.items())
