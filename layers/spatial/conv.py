"""Convolutions over one, two or three spatial dimensions, channels last.

`conv` is the array function, `Conv` the layer. `windows` checks and counts sizes, strides and padding.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sapwood.core.errors import ConfigError, InputError
from sapwood.core.initializers import Initializer, lecun_normal, zeros
from sapwood.core.layer import Layer, describe
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.compute_once import compute_once
from sapwood.layers.expand_rank import expand_rank
from sapwood.layers.spatial import windows
from sapwood.layers.spatial.windows import Padding, Sizes

_LAYOUT = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    strides: Sizes = 1,
    padding: Padding = "SAME",
    dilation: Sizes = 1,
    groups: int = 1,
) -> jax.Array:
    """Slide `kernel` over the spatial dimensions of x; the kernel's rank says how many there are (1 to 3).

    It is a cross-correlation, as everywhere in machine learning:
    `y[p, o] = sum over w, c of x[p * stride + w * dilation, c] kernel[w, c, o]`.

    Args:
        x: `(batch, *spatial, channels)`, floating.
        kernel: `(*window, channels / groups, out)`.
        bias: `(out,)`, or None for none.
        strides: an integer, or a tuple with one for each spatial dimension.
        padding: "SAME" (output size is ceil(size / stride)), "VALID" (no padding), "CAUSAL" (for sequences: no output
            sees a later input), an integer, or a tuple with an integer or a pair (before, after) for each dimension.
        dilation: an integer, or a tuple with one for each spatial dimension.
        groups: each group of output channels sees only its own group of input channels. As many groups as channels make
            a depthwise convolution.

    Returns:
        `(batch, *spatial_out, out)`, in the dtype that JAX promotes those of x and kernel to.

    Raises:
        InputError: the shapes do not fit together, or x is not floating.
        ConfigError: another option is invalid.

    >>> conv(jnp.arange(5.0)[None, :, None], jnp.ones((2, 1, 1)), padding="CAUSAL")[0, :, 0]
    Array([0., 1., 3., 5., 7.], dtype=float32)
    """
    x = check_inputs.floating("conv", x)
    n = kernel.ndim - 2
    if n not in _LAYOUT:
        raise InputError(
            f"conv expects a kernel (*window, channels, out) with 1 to 3 window dimensions, got {describe(kernel)}"
        )
    check_inputs.rank("conv", x, "batch", *check_inputs.spatial(n), "channels")
    if x.shape[-1] != kernel.shape[-2] * groups or kernel.shape[-1] % groups:
        raise InputError(
            f"conv: {describe(x)} has {x.shape[-1]} channels; the kernel {describe(kernel)} with groups="
            f"{groups} takes {kernel.shape[-2] * groups}, and its outputs must divide by groups"
        )
    strides = windows.per_dimension("conv", "strides", strides, n)
    dilation = windows.per_dimension("conv", "dilation", dilation, n)
    window, sizes = kernel.shape[:n], x.shape[1:-1]
    pads = windows.amounts(windows.padding("conv", padding, n, causal=True), sizes, window, strides, dilation)
    windows.must_fit("conv", sizes, pads, window, dilation)
    if x.dtype != kernel.dtype:  # XLA convolves arrays of one dtype
        dtype = jnp.result_type(x, kernel)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
    y = lax.conv_general_dilated(
        compute_once(x),
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=_LAYOUT[n],
        feature_group_count=groups,
    )
    return y if bias is None else y + expand_rank(bias, y)


class Conv(Layer):
    """Convolution: `(batch, *spatial, channels)` to `(batch, *spatial_out, features)`.

    Parameters: `kernel` (*kernel_size, channels / groups, features), `bias` (features,). The kernel's initial variance
    is 1 / (window * channels / groups) (LeCun et al. 1998, "Efficient BackProp").

    Args:
        features: number of output channels.
        kernel_size: a size for each spatial dimension: `(3,)` for sequences, `(3, 3)` for images, `(3, 3, 3)` for
            volumes.
        strides, padding, dilation, groups: as in `conv`.
        bias: whether to add a bias.
        axes: logical names of the kernel's last two dimensions, such as ("channels_in", "channels_out"). None gives no
            names.
        kernel_init, bias_init: initializers of the parameters.

    Raises:
        ConfigError: a field is out of range.
        InputError: x has another rank, dtype or channel count.

    >>> Conv(1, (2, 2), padding="VALID", bias=False)({"kernel": jnp.ones((2, 2, 1, 1))}, jnp.ones((1, 3, 3, 1))).shape
    (1, 2, 2, 1)
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: Sizes = 1
    padding: Padding = "SAME"
    dilation: Sizes = 1
    groups: int = 1
    bias: bool = True
    axes: tuple[str | None, ...] | None = None
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros

    def __post_init__(self) -> None:
        check_inputs.positive(self, "features", "groups")
        check_inputs.axes(self, 2, "the kernel's (channels, features)")
        if self.features % self.groups:
            raise ConfigError(f"Conv: features must divide by groups, got {self.features} and {self.groups}")
        n = len(windows.window("Conv", "kernel_size", self.kernel_size))
        windows.per_dimension("Conv", "strides", self.strides, n)
        windows.per_dimension("Conv", "dilation", self.dilation, n)
        windows.padding("Conv", self.padding, n, causal=True)

    def __call__(self, v: Vars, x: jax.Array) -> jax.Array:
        x = v.policy.cast(check_inputs.floating("Conv", x))
        n = len(self.kernel_size)
        check_inputs.rank("Conv", x, "batch", *check_inputs.spatial(n), "channels")
        if x.shape[-1] % self.groups:
            raise InputError(f"Conv: {x.shape[-1]} channels do not divide into groups={self.groups}: {describe(x)}")
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = v.param("kernel", shape, self.kernel_init, axes=self.axes and (None,) * n + self.axes)
        # Gather a kernel that is stored in shards here. Left to choose the place, XLA exchanged rows of the batch when
        # the batch was split over two mesh axes and the channels over a third (jaxlib 0.10.2).
        kernel = v.shard(kernel, *(None,) * n, *(self.axes or (None, None)))
        bias_axes = self.axes and self.axes[-1:]
        bias = v.param("bias", (self.features,), self.bias_init, axes=bias_axes) if self.bias else None
        return conv(x, kernel, bias, self.strides, self.padding, self.dilation, self.groups)
