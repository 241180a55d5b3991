"""Meshes from strings and keywords, and the message each mistake gets."""

import itertools
import math
import random
import warnings

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from stand_in_chips import CHIPS, StandIn, chips

from sapwood.core.errors import ConfigError
from sapwood.parallel import AXES, mesh
from sapwood.parallel.meshes import MeshWarning, abstract, with_auto_axes

# `sapwood.parallel.mesh` the attribute is the function; the module is reached by import alone


def test_a_string_and_keywords_make_the_same_mesh():
    m = mesh("data=4,fsdp=2")
    assert m == mesh(data=4, fsdp=2) == mesh(" fsdp = 2 , data=4 ")
    assert dict(m.shape) == {"data": 4, "fsdp": 2}
    assert m.axis_types == (AxisType.Auto, AxisType.Auto)
    assert sorted(d.id for d in m.devices.flat) == [d.id for d in jax.devices()]


def test_without_sizes_all_devices_are_data_parallel():
    assert dict(mesh().shape) == {"data": 8}


def test_tensor_parallelism_gets_neighbouring_devices():
    m = mesh("tensor=4,data=2")
    assert m.axis_names == ("data", "tensor")
    assert [d.id for d in m.devices[0]] == [0, 1, 2, 3]


def test_a_part_of_the_devices():
    m = mesh("fsdp=-1", devices=jax.devices()[:3])
    assert dict(m.shape) == {"fsdp": 3}


def test_every_factorisation_is_read_in_any_order_with_or_without_minus_one():
    rng = random.Random(0)
    sizes = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(s) == 8]
    for size in sizes:
        names = rng.sample(list(AXES), 3)
        chosen = dict(zip(names, size, strict=True))
        expected = {name: chosen[name] for name in AXES if name in chosen}
        for hidden in (None, *names):
            pairs = [(name, -1 if name == hidden else n) for name, n in expected.items()]
            rng.shuffle(pairs)
            m = mesh(",".join(f"{name}={n}" for name, n in pairs))
            assert list(m.shape.items()) == list(expected.items())
            assert m == mesh(**dict(pairs))


def test_random_text_is_a_mesh_or_a_config_error():
    rng = random.Random(1)
    names, sizes = ["data", "fsdp", "tensor", "expert", "Data", "x"], ["-1", "1", "2", "4", "8", "0", "+2", "٣", ""]
    read = 0
    for _ in range(3000):
        pairs = [f"{rng.choice(names)}={rng.choice(sizes)}" for _ in range(rng.randint(1, 3))]
        text = list(rng.choice([",", ", ", ",", ";"]).join(pairs))
        if rng.random() < 0.5:
            text[rng.randrange(len(text))] = rng.choice(["", " ", "=", ",", "-", "4"])
        try:
            m = mesh("".join(text))
        except ConfigError:
            continue
        read += 1
        assert math.prod(m.shape.values()) == 8
        assert set(m.shape) <= set(AXES)
    assert read > 50  # enough of them are meshes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=4,fsdp=4", "the sizes multiply to 16, the number of devices is 8"),
        ("data=2", "the sizes multiply to 2, the number of devices is 8"),
        ("data=3,fsdp=-1", "the number of devices, 8, does not divide by 3, so no size for 'fsdp' fits"),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
        ("data=4,data=2", "axis 'data' is given twice"),
        ("dta=8", "unknown axis 'dta'; did you mean 'data'"),
        ("data:8", "cannot read 'data:8'; write axis=size pairs such as"),
        ("data=8,", "cannot read ''"),
        ("", "cannot read ''"),
        ("data=four", "cannot read 'data=four'"),
        ("data=0", "data=0 is no size"),
        ("data=-2", "cannot read 'data=-2'"),
    ],
)
def test_a_wrong_string_says_what_is_wrong(text, message):
    with pytest.raises(ConfigError) as error:
        mesh(text)
    assert message in str(error.value)


@pytest.mark.parametrize("size", [0, -3, 2.0, True, "8", None])
def test_a_wrong_keyword_size(size):
    with pytest.raises(ConfigError, match="is no size"):
        mesh(data=size)


def test_a_string_and_keywords_together_are_refused():
    with pytest.raises(ConfigError, match="not both"):
        mesh("data=4", fsdp=2)


def test_no_devices():
    with pytest.raises(ConfigError, match="devices is empty"):
        mesh("data=-1", devices=[])


@pytest.mark.parametrize("devices", [8, "cpu", [0, 1, 2, 3], [[0, 1], [2, 3]]])
def test_what_are_no_devices(devices):
    with pytest.raises(ConfigError, match=r"are no devices; give a list such as jax.devices\(\)\[:4\]"):
        mesh("data=-1", devices=devices)


def test_a_device_twice():
    first, second = jax.devices()[:2]
    with pytest.raises(ConfigError, match="more than once; give each device once"):
        mesh("data=3", devices=[first, second, first])


def test_devices_as_an_array_or_one_alone():
    devices = jax.devices()
    assert mesh("data=4,fsdp=2", devices=np.array(devices).reshape(4, 2)) == mesh("data=4,fsdp=2")
    assert list(mesh("data=1", devices=devices[3]).devices.flat) == devices[3:4]


@pytest.mark.parametrize("text", [8, {"data": 8}, ("data", 8), b"data=8"])
def test_what_is_no_string(text):
    with pytest.raises(ConfigError, match=r"mesh: expected a string, got .* write axis=size pairs such as"):
        mesh(text)
    with pytest.raises(ConfigError, match="mesh: expected a string, got"):
        abstract(text)


def test_sizes_may_be_numpy_integers():
    made = mesh(data=np.int64(4), fsdp=np.int32(-1))
    assert made == mesh("data=4,fsdp=2")
    assert {type(size) for size in made.shape.values()} == {int}


@pytest.mark.parametrize("count", [0, -4])
def test_an_abstract_mesh_of_no_devices(count):
    with pytest.raises(ConfigError, match=f"mesh 'data=-1': {count} devices make no mesh"):
        abstract("data=-1", count)


def test_an_explicit_mesh_becomes_automatic():
    explicit = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    assert with_auto_axes(explicit) == Mesh(explicit.devices, ("data", "fsdp"))
    assert with_auto_axes(explicit).axis_types == (AxisType.Auto,) * 2
    abstract = AbstractMesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    assert with_auto_axes(abstract).axis_types == (AxisType.Auto,) * 2


def test_an_explicit_mesh_in_the_context_is_an_error_that_says_what_to_do():
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ConfigError, match=r"give it as mesh= instead"):
        with_auto_axes(explicit)
    with jax.set_mesh(mesh("data=8")):
        assert with_auto_axes(explicit) == mesh("data=8")


def test_a_string_where_a_mesh_belongs():
    with pytest.raises(ConfigError, match=r"expected a jax.sharding.Mesh, got 'data=8'"):
        with_auto_axes("data=8")


def _slices(count, each):
    return [StandIn(i, i // each) for i in range(count * each)]


def _slice_of(devices):
    return np.vectorize(lambda d: d.slice_index)(devices)


@pytest.mark.parametrize("text", ["replica=2,fsdp=4", "data=4,tensor=2", "fsdp=4,stage=2"])
def test_across_slices_only_the_outer_axis_crosses(text):
    made = mesh(text, devices=_slices(2, 4))
    outer = next(name for name in ("replica", "data", "stage") if name in made.shape)
    half = np.split(_slice_of(made.devices), 2, axis=list(made.shape).index(outer))
    assert [set(part.flat) for part in half] == [{0}, {1}]


def test_two_axes_may_share_the_slices():
    slice_of = _slice_of(mesh("replica=2,data=4,tensor=2", devices=_slices(4, 4)).devices)
    for block in (slice_of[r, 2 * d : 2 * d + 2] for r in range(2) for d in range(2)):
        assert len(set(block.flat)) == 1
    assert len(set(slice_of.flat)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsdp=8", "the axis 'fsdp' crosses it with every layer; 'replica=2,fsdp=4' sends gradients alone over it"),
        ("tensor=8", "the axis 'tensor' crosses it with every layer; 'replica=2,tensor=4' sends"),
        ("data=1,expert=8", "the axis 'expert' crosses it with every layer; 'replica=2,expert=4' sends"),
    ],
)
def test_an_axis_that_should_not_cross_the_slices_is_a_warning_that_says_what_would(text, said):
    with pytest.warns(
        MeshWarning, match=f"mesh {text!r}: these devices are 2 slices joined by a slow .*{said}"
    ) as found:
        made = mesh(text, devices=_slices(2, 4))
    assert found[0].filename == __file__
    assert made.devices.size == 8


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ConfigError, match="the devices are of 2 slices, 2 and 4 of each; a mesh takes as many devices"):
        mesh("data=-1", devices=_slices(2, 4)[:6])


# ---- the chips of a TPU ----------------------------------------------------------------------------------------------


def factorisations(count):
    """All sizes of all `AXES` that multiply to a power of two."""
    twos, axes = count.bit_length() - 1, len(AXES)
    for cuts in itertools.combinations(range(twos + axes - 1), axes - 1):
        ends = (-1, *cuts, twos + axes - 1)
        yield tuple(2 ** (b - a - 1) for a, b in itertools.pairwise(ends))


def wrong_with(sizes, devices, slices):
    """What is wrong with the mesh of these devices, or None."""
    given = {name: size for name, size in zip(AXES, sizes, strict=True) if size > 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = mesh(devices=devices, **given)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if dict(made.shape) != {name: size for name, size in zip(AXES, sizes, strict=True) if size > 1}:
        return f"shape {dict(made.shape)}"
    if {d.id for d in made.devices.flat} != {d.id for d in devices}:
        return "a device is missing"
    crossing = math.prod(given.get(name, 1) for name in ("replica", "data", "stage")) % slices
    if bool(crossing) != bool(caught):
        return f"crosses slices: {crossing}, said: {[str(one.message) for one in caught]}"
    last = list(made.shape)[-1]
    for group in made.devices.reshape(-1, made.shape[last]):  # the last axis runs over neighbours: a box of chips
        found = {d.slice_index for d in group}
        places = np.array([d.coords for d in group])
        if len(found) > 1:
            if not crossing and last not in ("replica", "data", "stage"):
                return f"{last} crosses slices {found}"
        elif np.prod(np.ptp(places, axis=0) + 1) != len(group):
            return f"{last} runs over {places.tolist()}"
    return None


def check_factorisations(topology, slices, some=None):
    devices = chips(topology, slices)
    every = list(factorisations(len(devices)))
    tried = every if some is None else random.Random(f"{topology} {slices}").sample(every, some)
    wrong = {sizes: what for sizes in tried if (what := wrong_with(sizes, devices, slices))}
    print(
        f"{slices} x {topology}: {len(tried)} of {len(every)} factorisations into {len(AXES)} axes, {len(wrong)} failed"
    )
    assert not wrong, f"{len(wrong)} of {len(tried)}: {dict(list(wrong.items())[:5])}"


@pytest.mark.slow  # 306 of them
@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("topology", CHIPS)
def test_a_mesh_of_real_chips_for_factorisations_drawn(topology, slices):
    check_factorisations(topology, slices, 34)


@pytest.mark.long
@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("topology", CHIPS)
def test_a_mesh_of_real_chips_for_every_factorisation(topology, slices):
    check_factorisations(topology, slices)


@pytest.mark.parametrize(
    ("topology", "slices", "text"),
    [
        ("v5p:4x4x4", 1, "fsdp=32,tensor=2"),
        ("v5e:4x4", 2, "replica=2,fsdp=2,tensor=8"),
        ("v6e:8x8", 4, "data=4,tensor=64"),
    ],
)
def test_a_mesh_that_splits_physical_axes(topology, slices, text):
    made = mesh(text, devices=chips(topology, slices))
    for group in made.devices.reshape(-1, made.shape["tensor"]):
        places = np.array([d.coords for d in group])
        assert np.prod(np.ptp(places, axis=0) + 1) == len(group)
        assert len({d.slice_index for d in group}) == 1


def test_chips_that_are_no_box_still_make_a_mesh():
    some = chips("v5p:4x4x4", 1)[:7]
    assert list(mesh("data=7", devices=some).devices.flat) == some
