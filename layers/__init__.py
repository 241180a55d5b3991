"""Array functions and layers, one family a file.

A name in lower case is a function of arrays, `dense(x, kernel, bias)`; a name in upper case is a layer, a frozen
dataclass of hyper-parameters that is called with a cursor, `Dense(10)(v.logits, x)`. Activations are those of `jax.nn`.
"""

from typing import TYPE_CHECKING, Any

from sapwood.core import migration_hints
from sapwood.layers.attentions.multi_head import MultiHeadAttention, attention
from sapwood.layers.attentions.positions import LearnedPositions, Rotary, rotary
from sapwood.layers.attentions.ring import ring_attention
from sapwood.layers.attentions.ulysses import ulysses_attention
from sapwood.layers.compose.remat import Remat
from sapwood.layers.compose.scan import Scan
from sapwood.layers.compose.sequential import Sequential
from sapwood.layers.compose.vmap import Vmap
from sapwood.layers.experts.grouped_matmul import grouped_matmul
from sapwood.layers.experts.mixture_of_experts import MixtureOfExperts
from sapwood.layers.experts.routing import Routing, top_k_routing
from sapwood.layers.linear.dense import Dense, dense
from sapwood.layers.linear.embedding import Embed, embed
from sapwood.layers.norm.batch_norm import BatchNorm, batch_norm
from sapwood.layers.norm.group_norm import GroupNorm, group_norm
from sapwood.layers.norm.layer_norm import LayerNorm, layer_norm
from sapwood.layers.norm.moments import moments
from sapwood.layers.norm.rms_norm import RMSNorm, rms_norm
from sapwood.layers.regularize.dropout import Dropout, dropout
from sapwood.layers.spatial.conv import Conv, conv
from sapwood.layers.spatial.flatten import Flatten, flatten
from sapwood.layers.spatial.pooling import (
    AvgPool,
    GlobalAvgPool,
    GlobalMaxPool,
    MaxPool,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    max_pool,
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return migration_hints.missing("sapwood.layers", migration_hints.LAYERS, name, __all__)


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
