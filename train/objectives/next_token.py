"""`next_token`: the objective of a language model, which never holds the logits of all positions."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sapwood import losses
from sapwood.core.errors import ConfigError
from sapwood.losses.linear_head import linear_cross_entropy
from sapwood.metrics import Mean, lead, wide
from sapwood.parallel.place_activations import placed
from sapwood.train.objectives.supervised import check_names, counted_rows


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The objective `next_token` makes."""

    takes_mask = True

    model: Any
    inputs: tuple[str, ...]
    target: str
    segments: str | None = None

    def predict(self, v: Any, batch: Mapping[str, Any]) -> Any:
        """The model's logits (batch, length, vocabulary), whole."""
        return self.model(v, *(batch[name] for name in self.inputs), **self._packed(batch))

    def __call__(self, v: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        target, weight = wide(batch[self.target]), losses.example_weight(batch)
        each = None if weight is None else jnp.broadcast_to(lead(weight, target.shape), target.shape)
        there = self._packed(batch)
        if self.segments is not None:
            each = there["mask"] if each is None else jnp.where(there["mask"], each, jnp.zeros_like(each, shape=()))
        if each is not None and _takes(self.model, "mask"):  # a row out of the loss has no part in a mixture either
            model = self.model if self.segments is None else None  # padding is a mask (batch, length) anyway
            there["mask"] = counted_rows(model, each, target.shape) & there.get("mask", True)
        x = self.model.features(v, *(batch[name] for name in self.inputs), **there)
        kernel, bias = self.model.head(v)
        known = (target >= 0) & (target < kernel.shape[1])
        counted = known if each is None else known | ~each.astype(bool)
        v.check(counted, f"target outside the {kernel.shape[1]} tokens 0 to {kernel.shape[1] - 1}")
        logits = jax.ShapeDtypeStruct((*target.shape, kernel.shape[1]), jnp.float32)
        sharding = placed(v, logits, "batch", "length", "vocab")
        out = linear_cross_entropy(x, kernel, target, bias, each, sharding=sharding)
        if each is None:
            return out.total / target.size, {"accuracy": Mean.of(out.hits)}
        mean = Mean(out.total, jnp.sum(each, dtype=jnp.float32))
        loss = mean.total / jnp.where(mean.weight == 0, 1, mean.weight)
        return loss, {"loss": mean, "accuracy": Mean.of(out.hits, each)}

    def _packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.segments is None:
            return {}
        segments = jnp.asarray(batch[self.segments])
        return {"segments": segments, "mask": segments != 0}


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.features).parameters


def next_token(model: Any, inputs: str = "tokens", target: str = "targets", segments: str | None = None) -> NextToken:
    """The objective of predicting ``batch[target]`` (batch, length) at each position of ``batch[inputs]``.

    It is `supervised(model, inputs=..., target=...)` with the loss and the accuracy taken chunk by chunk
    (`train.linear_losses`), for vocabularies whose logits do not fit. The model gives its two halves:
    ``features(v, tokens)`` (batch, length, width) and ``head(v)``, a kernel (width, vocabulary) and a bias or None, as
    `models.Decoder` does. Masks and weights enter as in `supervised`. Raises `ConfigError` for another model, and for
    an input or target called "mask" or "weight".

    ``segments`` names an entry (batch, length) for sequences packed into one: integers that say which is whose, 0 for
    padding, as packers write it. Padding does not count, and the model gets ``segments=`` and ``mask=``. A mask of the
    loss hides no token from the model, as a prompt must be read; but rows of which nothing counts are told to a model
    that takes a ``mask`` (batch, length), so that they do not steer its mixtures of experts.

    >>> import sapwood as sw
    >>> from sapwood.models import Decoder
    >>> objective = next_token(Decoder(vocabulary=10, depth=1, width=8, heads=2))
    >>> batch = {"tokens": jnp.zeros((2, 4), int), "targets": jnp.ones((2, 4), int)}
    >>> params, state = sw.init(objective, 0, batch)
    >>> loss, metrics = jax.jit(objective)(sw.bind(params, state), batch)
    >>> loss.shape, list(metrics)
    ((), ['accuracy'])
    """
    if not (callable(getattr(model, "features", None)) and callable(getattr(model, "head", None))):
        raise ConfigError(
            f"next_token(model=...): a model with features(v, tokens) and head(v), such as models.Decoder, is "
            f"expected, got {type(model).__name__}"
        )
    if segments is not None and not (_takes(model, "segments") and _takes(model, "mask")):
        raise ConfigError(
            f"next_token(segments={segments!r}): {type(model).__name__}.features(v, tokens) takes no segments= and "
            "mask=, which say what belongs together and what is padding"
        )
    check_names("next_token", (inputs, *([segments] if segments else [])), target)
    return NextToken(model, (inputs,), target, segments)
