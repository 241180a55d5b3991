"""A network that knows the digits 0 to 4 learns 5 to 9 from ten images of each: its trunk is kept, its head is new."""

import tempfile

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapwood as sw
from sapwood import layers as L


def trunk(v, x):
    for i, features in enumerate((8, 16)):
        x = L.max_pool(jax.nn.relu(L.Conv(features, (3, 3))(v[i], x)), (2, 2))
    return L.flatten(x)


def old(v, image):
    return L.Dense(5)(v.head, trunk(v.trunk, image))


def new(v, image):
    return L.Dense(5)(v.new_head, trunk(v.trunk, image))


def main():
    digits = load_digits()
    images, labels = digits.images[..., None] / 16, digits.target
    known, few = labels < 5, np.concatenate([np.flatnonzero(labels == c)[:10] for c in range(5, 10)])
    rest = np.setdiff1d(np.flatnonzero(~known), few)

    first, _ = sw.Trainer(sw.supervised(old), optax.adam(3e-3)).fit((images[known], labels[known]), epochs=5)
    saved = sw.save(tempfile.mkdtemp() + "/old", first.params)

    trainer = sw.Trainer(sw.supervised(new), optax.adam(1e-2), trainable="new_head")
    spec = sw.spec(new, images[:1])
    start = sw.load(saved, into=spec, match={"trunk/**": "trunk/**"})
    data = (images[few], labels[few] - 5)
    state = trainer.init(0, {"image": images[:1], "label": labels[:1]}, params=start.params)
    state, _ = trainer.fit(data, epochs=30, state=state)
    moved = jax.tree.map(lambda a, b: np.ptp(np.subtract(a, b)), first.params["trunk"], state.params["trunk"])
    return {
        "accuracy": trainer.evaluate(state, (images[rest], labels[rest] - 5))["accuracy"],
        "trunk_moved": max(jax.tree.leaves(moved)),
    }


if __name__ == "__main__":
    print(main())
