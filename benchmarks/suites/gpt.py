"""`gpt`: a decoder of 6 layers, d 384, 6 heads, 256 tokens, vocabulary 8,192, batch 4, Adam. Computing dominates."""

import numpy as np

from benchmarks.suite import PEERS, Goal, Suite, beats

CONFIG = {"layers": 6, "width": 384, "heads": 6, "tokens": 256, "vocabulary": 8192, "batch": 4, "rate": 1e-3}


def weights(rng, config):
    width, heads, tokens, vocabulary = (config[name] for name in ("width", "heads", "tokens", "vocabulary"))
    head = width // heads

    def normal(*shape):
        return 0.02 * rng.standard_normal(shape, dtype="float32")

    def norm():
        return {"scale": np.ones(width, "float32"), "bias": np.zeros(width, "float32")}

    def dense(inputs, outputs):
        return {"kernel": normal(inputs, outputs), "bias": np.zeros(outputs, "float32")}

    def block():
        attention = {name: {"kernel": normal(width, heads, head)} for name in ("query", "key", "value")}
        attention["out"] = {"kernel": normal(heads, head, width)}
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "up": dense(width, 4 * width),
                "down": dense(4 * width, width)}  # fmt: skip

    return {
        "embed": {"table": normal(vocabulary, width)},
        "positions": {"table": normal(tokens, width)},
        "blocks": {str(i): block() for i in range(config["layers"])},
        "norm": norm(),
        "head": {"kernel": normal(width, vocabulary)},
    }


def data(rng, config):
    """Random walks in small steps around the vocabulary, so the next token can be learned."""
    walk = rng.integers(0, 8, (64 * config["batch"], config["tokens"] + 1)).cumsum(1) % config["vocabulary"]
    return {"tokens": walk[:, :-1].astype("int32"), "targets": walk[:, 1:].astype("int32")}


SUITES = (
    Suite(
        "gpt",
        "a training step of a decoder: 6 layers, d 384, 6 heads, 4 x 256 tokens, vocabulary 8,192, Adam",
        model="gpt",
        config=CONFIG,
        weights=weights,
        data=data,
        batch_size=CONFIG["batch"],
        epoch=64,
        steps=1,
        goals=(Goal("sapwood", "floor", 1.02), *beats("sapwood", *PEERS)),
    ),
)
