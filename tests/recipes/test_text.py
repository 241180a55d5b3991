"""`text`: what it learns, what it writes, and what it refuses before it learns."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

import sapwood as sw
from sapwood.parallel import DEFAULT, ShardingWarning
from sapwood.recipes.language.text import NOVEL, Text

LINE = "the sea is deep and the sky is wide, "


@pytest.fixture
def small(tmp_path):
    """The recipe on a text of one line, again and again."""
    path = tmp_path / "line.txt"
    path.write_text(60 * LINE)
    options = {"depth": 1, "width": 32, "heads": 2, "length": 32, "stride": 8, "epochs": 4, "prompt": "the sea"}
    return lambda **more: Text(**{"file": str(path), "learning_rate": 1e-2, "sample": 40, **options, **more})


@pytest.fixture
def trained(small):
    recipe = small()
    data, _ = recipe.data()
    state, history = recipe.trainer(100).fit(data, epochs=4, batch_size=16, progress=False)
    return recipe, state, history


@pytest.mark.slow
def test_it_learns_the_line_by_heart_and_writes_on(trained):
    recipe, state, history = trained
    assert history[0]["loss"] < np.log(len(recipe.vocabulary)) + 0.5
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    written = recipe.report(state.params, state.state)
    assert len(written) == len("the sea") + 40
    assert written == recipe.report(state.params, state.state)  # by its seed
    cold = dataclasses.replace(recipe, temperature=1e-3, sample=2 * len(LINE))  # longer than its window of 32
    assert cold.report(state.params, state.state) == (4 * LINE)[: len("the sea") + 2 * len(LINE)]


def first(recipe, steps, **where):
    """What each of the first steps gives."""
    trainer = recipe.trainer(100, **where)
    options = {"batch_size": 16, "log_every": 1, "steps_per_call": 1, "progress": False}
    return trainer.fit(recipe.data()[0], steps=steps, **options).history


@pytest.mark.slow
def test_a_mixture_of_experts_learns(small):
    history = first(small(width=16, length=16, stride=4, experts=4), 30)
    losses = [row["loss"] for row in history]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert 0.01 < history[0]["auxiliary_loss"] < 0.1  # balance 0.01 x 1 to 4, z 0.001 x log(4)^2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("fsdp=2,tensor=2,sequence=2", {}),
        ("fsdp=2,tensor=2,sequence=2", {"vocabulary_size": 64}),  # in chunks
        ("expert=2,data=4", {"experts": 4}),
    ],
)
def test_the_first_losses_on_a_mesh_are_those_of_one_device(small, mesh, options):
    """With a small batch, and every parameter split that can be."""
    recipe = small(width=16, length=16, **options)
    rules = dataclasses.replace(DEFAULT, min_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShardingWarning)  # 14 characters do not always divide
        across = first(recipe, 20, mesh=sw.mesh(mesh), rules=rules)
    for ours, theirs in zip(across, first(recipe, 20), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_model_looks_only_back():
    """A later character changes nothing before it."""
    recipe = Text(depth=2, width=16, heads=2, length=12)
    tokens = np.arange(24).reshape(2, 12) % len(recipe.vocabulary)
    draw = np.random.default_rng(0).normal
    spec = sw.spec(recipe.model, tokens)
    params = jax.tree.map(lambda p: draw(size=p.shape).astype("float32") / 2, spec.params)
    assert spec.state == {}
    run = jax.jit(lambda tokens: sw.apply(recipe.model, params, {}, tokens)[0])
    before = np.asarray(run(tokens))
    tokens[:, 7] = 3
    after = np.asarray(run(tokens))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before - after)[:, 7:].max((0, 2)) > 0).all()


def test_the_novel_is_cut_into_training_and_test(small):
    recipe = Text(length=64)
    train, test = recipe.data()
    text = NOVEL.read_text(encoding="utf-8")
    assert recipe.vocabulary == "".join(sorted(set(text)))
    first, last = train[0], test[len(test) - 1]
    assert sw.data.decode(first["tokens"], recipe.vocabulary) == text[:64]
    assert sw.data.decode(first["targets"], recipe.vocabulary) == text[1:65]
    assert sw.data.decode(last["tokens"], recipe.vocabulary) in text[int(0.9 * len(text)) :]
    assert train.features["tokens"].vocabulary == tuple(recipe.vocabulary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Sea"}, r"character 'S' at position 0 \(line 1\) is not in the vocabulary of 14 characters"),
        ({"prompt": ""}, "prompt is empty"),
        ({"length": 3000}, "windows of 3000 need at least 3001"),
        ({"length": 0}, "a window has at least one character"),
        ({"temperature": float("nan")}, "temperature=nan: above 0 is expected"),
        ({"sample": -1}, "sample=-1: a number of characters to write is expected"),
        ({"experts": 1}, "experts=1: at least 2 are expected, or 0 for no mixture"),
        ({"stride": 0}, "windows start at least one character apart"),
    ],
)
def test_what_cannot_be_learned_is_said_before_training(small, options, message):
    with pytest.raises(sw.SapwoodError, match=message):
        small(**options).data()


def test_heads_that_do_not_divide_the_width(small):
    recipe = small(heads=5)
    with pytest.raises(sw.SapwoodError, match="32 features do not divide into heads=5") as caught:
        sw.spec(recipe.model, jax.ShapeDtypeStruct((2, 32), "int32"))
    assert any("blocks/attention" in note for note in caught.value.__notes__)


def test_files_that_are_no_text(small, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(sw.DataError, match=r"latin.txt is not UTF-8 text: byte 3 is 0xe9"):
        small(file=str(tmp_path / "latin.txt")).data()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(sw.DataError, match=r"empty.txt is empty; a text to learn from is expected"):
        small(file=str(tmp_path / "empty.txt")).data()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        small(file="nowhere.txt").data()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps_has_a_schedule(small, steps):
    """With nothing to warm up where there is one step alone."""
    optimizer, weights = small().optimizer(steps), {"w": np.ones(3, "float32")}
    update, _ = jax.jit(lambda weights: optimizer.update(weights, optimizer.init(weights), weights))(weights)
    assert (np.asarray(update["w"]) != 0).all() == (steps == 1)
