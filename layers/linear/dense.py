"""Fully connected layers: `y = x W + b` over the last dimension.

`dense` is the array function, `Dense` the layer. Both use the matrix product of `matmul`.
"""

import jax

from sapwood.core.errors import InputError
from sapwood.core.initializers import Initializer, lecun_normal, zeros
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.expand_rank import expand_rank
from sapwood.layers.linear.matmul import matmul
from sapwood.parallel.place_activations import has_mesh


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, split: bool = False) -> jax.Array:
    """`x @ kernel + bias` over the last dimension of x.

    Args:
        x: `(..., features)`, floating.
        kernel: `(features, out)`.
        bias: `(out,)`, or None for none.
        split: whether x is split over a mesh; see `matmul`.

    Returns:
        `(..., out)`.

    Raises:
        InputError: x is not floating, or does not fit the kernel.

    >>> import jax.numpy as jnp
    >>> dense(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones(1))
    Array([[4.],
           [4.]], dtype=float32)
    """
    x = check_inputs.floating("dense", x)
    if x.ndim == 0 or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise InputError(f"dense expects x (..., features) and kernel (features, out), got {describe((x, kernel))}")
    y = matmul(x, kernel, split=split)
    return y if bias is None else y + expand_rank(bias, y)


class Dense(Layer):
    """`y = x W + b`: `(..., features_in)` to `(..., features)`.

    Parameters: `kernel` (features_in, features), `bias` (features,). The kernel's initial variance is 1 / features_in
    (LeCun et al. 1998, "Efficient BackProp").

    Args:
        features: size of the last dimension of the output, at least 1.
        bias: whether to add a bias.
        axes: the kernel's logical axis names, such as ("embed", "mlp"). With None, the kernel is sharded by its largest
            dimension that divides.
        kernel_init, bias_init: initializers of the parameters.

    Raises:
        ConfigError: features is below 1.
        InputError: x is not floating.

    >>> import jax.numpy as jnp
    >>> Dense(1)({"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)}, jnp.ones((2, 3)))
    Array([[3.],
           [3.]], dtype=float32)
    """

    features: int
    bias: bool = True
    axes: tuple[str | None, ...] | None = None
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        check_inputs.positive(self, "features")
        check_inputs.axes(self, 2, "(features_in, features)")

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("Dense", x))
        check_inputs.at_least("Dense", x, 1, "(..., features)")
        kernel = v.param("kernel", (x.shape[-1], self.features), self.kernel_init, axes=self.axes)
        bias_axes = self.axes and self.axes[-1:]
        bias = v.param("bias", (self.features,), self.bias_init, axes=bias_axes) if self.bias else None
        return dense(x, kernel, bias, split=has_mesh(v))
