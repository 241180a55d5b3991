"""What holds arrays prints in a line: `print(sw.load(...))` is for reading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood.core.effects import Updates
from sapwood.core.short_repr import brief
from sapwood.metrics import Mean, Metric
from sapwood.train.step.loss_scale import ScaleState

TREE = {"blocks": {str(i): {"kernel": np.ones((30, 30), "float32")} for i in range(40)}, "head": np.zeros(7, "float32")}


class Histogram(Metric):
    counts: jax.Array


@pytest.fixture
def state():
    scale = ScaleState(jnp.float32(8), np.int32(2), np.int32(0))
    return sw.TrainState(
        np.int32(3), TREE, {}, (TREE, np.int32(1)), jax.random.key(0), ema=TREE, scale=scale, ok=jnp.bool_(True)
    )


def test_holders_of_arrays_print_in_a_line(state, tmp_path):
    artifact = sw.load(
        sw.save(tmp_path / "m", TREE, {"norm": {"mean": np.ones(900, "float32")}}, classes=map(str, range(999)))
    )
    held = "{blocks, head: 41 arrays, 36,007 numbers}"
    assert repr(state) == (
        f"TrainState(step=3, params={held}, state={{}}, opt_state=tuple of 42 arrays, 36,008 numbers, rng=key<fry>[], "
        f"ema={held}, scale=ScaleState(scale=8.0, good=2, skipped=0), ok=True)"
    )
    assert repr(artifact).startswith(f"Artifact(params={held}, state={{norm: 1 array, 900 numbers}}, ")
    result = sw.train.Result(state, [{"step": i, "loss": 0.5} for i in range(500)])
    updates = Updates(TREE, {}, {}, {"check": np.ones(400, bool)})
    data = sw.data.load((np.zeros((5000, 3)), np.arange(5000) % 999)).select(np.arange(900)).weighted(np.ones(900))
    metrics = {"accuracy": Mean(jnp.float32(2), 8.0), "many": Histogram(np.zeros(4000))}
    for holder in (state, artifact, result, updates, data, metrics):
        assert len(repr(holder)) < 600, type(holder)
        assert "\n" not in repr(holder)
    assert repr(metrics["accuracy"]) == "Mean(total=2.0, weight=8.0)"
    assert repr(data).startswith("Dataset(900 examples of features float32(3,), label int32() in 999 classes, weight")


def test_what_has_no_value_prints_all_the_same():
    gone = jnp.ones(())
    gone.delete()
    assert brief(gone) == "float32[]"
    seen = []
    jax.eval_shape(lambda x: seen.append(brief((x, x))) or x, jnp.ones((2, 3)))
    assert seen == ["tuple of 2 arrays, 12 numbers"]
    assert brief(jnp.bfloat16(2)) == "bfloat16[]"
    assert brief(jax.ShapeDtypeStruct((), "float32")) == "float32[]"
