"""Array functions and layers, one family a file.

A name in lower case is a function of arrays, `dense(x, kernel, bias)`; a name in upper case is a layer, a frozen
dataclass of hyper-parameters that is called with a cursor, `Dense(10)(v.logits, x)`. Activations are those of `jax.nn`.
"""

from typing import TYPE_CHECKING

from sapwood.core import foreign
from sapwood.layers.attention import MultiHeadAttention, attention
from sapwood.layers.conv import Conv, conv
from sapwood.layers.dense import Dense, dense
from sapwood.layers.dropout import Dropout, dropout
from sapwood.layers.embedding import Embed, embed
from sapwood.layers.grouped_matmul import grouped_matmul
from sapwood.layers.mixture import MixtureOfExperts
from sapwood.layers.normalization import (
    BatchNorm,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    batch_norm,
    group_norm,
    layer_norm,
    moments,
    rms_norm,
)
from sapwood.layers.pooling import (
    AvgPool,
    GlobalAvgPool,
    GlobalMaxPool,
    MaxPool,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    max_pool,
)
from sapwood.layers.positions import LearnedPositions, Rotary, rotary
from sapwood.layers.remat import Remat
from sapwood.layers.reshape import Flatten, flatten
from sapwood.layers.ring import ring_attention
from sapwood.layers.routing import Routing, top_k_routing
from sapwood.layers.scan import Scan
from sapwood.layers.sequential import Sequential
from sapwood.layers.ulysses import ulysses_attention
from sapwood.layers.vmap import Vmap

if not TYPE_CHECKING:

    def __getattr__(name: str):
        return foreign.missing("sapwood.layers", foreign.LAYERS, name, __all__)


__all__ = [  # noqa: RUF022 -- by family, not by letter
    # linear maps and lookups
    "Conv",
    "Dense",
    "Embed",
    "conv",
    "dense",
    "embed",
    # mixture of experts
    "MixtureOfExperts",
    "Routing",
    "grouped_matmul",
    "top_k_routing",
    # attention and positions
    "LearnedPositions",
    "MultiHeadAttention",
    "Rotary",
    "attention",
    "ring_attention",
    "rotary",
    "ulysses_attention",
    # normalisation and regularisation
    "BatchNorm",
    "Dropout",
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
    "batch_norm",
    "dropout",
    "group_norm",
    "layer_norm",
    "moments",
    "rms_norm",
    # pooling and shapes
    "AvgPool",
    "Flatten",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "MaxPool",
    "avg_pool",
    "flatten",
    "global_avg_pool",
    "global_max_pool",
    "max_pool",
    # layers of layers
    "Remat",
    "Scan",
    "Sequential",
    "Vmap",
]
