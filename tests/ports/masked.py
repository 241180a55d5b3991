"""The largest of several handwritten digits, by a transformer that must not look at the images behind a mask."""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapwood as sw
from sapwood import layers as L


def block(v, x, shown):
    h = L.LayerNorm()(v.norm[0], x)
    x = x + L.MultiHeadAttention(4)(v.attention, h, mask=shown[:, None, None, :])
    h = jax.nn.gelu(L.Dense(32)(v.up, L.LayerNorm()(v.norm[1], x)))
    return x + L.Dense(16)(v.down, h)


def model(v, images, shown):
    x = block(v.block, L.Dense(16)(v.embed, images), shown)
    return L.Dense(10)(v.logits, L.LayerNorm()(v.norm, x[:, 0]))  # the first image is always shown


def rows(x, digit, count, seed):
    """Five images each, of which one to five are shown, and the largest digit of those."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(x), size=(count, 5))
    shown = np.arange(5) < rng.integers(1, 6, size=(count, 1))
    return {"images": x[chosen], "shown": shown, "label": np.where(shown, digit[chosen], 0).max(1)}


def main():
    x, digit = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, digit = x[order] / 16, digit[order]
    train, test = rows(x[:1400], digit[:1400], 3000, seed=0), rows(x[1400:], digit[1400:], 500, seed=1)

    trainer = sw.Trainer(sw.supervised(model, inputs=("images", "shown")), optax.adam(5e-3))
    state, _ = trainer.fit(train, epochs=6, batch_size=64)
    return trainer.evaluate(state, test)


if __name__ == "__main__":
    print(main())
