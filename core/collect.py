"""The effects of one run: what `put`, `loss`, `sow` and `check` said, gathered to be handed back."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sapwood.core.errors import CheckError
from sapwood.core.paths import Path, join, nest


class Updates(NamedTuple):
    """What a run hands back beside its result: nested dicts relative to the cursor that was run.

    ``state`` holds the next values of state entries, ``losses`` scalars, ``captured`` what was sown, and ``checks``
    for each message one boolean array, true where all is well.
    """

    state: dict
    losses: dict
    captured: dict
    checks: dict


def current_trace() -> Any:
    """An opaque mark of the JAX trace we are in; equal only within one trace."""
    from jax.extend.core import get_opaque_trace_state  # loads Pallas: a quarter of what `import sapwood` would cost

    return get_opaque_trace_state(convention="sapwood")


def is_traced(x: Any) -> bool:
    """Whether the value is not known yet."""
    return isinstance(x, jax.core.Tracer)


def raise_if_failed(path: Path, message: str, ok: Any) -> None:
    """Raise a `CheckError` naming the first entry of a concrete ``ok`` that is false."""
    bad = np.argwhere(~np.asarray(ok))
    if len(bad):
        where = f" at entry {', '.join(map(str, bad[0]))}" if np.ndim(ok) else ""
        more = f" ({len(bad)} entries in all)" if len(bad) > 1 else ""
        raise CheckError(f"{join(path)}: {message}{where}{more}")


class Collector:
    """The effects of one run of `pure`. Cursors hold it weakly; only the run itself keeps it alive."""

    __slots__ = (
        "__weakref__", "captured", "checks", "declared", "fresh", "init_key", "losses", "root", "state", "trace",
    )  # fmt: skip

    def __init__(self, root: Path, trace: Any, init_key: jax.Array | None = None):
        self.root = root
        self.trace = trace
        self.init_key = init_key  # set in data-dependent initialisation: what is missing is made on the spot
        self.fresh: dict[tuple[str, Path], Any] = {}
        self.declared: dict[Path, tuple[tuple[int, ...], Any]] = {}
        self.state: dict[Path, Any] = {}
        self.losses: dict[Path, Any] = {}
        self.captured: dict[Path, Any] = {}
        self.checks: dict[Path, Any] = {}

    def loss(self, path: Path, x: Any) -> None:
        """Add to the loss of that name; a stack of losses counts with its sum."""
        x = jnp.sum(jnp.asarray(x, jnp.float32))
        self.losses[path] = self.losses[path] + x if path in self.losses else x

    def sow(self, path: Path, x: Any) -> None:
        """Keep a value; a second one of the same name makes a tuple."""
        if path in self.captured:
            old = self.captured[path]
            x = (*old, x) if isinstance(old, tuple) else (old, x)
        self.captured[path] = x

    def check(self, path: Path, message: str, ok: Any) -> None:
        """Keep one bit where the values are not known yet; raise at once where they are."""
        if not is_traced(ok):
            return raise_if_failed(path, message, ok)
        key = (*path, message)
        ok = jnp.all(ok)
        self.checks[key] = self.checks[key] & ok if key in self.checks else ok

    def updates(self) -> Updates:
        """Everything collected, relative to the root of the run."""
        return Updates(*map(self._relative, (self.state, self.losses, self.captured, self.checks)))

    def _relative(self, flat: dict[Path, Any]) -> dict:
        return nest((path[len(self.root) :], value) for path, value in flat.items())
