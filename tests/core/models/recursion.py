"""A recursive network: a tree of words becomes one vector, by the same cell at every node (Socher et al. 2011)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

WIDTH = 4


def compose(v, tree):
    """A word id, or a pair of trees, as a vector (features,)."""
    if not isinstance(tree, tuple):
        return L.Embed(10, WIDTH)(v.words, jnp.asarray(tree))
    left, right = (compose(v, branch) for branch in tree)
    return jnp.tanh(L.Dense(WIDTH)(v.cell, jnp.concatenate([left, right])))


def fractal(v, x, depth):
    """Scopes may recurse too: v.next.next.next ..."""
    x = L.Dense(WIDTH)(v.here, x)
    return fractal(v.next, x, depth - 1) if depth else x


SENTENCE = ((1, 2), (3, (4, 5)))


def test_one_cell_for_all_nodes():
    params, _ = jax.device_get(sw.init(compose, 0, SENTENCE))
    assert jax.tree.map(jnp.shape, params) == {
        "words": {"table": (10, WIDTH)},
        "cell": {"kernel": (2 * WIDTH, WIDTH), "bias": (WIDTH,)},
    }
    cell, words = params["cell"], np.asarray(params["words"]["table"])
    node = lambda a, b: np.tanh(np.concatenate([a, b]) @ np.asarray(cell["kernel"]) + cell["bias"])  # noqa: E731
    by_hand = node(node(words[1], words[2]), node(words[3], node(words[4], words[5])))
    found, _ = jax.jit(lambda p: sw.apply(compose, p, {}, SENTENCE))(params)
    assert np.allclose(found, by_hand, atol=1e-6)


def test_scopes_recurse():
    spec = sw.spec(fractal, np.ones(2, "float32"), 2)
    assert spec.params["next"]["next"]["here"]["kernel"].shape == (WIDTH, WIDTH)
    assert spec.params["here"]["kernel"].shape == (2, WIDTH)


def test_one_scope_for_nodes_that_differ():
    def wrong(v, x, depth):
        x = L.Dense(WIDTH)(v.here, x)
        return wrong(v, x, depth - 1) if depth else x

    message = r"here/kernel is declared twice with a different shape: first \(2, 4\), now \(4, 4\)"
    with pytest.raises(sw.DeclarationError, match=message) as caught:
        sw.spec(wrong, np.ones(2, "float32"), 2)
    assert caught.value.__notes__[0] == "in here: Dense(features=4) on float32[4]"


if __name__ == "__main__":
    params, _ = sw.init(compose, 0, SENTENCE)
    print(SENTENCE, "->", sw.apply(compose, params, {}, SENTENCE)[0])
