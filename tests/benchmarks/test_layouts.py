"""What each layout sends: compiled again and held against the page, and the page against what was measured."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import optax
import pytest

import sapwood as sw
from benchmarks import layouts, layouts_page
from benchmarks.layouts import LAYOUTS
from sapwood.parallel import collectives

MEASURED = json.loads(layouts.RESULTS.read_text())

# What a layout must have, over which axes (8 CPU devices), and what it may: XLA:CPU adds gradients up whole and cuts
# them after; the loss scatters the gradient of its kernel; arrays change their layout by an all-to-all.
SUMS = {("all-reduce", "data"), ("reduce-scatter", "data"), ("all-gather", "data")}
FSDP = {(kind, "fsdp") for kind in ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")}
MUST = {
    "data": {("all-reduce", "data")},
    "fsdp": {("all-gather", "fsdp")},
    "zero1": {("all-gather", "data")},
    "tensor": {("all-reduce", "tensor")},
    "fsdp+tensor": {("all-gather", "fsdp"), ("all-reduce", "tensor")},
    "sequence": {("collective-permute", "sequence")},
    "ulysses": {("all-to-all", "sequence")},
    "expert": {("all-to-all", "expert")},
    "pipeline": {("collective-permute", "stage")},
    "replica": {("all-gather", "fsdp"), ("all-reduce", "replica")},
}
MAY = {
    "data": SUMS,
    "fsdp": FSDP,
    "zero1": SUMS | {("all-to-all", "data")},
    "tensor": set(),
    "fsdp+tensor": FSDP,
    "sequence": {(kind, "sequence") for kind, _ in SUMS},
    "ulysses": {(kind, "sequence") for kind, _ in SUMS},
    "expert": {(kind, "expert") for kind, _ in SUMS},
    # over the stages alone, one bit: whether the gradients of a stack are finite
    "pipeline": {("all-reduce", "data"), ("all-reduce", "stage")} | {(kind, "data+stage") for kind, _ in SUMS},
    "replica": FSDP | {("all-gather", "replica"), ("collective-permute", "replica+fsdp")}
    | {(kind, "replica+fsdp") for kind, _ in SUMS},
}  # fmt: skip
COMPOSED = ("data", "fsdp+tensor", "replica")  # of collectives that other layouts have, too


def kinds(rows):
    return {(row["kind"], "+".join(row["axes"])) for row in rows}


def axes_in_order(pair):
    return pair[0], "+".join(sorted(pair[1].split("+")))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_measured_is_what_a_layout_should_have_and_no_others(name):
    found = {axes_in_order(pair) for pair in kinds(MEASURED["cpu"]["layouts"][name]["collectives"])}
    must, may = ({axes_in_order(pair) for pair in table[name]} for table in (MUST, MAY))
    assert must <= found
    assert found <= must | may


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, "long" if name in COMPOSED else "slow")) for name in LAYOUTS]
)
def test_the_compiled_step_sends_no_more_than_was_measured(name):
    program, mesh = layouts.compiled(LAYOUTS[name], "cpu", jax.devices())
    found, measured = collectives(program, mesh), MEASURED["cpu"]["layouts"][name]["collectives"]
    assert {(kind, "+".join(axes)) for kind, axes in found.kinds} <= kinds(measured)
    assert all(one.bound == "=" for one in found)
    assert found.count <= sum(row["times"] for row in measured) * 1.1
    assert found.sent <= sum(row["sent"] for row in measured) * 1.1


def parameters():
    """Bytes of the parameters that are not small, of the dense model."""
    d, v, depth = (layouts.SIZES["cpu"][name] for name in ("width", "vocabulary", "depth"))
    return 4 * (2 * v * d + depth * (4 * d * d + 3 * 4 * d * d))


def test_bytes_are_those_of_the_theory():
    """Sums of gradients send twice their bytes; FSDP gathers twice, forward and backward, and adds up once."""
    sent = {name: sum(row["sent"] for row in one["collectives"]) for name, one in MEASURED["cpu"]["layouts"].items()}
    most = parameters() * 7 / 8
    assert sent["data"] <= 2 * most * 1.15
    assert sent["fsdp"] <= 4 * most * 1.15  # on a CPU gradients are added up whole
    assert sent["zero1"] <= 3 * most * 1.15
    rows, length = layouts.BATCH["cpu"]
    activation = 4 * rows * length * layouts.SIZES["cpu"]["width"] * 7 / 8
    # Forward two sums a block, backward two of what its three projections and its two wide layers give: a TPU adds
    # these up before it sends them, a CPU after. And two at the ends.
    assert sent["tensor"] <= 2 * activation * (7 * layouts.SIZES["cpu"]["depth"] + 2) * 1.05
    assert sent["ulysses"] < sent["sequence"]


def test_the_page_and_its_pictures_are_what_was_measured(root):
    docs = root / "docs"
    page = (docs / "parallelism.md").read_text(encoding="utf-8")
    assert page == layouts_page.filled(page, MEASURED)
    assert " ".join(layouts_page.models().split()) in " ".join(page.split())
    for name in LAYOUTS:
        assert (docs / f"layout-{name}.svg").read_text(encoding="utf-8") == layouts_page.picture(name)
        assert f"(layout-{name}.svg)" in page


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="the page has no line <!-- measured: data -->"):
        layouts_page.filled("# Every layout\n", MEASURED)


def test_bytes_read_well():
    assert [layouts_page.size(n) for n in (12, 2048, 3 * 2**20, 5 * 2**30)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_the_trainers_of_the_page_are_those_of_the_layouts(root):
    page = (root / "docs" / "parallelism.md").read_text(encoding="utf-8")
    trainers = re.findall(r"```python\n(sw\.Trainer\(.*)\n```", page)
    words = re.findall(r"^`--mesh (\S+?)(?: --rules (\S+))?` on the command line", page, re.MULTILINE)
    assert len(trainers) == len(words) == len(LAYOUTS)
    given = {"sw": sw, "objective": sw.supervised(sw.layers.Dense(1)), "optimizer": optax.sgd(0.1)}
    for code, (mesh, rules), one in zip(trainers, words, LAYOUTS.values(), strict=True):
        trainer = eval(code, dict(given))
        assert trainer.mesh == sw.mesh(mesh) == sw.mesh(one.cpu)
        assert (trainer.rules or "") == rules
        assert rules in ("", one.rules)


@pytest.mark.slow
def test_the_first_example_of_the_page_runs(root, tmp_path):
    page = (root / "docs" / "parallelism.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(import .*?)```", page, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all-gather" in done.stdout
    assert "devices holds" in done.stdout


# ---- on a TPU --------------------------------------------------------------------------------------------------------

# There a gather may be a chain of permutations beside the products that it feeds, and a sum of which each device keeps
# a part such a chain, too. The loss scatters the gradient of the head, and the optimizer gathers it.
TPU_MUST = {
    **MUST,
    "fsdp": {("collective-permute", "fsdp")},
    "zero1": {("all-gather", "data"), ("collective-permute", "data")},
    "fsdp+tensor": {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "tensor")},
    "expert": {("ragged-all-to-all", "expert")},
    "replica": {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "replica")},
}
TPU_MAY = {
    **MAY,
    "zero1": MAY["zero1"] | {("collective-permute", "data")},
    "fsdp+tensor": {("all-reduce", "fsdp"), ("collective-permute", "fsdp")},
    "expert": MAY["expert"] | {("all-to-all", "expert")},  # the numbers of rows
}


def check_tpu(name, rows):
    """The collectives of a layout and no others; permutations and ragged exchanges beside other work."""
    found = {axes_in_order(pair) for pair in kinds(rows)}
    must, may = ({axes_in_order(pair) for pair in table[name]} for table in (TPU_MUST, TPU_MAY))
    assert must <= found, name
    # One number may be summed over any axes: whether the gradients of all devices are finite.
    large = {axes_in_order(pair) for pair in kinds(row for row in rows if row["sent"] > 1024)}
    assert large <= must | may, name
    for row in rows:
        assert row["bound"] == "="
        if row["kind"] in ("collective-permute", "ragged-all-to-all"):
            assert row["asynchronous"] == row["times"], name
    if name in ("fsdp", "zero1", "fsdp+tensor"):  # of all gradients only those of the vocabulary are added up whole
        sizes, axis = layouts.SIZES["tpu"], "data" if name == "zero1" else "fsdp"
        tables = 2 * sizes["vocabulary"] * sizes["width"] * 2  # bytes of both in bfloat16
        whole = sum(row["sent"] for row in rows if row["kind"] == "all-reduce" and row["axes"] == [axis])
        assert whole < 2 * tables, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_measured_of_a_tpu_is_what_a_layout_should_have_and_no_others(name):
    rows = MEASURED["tpu"]["layouts"][name]["collectives"]
    check_tpu(name, rows)
    if name in ("fsdp+tensor", "replica"):
        gathers = next(row for row in rows if row["kind"] == "all-gather" and row["axes"] == ["fsdp"])
        assert gathers["asynchronous"] > gathers["times"] / 2


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
@pytest.mark.fresh_compile
@pytest.mark.parametrize(
    ("topology", "names"),
    [
        ("v5e:4x4", ["fsdp+tensor"]),  # rings, experts and pipelines have tests of their own on a TPU, in tests/layers
        pytest.param("v5e:4x4", list(LAYOUTS), marks=pytest.mark.long),
        # libtpu 0.0.52 compiles the experts for v5p, too, but cannot print the program.
        pytest.param("v5p:2x2x4", [name for name in LAYOUTS if name != "expert"], marks=pytest.mark.long),
    ],
    ids=["v5e", "v5e-all", "v5p-all"],
)
def test_on_a_tpu_layouts_have_their_collectives_and_overlap_them(topology, names):
    found = layouts.child("tpu", names, topology)["layouts"]
    assert list(found) == names
    for name, one in found.items():
        check_tpu(name, one["collectives"])
