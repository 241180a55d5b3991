"""The rule table: order, one use per array, fallbacks, and the message each mistake gets."""

import dataclasses
import itertools
import math
import random
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from sapwood.core.errors import ConfigError
from sapwood.parallel.rule_tables import DEFAULT, STRATEGIES, TABLES, resolve, table, unknown
from sapwood.parallel.rules import Rules, UnusedAxis, assign, assign_beside, assign_largest


def on(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        # parameters
        (("embed", "mlp"), (512, 2048), {"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
        (("mlp", "embed"), (2048, 512), {"fsdp": 4, "tensor": 2}, ("tensor", "fsdp")),
        (("embed", "mlp"), (512, 2048), {"fsdp": 8}, ("fsdp", None)),
        (("embed", "mlp"), (512, 2048), {"data": 8}, (None, None)),
        (("embed", "mlp"), (511, 2048), {"fsdp": 8}, (None, "fsdp")),  # the fallback row of mlp
        (
            ("layers", "embed", "heads", "kv"),
            (8, 64, 4, 16),
            {"fsdp": 2, "tensor": 4},
            (None, "fsdp", "tensor", None),
        ),
        (("vocab", "embed"), (1000, 64), {"fsdp": 2, "tensor": 4}, ("tensor", "fsdp")),
        (
            ("height", "width", "channels_in", "channels_out"),
            (8, 8, 64, 128),
            {"fsdp": 8},
            (None, None, "fsdp", None),
        ),
        (
            ("height", "width", "channels_in", "channels_out"),
            (8, 8, 3, 128),
            {"fsdp": 8},
            (None, None, None, "fsdp"),
        ),
        (("expert", "embed", "mlp"), (8, 64, 128), {"expert": 4, "fsdp": 2}, ("expert", "fsdp", None)),
        # activations
        (
            ("batch", "length", "embed"),
            (16, 128, 512),
            {"data": 2, "fsdp": 4},
            (("data", "fsdp"), None, None),
        ),
        (
            ("batch", "length", "embed"),
            (16, 128, 512),
            {"data": 2, "sequence": 4},
            ("data", "sequence", None),
        ),
        (
            ("batch", "length", "heads", "kv"),
            (16, 9, 8, 4),
            {"data": 2, "tensor": 4},
            ("data", None, "tensor", None),
        ),
        (("expert", "batch", "embed"), (8, 16, 4), {"expert": 4, "data": 2}, ("expert", "data", None)),
        ((None, None), (8, 8), {"data": 8}, (None, None)),
        ((), (), {"data": 8}, ()),
    ],
)
def test_the_default_table(axes, shape, sizes, expected):
    lay = DEFAULT.activation if "batch" in axes else DEFAULT.parameter
    assert tuple(lay(axes, shape, on(**sizes))) == expected


def test_what_is_stored_in_pieces_never_shards_an_activation():
    mesh = on(fsdp=4, tensor=2)
    assert tuple(DEFAULT.activation(("length", "embed"), (8, 512), mesh)) == (None, None)
    assert tuple(DEFAULT.activation(("batch", "embed"), (3, 512), mesh)) == (None, None)
    assert tuple(DEFAULT.activation(("batch", "mlp"), (8, 512), mesh)) == ("fsdp", "tensor")


def test_rows_are_tried_from_the_top_not_dimensions_from_the_left():
    rules = Rules((("b", "fsdp"), ("a", "fsdp")))
    assert tuple(rules.activation(("a", "b"), (8, 8), on(fsdp=4))) == (None, "fsdp")
    assert tuple(rules.activation(("a", "b"), (8, 7), on(fsdp=4))) == ("fsdp", None)


def test_a_name_that_stands_twice_takes_a_mesh_axis_once_and_then_its_next_row():
    rules = Rules((("embed", "tensor"), ("embed", "fsdp")))
    assert tuple(rules.activation(("embed", "embed"), (8, 8), on(fsdp=2, tensor=2))) == ("tensor", "fsdp")
    assert tuple(rules.activation(("embed", "embed"), (8, 8), on(tensor=2))) == ("tensor", None)


def test_none_ends_the_search():
    rules = Rules((("embed", None), ("embed", "fsdp")))
    assert tuple(rules.activation(("embed",), (8,), on(fsdp=2))) == (None,)


def test_of_several_mesh_axes_as_many_from_the_left_as_divide():
    rules = Rules((("batch", ("data", "fsdp")),))
    assert tuple(rules.activation(("batch",), (8,), on(data=4, fsdp=2))) == (("data", "fsdp"),)
    assert tuple(rules.activation(("batch",), (4,), on(data=4, fsdp=2))) == ("data",)
    assert tuple(rules.activation(("batch",), (2,), on(data=4, fsdp=2))) == (None,)


def test_what_was_lost_is_what_stays_unused():
    sizes = {"fsdp": 8, "tensor": 3}
    assert assign(DEFAULT.rows, ("embed", "mlp"), (100, 300), sizes)[1] == [UnusedAxis(0, "fsdp", 8)]
    assert assign(DEFAULT.rows, ("embed", "mlp"), (100, 304), sizes)[1] == [UnusedAxis(1, "tensor", 3)]
    assert assign(DEFAULT.rows, ("embed",), (1,), sizes)[1] == []  # nobody expects a broadcast dimension to split


def test_random_tables_never_use_an_axis_twice_and_always_divide():
    rng = random.Random(0)
    names, mesh_axes = ["a", "b", "c", None], ["data", "fsdp", "tensor"]
    for _ in range(500):
        targets = [None, *mesh_axes, ("data", "fsdp"), ("tensor", "data", "fsdp")]
        table = [(rng.choice(names[:3]), rng.choice(targets)) for _ in range(rng.randint(0, 6))]
        axes = rng.choices(names, k=rng.randint(0, 4))
        shape = rng.choices([1, 2, 3, 4, 6, 8, 12], k=len(axes))
        sizes = {name: rng.choice([1, 2, 3, 4]) for name in mesh_axes}
        placed, missed = assign(table, axes, shape, sizes)
        used = list(itertools.chain(*placed))
        assert len(used) == len(set(used))
        assert not {m.mesh_axis for m in missed} & set(used)
        for axis, size, split in zip(axes, shape, placed, strict=True):
            assert size % math.prod(sizes[a] for a in split) == 0
            assert not split or axis is not None
            assert 1 not in {sizes[a] for a in split}


def test_the_largest_dimension_that_divides():
    placed = [(), (), ()]
    assert assign_largest("fsdp", placed, (24, 100, 48), {"fsdp": 8}, skip=0) == []
    assert placed == [(), (), ("fsdp",)]
    placed = [(), ()]
    assert assign_largest("fsdp", placed, (7, 9), {"fsdp": 8}, skip=0) == [UnusedAxis(None, "fsdp", 8)]
    placed = [(), ()]
    assert assign_largest("fsdp", placed, (64, 16), {"fsdp": 8}, skip=1) == []
    assert placed == [(), ("fsdp",)]
    for axis, sizes in ((None, {"fsdp": 8}), ("fsdp", {"data": 8}), ("fsdp", {"fsdp": 1})):
        assert assign_largest(axis, [()], (7,), sizes, skip=0) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", {"kernel": ("fsdp", "tensor"), "x": (("data", "fsdp"), None, None)}),
        ("data", {"kernel": (None, None), "x": (("data", "fsdp"), None, None)}),
        ("tensor", {"kernel": (None, "tensor"), "x": (("data", "fsdp"), None, None)}),
    ],
)
def test_changing_the_strategy_is_changing_the_table(name, expected):
    mesh = on(data=2, fsdp=2, tensor=2)
    rules = TABLES[name]
    assert tuple(rules.parameter(("embed", "mlp"), (512, 2048), mesh)) == expected["kernel"]
    assert tuple(rules.activation(("batch", "length", "embed"), (4, 8, 512), mesh)) == expected["x"]


def test_the_fsdp_table_splits_nothing_but_storage_and_batch():
    assert tuple(TABLES["fsdp"].parameter(("embed", "mlp"), (512, 2048), on(fsdp=8))) == ("fsdp", None)
    with pytest.raises(ConfigError, match="no rule uses axis 'tensor', so its 2 devices would all do the same work"):
        resolve(on(fsdp=4, tensor=2), "fsdp")


def test_rules_compare_by_value_and_are_hashable():
    assert Rules([["a", ["data", "fsdp"]]]) == Rules((("a", ("data", "fsdp")),))
    assert len({DEFAULT, Rules(DEFAULT.table, DEFAULT.stored)}) == 1


@pytest.mark.parametrize("row", ["batch", ("batch",), ("batch", 3), (None, "data"), ("batch", ("data", 1))])
def test_a_row_that_is_none(row):
    with pytest.raises(ConfigError, match=r"is no row; expected \(logical axis, mesh axis"):
        Rules((row,))
    with pytest.raises(ConfigError, match=r"Rules.stored"):
        Rules((), (row,))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("table", None, "a tuple of rows"),
        ("table", {"embed": "fsdp"}, "a tuple of rows"),
        ("stored", "embed", "a tuple of rows"),
        ("unannotated", ("fsdp",), "a mesh axis such as"),  # would shard nothing without a word
        ("unannotated", 3, "a mesh axis such as"),
        ("min_size", None, "a number of elements"),
        ("beside", 3, "a tuple of mesh axes"),
        ("beside", ("data", 1), "a tuple of mesh axes"),
        ("pipeline", "1f1b", r"a Pipeline, such as Pipeline\(schedule="),
        ("pipeline", None, "a Pipeline"),
        ("strict", "no", "True or False"),
    ],
)
def test_a_field_that_cannot_be(field, value, expected):
    with pytest.raises(ConfigError, match=rf"Rules.*{field}.*: expected {expected}"):
        dataclasses.replace(DEFAULT, **{field: value})


def test_resolve_names_what_does_not_fit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert resolve(mesh, None) == (mesh, DEFAULT)
    assert resolve(mesh, "data") == (mesh, TABLES["data"])
    with pytest.raises(ConfigError, match="no such table; did you mean 'fsdp'"):
        resolve(mesh, "fdsp")
    with pytest.raises(
        ConfigError, match=r"expected Rules or one of default, data, .* joined by \+, such as fsdp\+tensor; got dict"
    ):
        resolve(mesh, {})
    with pytest.raises(ConfigError, match="there is no mesh axis 'dta'; did you mean 'data'"):
        resolve(mesh, Rules((("batch", "dta"),)))


def test_a_mesh_with_axes_of_its_own_needs_rules_that_name_them():
    mesh = on(x=4, y=2)
    with pytest.raises(ConfigError, match="no rule uses axis 'x', so its 4 devices would all do the same work"):
        resolve(mesh, None)
    rules = Rules((("batch", "x"), ("mlp", "y")), unannotated=None)
    assert resolve(mesh, rules) == (mesh, rules)
    assert rules.activation(("batch", "mlp"), (8, 8), mesh) == PartitionSpec("x", "y")


def test_a_slip_of_the_pen_in_an_axis_name_is_noticed():
    assert list(unknown(DEFAULT, ("embd", None, "mlp"))) == [
        "no rule knows the logical axis 'embd'; did you mean 'embed'?: left whole"
    ]
    assert list(unknown(Rules((("embd", None),)), ("embd", "embed"))) == []


def test_every_axis_name_that_layers_and_models_use_is_in_the_default_table(root):
    sources = [path.read_text() for room in ("layers", "models") for path in (root / room).rglob("*.py")]
    tuples = itertools.chain(*(re.findall(r"\baxes\b[^=\n]*=\s*\(([^()]*)\)", text) for text in sources))
    names = set(re.findall(r'"([a-z_]+)"', " ".join(tuples)))
    assert {"embed", "heads"} <= names
    assert list(unknown(DEFAULT, sorted(names))) == []


# ---- named tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_every_table_splits_the_batch_over_all_axes_of_data(name):
    mesh = on(replica=2, data=2, fsdp=2, expert=2, tensor=2, sequence=2)
    expected = ("replica", "data", "fsdp", "expert")
    assert tuple(TABLES[name].activation(("batch",), (64,), mesh)) == (expected,)


def test_names_joined_by_plus_are_one_table_in_any_order():
    for size in (2, 3):
        for names in itertools.combinations(STRATEGIES, size):
            tables = {table("+".join(order)) for order in itertools.permutations(names)}
            assert len(tables) == 1
            (rules,) = tables
            assert set(rules.stored) == {row for name in names for row in STRATEGIES[name].stored}
            known = [name for name, target in rules.table if target is not None]
            assert len(known) == len(set(known))
    mesh = on(data=2, fsdp=2, tensor=2, sequence=2)
    rules = table("fsdp + tensor+ulysses")
    assert tuple(rules.parameter(("embed", "mlp"), (8, 8), mesh)) == ("fsdp", "tensor")
    assert tuple(rules.activation(("length", "attention_heads"), (8, 8), mesh)) == (None, ("tensor", "sequence"))
    assert table("fsdp+tensor+sequence+expert+pipeline") == DEFAULT


@pytest.mark.parametrize(
    ("sizes", "rules", "message"),
    [
        ({"data": 8}, "fsdp+tesnor", "no such table 'tesnor'; did you mean 'tensor'?; there are default, data"),
        (
            {"data": 8},
            "fsdp",
            "'fsdp' splits over the mesh axis 'fsdp', which mesh data=8 has not; a mesh such as fsdp=8",
        ),
        ({"data": 4, "tensor": 2}, "data", "use rules 'data.tensor', or mesh data=8"),
        (
            {"fsdp": 4, "sequence": 2},
            "zero1",
            "no rule uses axis 'sequence', so its 2 devices .* 'zero1.sequence', or mesh data=2,fsdp=4",
        ),
        (
            {"data": 8},
            Rules((("mlp", "tnsor"),)),
            r"no mesh axis 'tnsor'; did you mean 'tensor'.*\(row \('mlp', 'tnsor'\)\)",
        ),
    ],
)
def test_a_table_that_does_not_fit_says_what_would(sizes, rules, message):
    with pytest.raises(ConfigError, match=message.replace("?;", r"\?;")):
        resolve(on(**sizes), rules)


def test_a_mesh_axis_twice_for_one_dimension():
    message = r"row \('mlp', \('tensor', 'tensor'\)\) asks for mesh axis 'tensor' twice; once is enough: 'tensor'"
    with pytest.raises(ConfigError, match=message):
        Rules((("mlp", ("tensor", "tensor")),))
    with pytest.raises(ConfigError, match=r"Rules.beside asks for mesh axis 'data' twice"):
        Rules((), beside=("data", "fsdp", "data"))


def test_what_lies_beside_goes_to_one_dimension_by_the_fast_links_first():
    sizes = {"replica": 3, "data": 4, "tensor": 2}
    axes = ("replica", "data", "fsdp")
    for shape, before, after, missed in (
        ((24, 12), [(), ()], [("replica", "data"), ()], []),
        ((8, 4), [(), ()], [("data",), ()], [UnusedAxis(None, "replica", 3)]),
        ((48, 5), [("tensor",), ()], [("tensor", "replica", "data"), ()], []),
        ((5, 7), [(), ()], [(), ()], [UnusedAxis(None, "replica", 3), UnusedAxis(None, "data", 4)]),
    ):
        assert assign_beside(axes, before, shape, sizes, 0) == missed
        assert before == after
