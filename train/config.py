"""`Config`: the configuration of training, checked and resolved once. Step, plan, evaluation and loop take a `Config`.

`Trainer` is a `Config` with methods. No file below `train/trainer.py` imports the trainer at run time. So this file
holds everything that they need of it: the fields, and what follows from them (placement, batch sharding, platform).
`Code` detects edits of the code that a config names.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sapwood import parallel
from sapwood.core.errors import ConfigError
from sapwood.core.fingerprint import fingerprint, separate_traces
from sapwood.core.layer import Layer
from sapwood.core.policy import Policy, as_policy
from sapwood.core.target_platform import compiling_for
from sapwood.parallel.per_device import platform
from sapwood.runtime import compile_options
from sapwood.train.state import offload, trainable
from sapwood.train.step.loss_scale import LossScale

_SEVERAL = (
    '; several are one by optax.multi_transform({"encoder": optax.adam(1e-3), "rest": optax.sgd(0.1)}, labels), where '
    'labels={"encoder": "encoder", "head": "rest"} says which part of the parameters is whose'
)

_MODELS = ("sapwood.layers.", "sapwood.models.")


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of training. It holds no arrays. `Trainer` explains the fields.

    After construction `policy` is a `Policy`, `mesh` is a mesh or None, and a list of patterns in `trainable` is a
    tuple. A float16 policy has a `scaling`.
    """

    objective: Callable[..., Any]
    optimizer: Any
    mesh: Any = None
    rules: Any = None
    policy: Any = None
    trainable: Any = None
    ema: float | None = None
    accumulate: int = 1
    clip: float | None = None
    learning_rate: Any = None
    scaling: LossScale | None = None
    offload: str | None = None
    jit: bool = True
    checks: bool = True
    compiler_options: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    _code = None  # the `Code` of this config; not a field, because it is no part of the configuration

    def __post_init__(self) -> None:
        policy: Policy = as_policy(self.policy)
        object.__setattr__(self, "policy", policy)
        if policy.compute == "float16" and self.scaling is None:
            object.__setattr__(self, "scaling", LossScale())
        object.__setattr__(self, "trainable", trainable.as_patterns(self.trainable))
        if not callable(self.objective):
            raise ConfigError(
                f"Trainer(objective=...): a function (v, batch) -> (loss, metrics) is expected, got "
                f"{type(self.objective).__name__}"
            )
        if not (callable(getattr(self.optimizer, "init", None)) and callable(getattr(self.optimizer, "update", None))):
            several = isinstance(self.optimizer, Mapping | list | tuple)
            raise ConfigError(
                f"Trainer(optimizer=...): an optax transformation such as optax.adam(1e-3) is expected, got "
                f"{type(self.optimizer).__name__ if several else repr(self.optimizer)}" + several * _SEVERAL
            )
        if isinstance(self.objective, Layer) and type(self.objective).__module__.startswith(_MODELS):
            raise ConfigError(
                f"Trainer(objective=...): {type(self.objective).__name__} is a model; the objective is made of it by "
                'sw.supervised(model, "squared_error"), or another loss'
            )
        if self.rules is not None and self.mesh is None:
            raise ConfigError(f"Trainer(rules={self.rules!r}) needs mesh=: rules map logical axes onto a mesh's")
        object.__setattr__(self, "compiler_options", compile_options.check(self.compiler_options) or None)
        if isinstance(self.mesh, str):
            object.__setattr__(self, "mesh", parallel.mesh(self.mesh))
        offload.check(self.offload, self.mesh)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"Trainer(ema={self.ema}): a decay between 0 and 1, such as 0.999, is expected")
        if self.accumulate != int(self.accumulate) or self.accumulate < 1:
            raise ConfigError(f"Trainer(accumulate={self.accumulate}): at least 1 micro-batch is expected")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"Trainer(clip={self.clip}): a norm above 0 is expected; None does not clip")

    @functools.cached_property
    def place(self) -> Any:
        """The `Placement` of activations, which cursors use; None without a mesh."""
        return None if self.mesh is None else parallel.placement(self.mesh, self.rules)

    @functools.cached_property
    def batch_sharding(self) -> Any:
        """The sharding of a batch; None without a mesh."""
        return None if self.mesh is None else parallel.batch_sharding(self.mesh, self.rules)

    @property
    def platform(self) -> str:
        """The platform that programs are compiled for, that of the mesh. This machine need not have its devices."""
        return platform(self.mesh)

    def put(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Put a batch of host arrays on the devices, under `batch_sharding`."""
        if self.mesh is None:
            return jax.device_put(dict(batch))
        return parallel.put_batch(dict(batch), self.batch_sharding)

    def check_batch_size(self, size: int) -> int:
        """Return the size. Raises `ConfigError` if it does not divide into micro-batches or over the mesh."""
        if size % self.accumulate:
            raise ConfigError(
                f"accumulate={self.accumulate} does not divide the batch of {size}; use a batch size "
                f"that is a multiple of {self.accumulate}"
            )
        if self.mesh is not None:
            try:
                parallel.check_batch_size(size // self.accumulate, self.batch_sharding)
            except ConfigError as error:
                if self.accumulate > 1:
                    error.add_note(f"(a batch of {size} in accumulate={self.accumulate} micro-batches)")
                raise
        return size

    @property
    def code(self) -> "Code":
        """The code that this config names now. After an edit it is a new `Code`."""
        kept = self._code
        if kept is None or kept.edited():
            kept = Code(self, None if kept is None else object())
            object.__setattr__(self, "_code", kept)
        return kept

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """The context in which programs are traced: for this config's platform, and from the code as it is now."""
        return self.code.tracing()


class Code:
    """The code that a config names at one moment: model, loss, optimizer and everything that these name.

    Args:
        config: the config.
        mark: the mark for `traced_anew`, which keeps JAX from reusing traces of earlier code; None reuses them.

    Attributes:
        plans: the plans that `train.state.plan` made, by the shapes of the batch.
    """

    def __init__(self, config: Config, mark: Any = None):
        self.config, self.mark = config, mark
        self._fingerprint, self._lock, self._traces = self._read(), threading.Lock(), 0
        self.plans: dict[Any, Any] = {}

    def _read(self) -> tuple:
        return fingerprint(*(getattr(self.config, field.name) for field in dataclasses.fields(self.config)))

    def edited(self) -> bool:
        """Return True if any of this code was edited since this object was made.

        Changes made by tracing itself, such as a list that a model appends to, do not count as edits.
        """
        with self._lock:
            return not self._traces and self._read() != self._fingerprint

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """The context in which this code is traced. At its end the fingerprint is taken again."""
        with self._lock:
            self._traces += 1
        try:
            with compiling_for(self.config.platform), separate_traces(self.mark):
                yield
        finally:
            with self._lock:
                self._traces -= 1
                if not self._traces:
                    self._fingerprint = self._read()
