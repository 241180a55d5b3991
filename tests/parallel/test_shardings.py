"""Shardings of parameters and state, from a spec and before any array exists."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.core.param import Param, Stacked
from sapwood.parallel import (
    DEFAULT,
    Rules,
    ShardingWarning,
    batch_sharding,
    mesh,
    param_shardings,
    placement,
    replicated,
    state_shardings,
    table,
)


def param(*shape, axes=None, stacked=()):
    return Param(shape, jnp.float32, None, axes, stacked)


def specs(tree):
    return jax.tree.map(lambda s: tuple(s.spec), tree)


def test_names_follow_the_rules_and_the_rest_its_largest_divisible_dimension():
    spec = {
        "named": param(256, 512, axes=("embed", "mlp")),
        "plain": param(256, 512),
        "tall": param(1024, 512),
        "odd": param(1001, 512),
        "kernel": param(3, 3, 64, 128),
    }
    found = specs(param_shardings(spec, mesh("data=2,fsdp=4")))
    assert found == {
        "named": ("fsdp", None),
        "plain": (None, "fsdp"),
        "tall": ("fsdp", None),
        "odd": (None, "fsdp"),
        "kernel": (None, None, None, "fsdp"),
    }


def test_small_parameters_stay_whole():
    spec = {"bias": param(16383), "scale": param(127, 129, axes=("embed", "mlp")), "big": param(16384)}
    found = specs(param_shardings(spec, mesh("fsdp=8")))
    assert found == {"bias": (None,), "scale": (None, None), "big": ("fsdp",)}
    assert specs(param_shardings(spec, mesh("fsdp=8"), replace(DEFAULT, min_size=2**20)))["big"] == (None,)


def test_a_scanned_stack_lies_as_its_unrolled_twin():
    layers = (Stacked(1, 64, "layers"),)
    spec = {
        "bias": param(64, 1024, stacked=layers),  # 65536 elements, but 1024 a layer
        "kernel": param(64, 128, 128, stacked=layers),
        "named": param(64, 128, 256, axes=("layers", "embed", "mlp"), stacked=layers),
        "scale": param(64, 1024, axes=("layers", "embed"), stacked=layers),
    }
    found = specs(param_shardings(spec, mesh("fsdp=8")))
    assert found == {
        "bias": (None, None),
        "kernel": (None, "fsdp", None),
        "named": (None, "fsdp", None),
        "scale": (None, None),
    }


def test_stacked_experts_are_split_over_the_expert_axis_even_without_other_names():
    spec = {"up": param(8, 64, 128, stacked=(Stacked(1, 8, "expert"),))}
    assert specs(param_shardings(spec, mesh("expert=4,fsdp=2")))["up"] == ("expert", None, "fsdp")
    assert specs(param_shardings(spec, mesh("expert=8")))["up"] == ("expert", None, None)


def test_arrays_and_structs_are_parameters_without_names():
    spec = {"a": jnp.zeros((128, 256)), "b": jax.ShapeDtypeStruct((256, 128), "bfloat16")}
    assert specs(param_shardings(spec, mesh("fsdp=8"))) == {"a": (None, "fsdp"), "b": ("fsdp", None)}


def test_what_does_not_divide_is_whole_and_one_warning_says_which():
    blocks = {str(i): {"up": param(100, 999, axes=("embed", "mlp"))} for i in range(3)}
    with pytest.warns(ShardingWarning) as caught:
        found = param_shardings({"blocks": blocks, "odd": param(999, 333)}, mesh("fsdp=8"))
    assert set(jax.tree.leaves(specs(found), is_leaf=lambda x: isinstance(x, tuple))) == {(None, None)}
    assert [str(w.message) for w in caught] == [
        "blocks/0/up and 2 more like it: dimension 0 ('embed', size 100) does not divide by fsdp=8: left whole; "
        "96 or 104 would divide",
        "blocks/0/up and 2 more like it: dimension 1 ('mlp', size 999) does not divide by fsdp=8: left whole; "
        "992 or 1000 would divide",
        "odd: no dimension of (999, 333) divides by fsdp=8: left whole",
    ]
    assert caught[0].filename == __file__


def test_a_dimension_over_several_axes_warns_of_what_truly_does_not_divide():
    # 4 and 6 divide by 2, and 4 is not left whole: it is the parts of both axes together that do not divide.
    together = "fsdp=2: with the axes before it in its row that makes 8 parts, so not split over 'fsdp'; 8 would divide"
    for size, before in ((4, []), (6, ["data=4: left whole; 4 or 8 would divide"])):
        with pytest.warns(ShardingWarning) as caught:
            placement(mesh("data=4,fsdp=2"))(("batch", "embed"), (size, 16))
        said = [str(w.message).partition("does not divide by ")[2] for w in caught]
        assert said == [*before, together]


def test_a_fallback_that_works_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = param_shardings(
            {"up": param(100, 512, axes=("embed", "mlp")), "tiny": param(3, 5, axes=("embed", "mlp"))}, mesh("fsdp=8")
        )
    assert specs(found)["up"] == (None, "fsdp")


def test_an_axis_name_nobody_knows_is_left_whole_with_a_warning():
    with pytest.warns(ShardingWarning, match=r"w: no rule knows the logical axis 'embd'; did you mean 'embed'"):
        param_shardings({"w": param(256, 256, axes=("embd", "mlp"))}, mesh("fsdp=8"))


@pytest.mark.parametrize("text", ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"])
def test_state_and_the_rest_are_whole_on_any_mesh(text):
    m = mesh(text)
    state = state_shardings({"norm": {"mean": param(4096)}}, m)
    assert state["norm"]["mean"] == replicated(m)
    assert replicated(m).is_fully_replicated


def test_a_mesh_without_fsdp_leaves_unannotated_parameters_whole():
    assert specs(param_shardings({"w": param(256, 256)}, mesh("data=8")))["w"] == (None, None)


def test_axes_of_size_one_are_not_written():
    assert specs(param_shardings({"w": param(256, 256)}, mesh("data=8,fsdp=1")))["w"] == (None, None)
    assert batch_sharding(mesh("data=8,fsdp=1")).spec == PartitionSpec("data")


def test_an_explicit_mesh_of_the_user_works():
    explicit = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    shardings = param_shardings({"w": param(256, 128)}, explicit)
    assert shardings == param_shardings({"w": param(256, 128)}, mesh("data=4,fsdp=2"))
    w = jax.device_put(jnp.ones((256, 128)), shardings["w"])
    x = jax.device_put(jnp.ones((8, 256)), batch_sharding(explicit))
    y = jax.jit(lambda x, w: jnp.sin(x @ w) @ w.T)(x, w)  # under Explicit axes this product is an error
    assert y.shape == (8, 256)
    with jax.set_mesh(explicit), pytest.raises(ConfigError, match=r"jax.set_mesh has set a mesh with Explicit axes"):
        param_shardings({"w": param(256, 128)}, explicit)


def test_a_mesh_of_the_user_with_other_names_and_rules_for_it():
    m = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rules = Rules((("batch", "x"), ("mlp", "y")), unannotated="x")
    spec = {"named": param(256, 128, axes=("embed", "mlp")), "plain": param(256, 128)}
    assert specs(param_shardings(spec, m, rules)) == {"named": (None, "y"), "plain": ("x", None)}
    with pytest.raises(ConfigError, match="no rule uses axis 'x'"):
        param_shardings(spec, m)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (
            ("embed", "heads", "kv"),
            (64, 6, 64),
            r"q: dimension 1 \('heads', size 6\) does not divide by tensor=4: left whole; 4 or 8 would divide",
        ),
        (
            ("vocab", "mlp"),
            (512, 256),
            r"q: the rows of 'vocab' and 'mlp' ask for mesh axis 'tensor' twice: dimension 0 \(size 512\) has it",
        ),
    ],
)
def test_strict_rules_make_an_error_of_what_is_left_whole(axes, shape, message):
    strict = replace(table("tensor"), strict=True)
    with pytest.raises(ConfigError, match=r"mesh data=2,tensor=4, strict rules: " + message):
        param_shardings({"q": param(*shape, axes=axes)}, mesh("data=2,tensor=4"), strict)


def test_strict_rules_hold_for_activations():
    place = placement(mesh("data=2,tensor=4"), replace(table("tensor"), strict=True))
    with pytest.raises(ConfigError, match=r"activation \('batch', 'mlp'\) of shape \(4, 6\): .* 4 or 8 would divide"):
        place(("batch", "mlp"), (4, 6))
