"""`next_token`: the objective of a language model, which never holds the logits of all positions.

The loss and the accuracy are computed in chunks by `losses.linear_head`. So the model must expose its features and its
head separately. `NextToken.predict` does make all logits.
"""

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
from sapwood.parallel.place_activations import activation_sharding
from sapwood.train.objectives.supervised import check_names, counted_rows


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The objective that `next_token` makes.

    Attributes:
        model: the model, with methods ``features`` and ``head``.
        inputs: names of the entries that the model takes: one, the tokens.
        target: name of the entry with the target tokens.
        segments: name of the entry with the segments of packed sequences, or None.
    """

    takes_mask = True

    model: Any
    inputs: tuple[str, ...]
    target: str
    segments: str | None = None

    def predict(self, v: Any, batch: Mapping[str, Any]) -> Any:
        """Return the model's logits for all positions, (batch, length, vocabulary)."""
        return self.model(v, *(batch[name] for name in self.inputs), **self._packed(batch))

    def __call__(self, v: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        target, weight = wide(batch[self.target]), losses.example_weight(batch)
        each = None if weight is None else jnp.broadcast_to(lead(weight, target.shape), target.shape)
        there = self._packed(batch)
        if self.segments is not None:
            each = there["mask"] if each is None else jnp.where(there["mask"], each, jnp.zeros_like(each, shape=()))
        if each is not None and _takes(self.model, "mask"):  # rows without loss take no part in mixtures
            model = self.model if self.segments is None else None  # with segments the mask is (batch, length)
            there["mask"] = counted_rows(model, each, target.shape) & there.get("mask", True)
        x = self.model.features(v, *(batch[name] for name in self.inputs), **there)
        kernel, bias = self.model.head(v)
        known = (target >= 0) & (target < kernel.shape[1])
        counted = known if each is None else known | ~each.astype(bool)
        v.check(counted, f"target outside the {kernel.shape[1]} tokens 0 to {kernel.shape[1] - 1}")
        logits = jax.ShapeDtypeStruct((*target.shape, kernel.shape[1]), jnp.float32)
        sharding = activation_sharding(v, logits, "batch", "length", "vocab")
        out = linear_cross_entropy(x, kernel, target, bias, each, sharding=sharding)
        if each is None:
            return out.total / target.size, {"accuracy": Mean.of(out.hits)}
        mean = Mean(out.total, jnp.sum(each, dtype=jnp.float32))
        loss = mean.total / jnp.where(mean.weight == 0, 1, mean.weight)
        return loss, {"loss": mean, "accuracy": Mean.of(out.hits, each)}

    def _packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments ``segments`` and ``mask`` for packed sequences; none without segments."""
        if self.segments is None:
            return {}
        segments = jnp.asarray(batch[self.segments])
        return {"segments": segments, "mask": segments != 0}


def _takes(model: Any, name: str) -> bool:
    """Return True if the model's ``features`` has an argument of this name."""
    return name in inspect.signature(model.features).parameters


def next_token(model: Any, inputs: str = "tokens", target: str = "targets", segments: str | None = None) -> NextToken:
    """Make the objective of predicting ``batch[target]`` at each position of ``batch[inputs]``.

    It is `supervised(model, inputs=..., target=...)`, but loss and accuracy are computed chunk by chunk
    (`losses.linear_head`), for vocabularies whose logits do not fit into memory. The entries "mask" and "weight" of a
    batch count as in `supervised`.

    A mask of the loss hides no token from the model, since a prompt must be read. But if the model takes a ``mask``
    (batch, length), it is told the rows of which nothing counts, so that they do not steer its mixtures of experts.

    Args:
        model: a model in two halves, such as `models.Decoder`: ``features(v, tokens)`` gives (batch, length, width),
            and ``head(v)`` gives a kernel (width, vocabulary) and a bias or None.
        inputs: name of the entry with the tokens, (batch, length).
        target: name of the entry with the tokens to predict, (batch, length).
        segments: name of an entry (batch, length) for sequences packed into one: integers that tell the sequences
            apart, with 0 for padding, as packers write them. Padding does not count. The model is called with
            ``segments=`` and ``mask=``. None is for sequences that are not packed.

    Raises:
        ConfigError: the model lacks one of the halves, or takes no ``segments`` and ``mask`` where ``segments`` is
            given; or an input or the target is called "mask" or "weight".

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
