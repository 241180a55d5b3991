"""Mixture of experts: each token goes through the few feed-forward networks that a router chooses for it.

Routing is computed for the whole batch (`routing`). On a mesh, the experts then run on each device in a `jax.shard_map`
(`dispatch`, `all_to_all`, `grouped_matmul`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.core.initializers import Initializer, lecun_normal
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.compose import scan_pipeline
from sapwood.layers.experts import routing
from sapwood.layers.experts.dispatch import through_experts, through_spread_experts
from sapwood.layers.experts.grouped_matmul import grouped_matmul
from sapwood.layers.masked_values import broadcast_leading_mask
from sapwood.parallel.per_device import per_device, platform
from sapwood.parallel.place_activations import activation_sharding, split_over


@dataclass(frozen=True)
class each:
    """Initializer of a stack: `init` draws each entry of the leading axis independently."""

    init: Initializer

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.vmap(lambda key: self.init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))


class MixtureOfExperts(Layer):
    """`sum over the k chosen experts e of weight_e(x) * expert_e(x)`: `(..., length, features)` to the same.

    An expert is `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` unless `gated`, without biases.
    Parameters: `router/kernel` (features, experts), used in float32; `gate/kernel` and `up/kernel` (experts, features,
    hidden), `down/kernel` (experts, hidden, features), with the logical axes "expert", "embed" and "mlp".

    The call takes an optional `mask` (boolean, the leading dimensions of x, such as (batch,) or (batch, length)), true
    for real tokens. Other tokens, such as padding or rows that the loss leaves out, may hold any value and give zeros.
    No expert takes them, the losses and sown values leave them out, and the capacity of a sequence counts only its real
    tokens.

    In training runs, `balance` and `z` times the losses of `top_k_routing` go to `v.loss` under these names. The layer
    sows `load` `(experts,)`, each expert's share of all choices, and with a capacity also `dropped`, the share of
    choices that no expert took.

    On a mesh the experts are spread over the mesh axis of the logical axis "expert" ("expert" by the default rules);
    the batch is split over it too. Two all-to-alls send the tokens to their experts and back. The hidden units are
    split over the mesh axis of "mlp", and their partial sums are added after the tokens are back. Kernels that "fsdp"
    stores in shards are gathered first. The results, losses included, are those of one device. No token may be lost, so
    a device reserves room for the case that all tokens go to one place: `devices x tokens x min(k, experts / devices)`
    rows. A capacity bounds that by `experts x capacity per sequence x sequences`. A TPU or GPU sends only the rows that
    exist, and every platform multiplies only these. If the batch does not divide by the axis, every device holds all
    tokens and computes the part of its experts, and the parts are added.

    Args:
        experts: number of experts.
        hidden: hidden units of each expert.
        k: experts of each token.
        capacity: None drops no token. With a number, an expert takes at most `capacity` times its fair share of each
            sequence (the last two dimensions of x). A choice beyond that gives zeros, so the layer belongs in a
            residual connection.
        gated: whether experts have a gate.
        activation: function of arrays inside each expert.
        normalize: whether the k weights of a token are scaled to a sum of 1; see `top_k_routing`.
        balance, z: factors of the auxiliary losses; 0 leaves one out.
        kernel_init: initializer of each kernel.

    Raises:
        ConfigError: a field is out of range, the mesh axis does not divide the experts, or the layer trains inside a
            pipeline ("stage") without `balance=0` (with a mask also `z=0`). These losses are not means over examples,
            so those of micro-batches do not add up to that of the batch.

    Shazeer et al. 2017 (arXiv:1701.06538); Lepikhin et al. 2020, "GShard" (arXiv:2006.16668); Fedus et al. 2021,
    "Switch Transformers" (arXiv:2101.03961); Jiang et al. 2024, "Mixtral of Experts" (arXiv:2401.04088).

    >>> import sapwood as sw
    >>> layer, x = MixtureOfExperts(experts=4, hidden=16, k=2), jnp.ones((2, 5, 8))
    >>> params, _ = sw.init(layer, 0, x)
    >>> params["up"]["kernel"].shape, jax.jit(layer)(params, x).shape
    ((4, 8, 16), (2, 5, 8))
    >>> _, updates = jax.jit(sw.pure(layer))(sw.bind(params, train=True), x)
    >>> sorted(updates.losses)
    ['balance', 'z']
    """

    experts: int
    hidden: int
    k: int = 2
    capacity: float | None = None
    gated: bool = True
    activation: Callable = jax.nn.silu
    normalize: bool = True
    balance: float = 0.01
    z: float = 0.001
    kernel_init: Initializer = lecun_normal()

    def __post_init__(self) -> None:
        check_inputs.positive(self, "experts", "hidden")
        routing.few_enough("MixtureOfExperts", self.k, self.experts)
        routing.some_capacity(self.capacity)
        check_inputs.within(self, "balance", 0, math.inf)
        check_inputs.within(self, "z", 0, math.inf)

    def __call__(self, v: Vars, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("MixtureOfExperts", x))
        check_inputs.at_least("MixtureOfExperts", x, 2, "(..., length, features)")
        if mask is not None:
            mask = jnp.broadcast_to(broadcast_leading_mask("MixtureOfExperts", mask, x), (*x.shape[:-1], 1))
            x, mask = jnp.where(mask, x, jnp.zeros_like(x, shape=())), mask[..., 0]
        ids, weights = self._route(v, x, mask)
        kernels = self._kernels(v, x.shape[-1])
        names = ("batch", *(None,) * (x.ndim - 3), *(("length",) if x.ndim > 2 else ()), "embed")
        sharding = activation_sharding(v, x, *names)
        if sharding is None:
            return self._apply(None, x, ids, weights, kernels, self._slots(x.shape[-2]))
        return self._spread(v, sharding, x, ids, weights, kernels)

    def _route(self, v: Vars, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Experts of each token `(..., length, k)` and their weights. `self.experts` stands for no expert.

        This runs outside of the `shard_map`, so its means and its capacity are those of the whole batch on any mesh.
        """
        shape = (x.shape[-1], self.experts)
        kernel = v.router.param("kernel", shape, self.kernel_init, axes=("embed", "expert"), cast=False)
        logits = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        found = routing.top_k_routing(logits, self.k, self.normalize, mask)
        if v.train:
            self._refuse_microbatches(v, mask)
            for name, weight, loss in (("balance", self.balance, found.balance), ("z", self.z, found.z)):
                if weight:
                    v.loss(name, weight * loss)
        v.sow("load", found.load)
        ids = found.experts if mask is None else jnp.where(mask[..., None], found.experts, self.experts)
        if self.capacity is None:
            return ids, found.weights
        taken = routing.within_capacity(ids, self._slots_of_each(x.shape[-2], mask))
        v.sow("dropped", jnp.mean(routing.mean_of_tokens((~taken).astype(jnp.float32), mask)))
        return jnp.where(taken, ids, self.experts), found.weights

    def _refuse_microbatches(self, v: Vars, mask: jax.Array | None) -> None:
        """Raise `ConfigError` if a loss over micro-batches would differ from the loss over the batch."""
        wrong = "balance" if self.balance else "z" if self.z and mask is not None else None
        if wrong and scan_pipeline.inside():
            why = (
                "is no mean over examples" if wrong == "balance" else "under a mask is a mean over the tokens there are"
            )
            raise ConfigError(
                f"{v._at()}: the loss {wrong!r} of a mixture of experts {why}, and each micro-batch of a pipeline "
                f"would have its own, so that training differs from that of one device. Choose a mesh without 'stage', "
                f"such as expert={self.experts}, or leave the loss out: MixtureOfExperts({wrong}=0)"
            )

    def _slots(self, length: int) -> int:
        """Largest number of tokens of a sequence for one expert."""
        return length if self.capacity is None else routing.slots(length, self.experts, self.k, self.capacity)

    def _slots_of_each(self, length: int, mask: jax.Array | None) -> int | jax.Array:
        """`_slots` for each sequence, from its number of real tokens.

        It looks the number up in a table made at trace time, since `slots` rounds in float64.
        """
        if mask is None:
            return self._slots(length)
        return jnp.asarray(np.array([self._slots(n) for n in range(length + 1)], np.int32))[jnp.sum(mask, -1)]

    def _kernels(self, v: Vars, features: int) -> dict[str, jax.Array]:
        wide, init = (self.experts, features, self.hidden), each(self.kernel_init)
        names = ("gate", "up") if self.gated else ("up",)
        kernels = {name: v[name].param("kernel", wide, init, axes=("expert", "embed", "mlp")) for name in names}
        narrow = (self.experts, self.hidden, features)
        return kernels | {"down": v.down.param("kernel", narrow, init, axes=("expert", "mlp", "embed"))}

    def _spread(self, v: Vars, sharding: NamedSharding, x, ids, weights, kernels) -> jax.Array:
        """Run `_apply` on every device of a mesh, with its tokens and its experts."""
        mesh = sharding.mesh
        axis = self._axis(v, mesh)
        tokens = PartitionSpec(*sharding.spec[:-1], None)
        over = {name for dim in range(x.ndim - 1) for name in split_over(sharding, dim)}
        hidden = split_over(activation_sharding(v, kernels["up"], "expert", "embed", "mlp"), 2)
        # Along an axis that splits the tokens, devices hold different tokens: there are no partial sums to add.
        hidden = tuple(name for name in hidden if name not in over)
        wide, narrow = PartitionSpec(axis, None, hidden), PartitionSpec(axis, hidden, None)
        held = {name: narrow if name == "down" else wide for name in kernels}
        on = platform(mesh)
        travel, slots = bool(over & {*axis}), self._slots(x.shape[-2])

        def local(x, ids, weights, kernels):
            y = self._apply(on, x, ids, weights, kernels, slots, axis, travel)
            parts = hidden if travel else (*axis, *hidden)
            return lax.psum(y, parts) if parts else y

        return per_device(local, mesh, (tokens, tokens, tokens, held), tokens)(x, ids, weights, kernels)

    def _axis(self, v: Vars, mesh: Any) -> tuple[str, ...]:
        """Mesh axes that the experts are spread over. Raises `ConfigError` if these do not divide the experts."""
        whole = jax.ShapeDtypeStruct((math.prod(mesh.shape.values()),), "int32")  # a size that every axis divides
        axis = split_over(activation_sharding(v, whole, "expert"), 0)
        devices = math.prod(mesh.shape[name] for name in axis)
        if self.experts % devices:
            fits = [n for n in range(1, self.experts + 1) if self.experts % n == 0 and n <= devices]
            near = -(-self.experts // devices) * devices
            raise ConfigError(
                f"{v._at()}: {self.experts} experts do not divide over the {devices} devices of mesh axis "
                f"{'+'.join(axis)}; {'+'.join(axis)}={fits[-1]} works with {self.experts} experts, and {near} experts "
                f"with {'+'.join(axis)}={devices}"
            )
        return axis

    def _apply(
        self, on: str | None, x, ids, weights, kernels, slots: int, axis: tuple[str, ...] = (), travel: bool = False
    ):
        """Apply the experts in `kernels` to tokens x `(..., length, features)`.

        Args:
            on: the platform of the mesh, None without one.
            x: the tokens.
            ids, weights: `(..., length, k)`, as `_route` returns them.
            kernels: the kernels of the experts on this device.
            slots: largest number of tokens of a sequence for one expert. x may hold only a part of each sequence.
            axis: axes of a surrounding `shard_map` that the experts are spread over.
            travel: whether tokens are sent to their experts. If not, experts of other devices give zeros.
        """
        tokens, here = x.reshape(-1, x.shape[-1]), kernels["up"].shape[0]
        ids, run = ids.reshape(-1, self.k), functools.partial(self._experts, on, kernels)
        most = math.prod(x.shape[:-2]) * min(slots, x.shape[-2])  # largest number of tokens of one expert
        if on and travel:
            y = through_spread_experts(on, axis, self.experts, most, tokens, ids, run)
        else:
            if axis:
                ids = ids - lax.axis_index(axis) * here
                ids = jnp.where((ids >= 0) & (ids < here), ids, here)
            y = through_experts(here, most, tokens, ids, ids.size * here // self.experts, run)
        weighted = y.astype(jnp.float32) * weights.reshape(-1, self.k, 1)
        return weighted.sum(1).astype(x.dtype).reshape(x.shape)

    def _experts(
        self, on: str | None, kernels: dict[str, jax.Array], x: jax.Array, sizes: jax.Array, expected: int
    ) -> jax.Array:
        """Each expert on its rows of x."""
        multiply = functools.partial(grouped_matmul, sizes=sizes, expected=expected, platform=on)
        h = multiply(x, kernels["up"])
        h = self.activation(multiply(x, kernels["gate"])) * h if self.gated else self.activation(h)
        return multiply(h, kernels["down"])
