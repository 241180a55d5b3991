"""The sizes of `text`: what each stands for, what wins over it, and that the large one is trained as the small one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood.recipes.language.text import SIZES, Text
from sapwood.train.state import plan


def shapes(recipe):
    tokens = jax.ShapeDtypeStruct((recipe.batch_size, recipe.length), "int32")
    return plan.plan(recipe.trainer(100), {"tokens": tokens, "targets": tokens}).shapes


def test_the_large_size_is_the_reference_model():
    """Width 2,048, 24 layers, 16 heads of 128, gated MLP 8,192, vocabulary 32,000, untied, float32 parameters."""
    recipe = Text(size="1.7b")
    params = shapes(recipe).params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 1_741_785_088
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert params["blocks"]["attention"]["key"]["kernel"].shape == (24, 2048, 16, 128)
    assert params["blocks"]["gate"]["kernel"].shape == (24, 2048, 8192)
    assert params["logits"]["kernel"].shape == (2048, 32000)
    assert (recipe.batch_size, recipe.length, recipe.policy, recipe.remat) == (64, 2048, "bfloat16", "full")


def test_what_is_given_wins_over_the_size():
    recipe = Text(size="1.7b", depth=2, remat="none", policy="float32", vocabulary_size=0)
    assert recipe.decoder.depth == 2
    assert recipe.decoder.remat is None
    assert recipe.trainer(10).policy.compute is None
    assert recipe.decoder.vocabulary == len(recipe.vocabulary)
    assert recipe.width == SIZES["1.7b"]["width"]


def test_the_default_is_the_small_size():
    assert Text() == Text(size="small")
    assert Text().decoder == sw.models.Decoder(len(Text().vocabulary), 4, 128, 4, gated=False, bias=True)


@pytest.mark.costs("a training step of a whole decoder, and the program that writes")
def test_a_large_vocabulary_is_learned_and_written_from(tmp_path):
    """A small model of the large kind: only the text's characters come out, and a step lowers the loss."""
    (tmp_path / "line.txt").write_text(60 * "the sea is deep and the sky is wide, ")
    recipe = Text(
        size="1.7b", file=str(tmp_path / "line.txt"), depth=1, width=16, heads=2, mlp=32, length=16, stride=8,
        batch_size=8, vocabulary_size=50, policy="float32", prompt="the", sample=5, learning_rate=1e-2,
    )  # fmt: skip
    data, _ = recipe.data()
    trainer, tokens = recipe.trainer(60), jax.ShapeDtypeStruct((8, 16), "int32")
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda p: draw(scale=0.2, size=p.shape).astype("float32"), shapes(recipe).params)
    first = trainer.init(0, {"tokens": tokens, "targets": tokens}, params=params)
    state, history = trainer.fit(data, epochs=3, batch_size=8, state=first, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    assert set(recipe.report(state.params, state.state)) <= set(recipe.vocabulary)


def test_sizes_that_cannot_be():
    with pytest.raises(sw.ConfigError, match=r"size is '2b'; one of small, 1.7b is expected"):
        Text(size="2b")
    with pytest.raises(sw.ConfigError, match=r"vocabulary_size=3 is too small: the text has \d+ characters"):
        _ = Text(vocabulary_size=3).decoder
