"""`sw.inspection.profile`: real traces of small steps on the CPU, held against what is known of the steps.

What ran, how often and in what is the trace's. How long it took is not, for another process may stop a step anywhere:
each operation is said to have taken what it has to compute (`by_work`).
"""

import dataclasses
import math
import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.errors import ConfigError
from sapwood.inspection import Profile, profile
from sapwood.inspection.profiles import device_trace, measure
from sapwood.inspection.profiles.attribution import OBJECTIVE, OPTIMIZER, Program
from sapwood.runtime.compile_cache import compile_cache
from sapwood.train import Trainer, supervised

INSTRUCTION = re.compile(r"^ *(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\(([^)]*)\)(.*)$")
NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


def dimensions(shape):
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def work(text):
    """What each operation of a compiled program has to compute: products for a matrix product, else its elements."""
    found = {}
    for part in re.split(r"\n(?=%|ENTRY)", text):
        body = [m.groups() for m in map(INSTRUCTION.match, part.splitlines()) if m]
        shapes = {name: shape for name, shape, *_ in body}
        total = 0
        for name, shape, what, operands, rest in body:
            size = 0 if what in NOTHING else math.prod(dimensions(shape))
            if what == "dot":
                left = dimensions(shapes[operands.split(",")[0].split()[-1].lstrip("%")])
                contracted = re.search(r"lhs_contracting_dims={([\d,]*)}", rest)[1].split(",")
                size *= math.prod(left[int(n)] for n in contracted)
            elif what == "fusion":
                size = found[re.search(r"calls=%([^\s,]+)", rest)[1]]
            found[name] = size
            total += size
        found[part.split()[0].lstrip("%")] = total
    return found


def one_after_the_other(trace, sizes):
    """The same operations in their order, each as long as its work, in ns."""
    devices, end = {}, 1.0
    for device, spans in trace.devices.items():
        now, devices[device] = 0.0, []
        for span in sorted(spans):
            begin, now = now, now + (0 if span.name is None else sizes[span.name])
            devices[device].append(span._replace(start=begin, end=now))
        end = max(end, now)
    return device_trace.Trace(devices, (0.0, end), [])


@pytest.fixture(autouse=True, scope="module")
def by_work():
    """Profiles in which time is work."""
    read, texts = device_trace.read, []

    def kept(text, calls):
        texts.append(text)
        return Program(text, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "Program", kept)
        patch.setattr(device_trace, "read", lambda file, name: one_after_the_other(read(file, name), work(texts[-1])))
        yield read


def batch(rows: int = 32, width: int = 64, classes: int = 10):
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(rows, width)).astype("float32"), "label": random.integers(0, classes, rows)}


def trainer(model, **options):
    return Trainer(supervised(model, inputs="x"), optax.adam(1e-3), **options)


def uneven(v, x):
    """Three layers of equal width, of which the second multiplies ten times as much as each of the others."""
    x = jax.nn.relu(L.Dense(256, bias=False)(v.before, x))
    x = jax.nn.relu(L.Dense(2560, bias=False)(v.heavy, x))
    return L.Dense(256, bias=False)(v.after, x[:, :256])


@sw.layer
def block(v, x):
    h = jax.nn.gelu(L.Dense(128)(v.up, L.RMSNorm()(v.norm, x)))
    return x + L.Dense(64)(v.down, h)


def scanned(v, x):
    return L.Dense(10)(v.head, L.Scan(block, 6)(v.blocks, x))


@pytest.fixture(scope="module")
def mlp() -> Profile:
    def model(v, x):
        return L.Dense(10)(v.logits, jax.nn.relu(L.Dense(256)(v.hidden, x)))

    return profile(trainer(model), batch(256), steps=5)


@pytest.fixture(scope="module")
def scan() -> Profile:
    return profile(trainer(scanned), batch(), steps=5)


def tops(found: Profile):
    return [row for row in found.rows if len(row.path) == 1]


@pytest.mark.costs("the profiles that most tests look at are taken here")
@pytest.mark.parametrize("which", ["mlp", "scan"])
def test_rows_add_up_to_the_time_of_a_step(which, request):
    found = request.getfixturevalue(which)
    assert sum(row.seconds for row in tops(found)) == pytest.approx(found.seconds, rel=1e-6)
    for row in found.rows:
        below = [r.seconds for r in found.rows if r.path[:-1] == row.path]
        assert row.own + sum(below) == pytest.approx(row.seconds, rel=1e-6)
        assert sum(row.kinds.values()) == pytest.approx(row.seconds, rel=1e-6)
        assert row.forward + row.backward <= row.seconds * (1 + 1e-6)


def test_the_clock_says_the_same(monkeypatch, by_work):
    """The window that the trace saw lies within what `time.perf_counter` measured around the same steps, and around
    what it measured from the first of them being fed to the last being done."""
    measured, inner, run, ready = [], [], measure._Loop.run, jax.block_until_ready

    def watched(self, steps):
        following, times = self.following, []
        self.following = lambda: (times.append(time.perf_counter()), following())[1]
        with monkeypatch.context() as patch:
            patch.setattr(jax, "block_until_ready", lambda x: (ready(x), times.append(time.perf_counter()))[0])
            measured.append(run(self, steps))
        fed = times[1]  # the state was waited for before
        inner.append(times[-1] - fed)
        self.following = following
        return measured[-1]

    monkeypatch.setattr(measure._Loop, "run", watched)
    monkeypatch.setattr(device_trace, "read", by_work)
    found = profile(trainer(uneven), batch(), steps=4)
    assert 0.999 * inner[-1] <= 4 * found.seconds <= 1.001 * measured[-1]
    assert found.untraced == measured[-2] / 4
    assert sum(row.seconds for row in tops(found)) == pytest.approx(found.seconds, rel=1e-6)


def test_the_heavy_layer_is_on_top():
    found = profile(trainer(uneven), batch(256, 256), steps=5)
    layers = [row for row in tops(found) if row.layer]
    assert layers[0].path == ("heavy",)
    busy = sum(row.seconds for row in tops(found) if row.layer)
    assert 0.5 < layers[0].seconds / busy < 0.97  # 30 of 35 products, by its size
    assert layers[0].backward > layers[0].forward > 0  # two products against one
    assert next(iter(layers[0].kinds)) == "matmul"


def test_every_layer_has_its_row(mlp, scan):
    assert {row.path for row in mlp.rows if row.layer} == {("hidden",), ("logits",)}
    assert mlp.row("(optimizer)").seconds > 0
    names = {"/".join(row.path) for row in scan.rows if row.layer}
    assert names == {"head", "blocks", "blocks/up", "blocks/down", "blocks/norm"}
    assert mlp.unattributed < 0.05
    assert scan.unattributed < 0.05


def test_a_loop_is_its_operations(scan):
    """The body runs six times a step: its products, forward and backward, are counted each time."""
    up, head = scan.row("blocks/up"), scan.row("head")
    assert up.kinds["matmul"] > 3 * head.kinds["matmul"]  # 6 x 128 against 10 outputs of 64 inputs
    assert up.forward > 0
    assert up.backward > 0


def test_a_data_set_is_read_as_it_is_trained_on():
    data = sw.data.load({"x": batch(64)["x"], "label": batch(64)["label"]})
    found = profile(trainer(lambda v, x: L.Dense(10)(v.only, x)), data, steps=2, batch_size=16)
    assert found.row("only").seconds > 0
    assert found.steps == 2


@pytest.mark.costs("a scanned stack and its gradient are compiled for two devices")
def test_several_devices_are_averaged():
    found = profile(trainer(scanned, mesh=sw.mesh(data=2, devices=jax.devices()[:2])), batch(), steps=2)
    assert found.devices == 2
    assert sum(row.seconds for row in tops(found)) == pytest.approx(found.seconds, rel=1e-6)
    assert any("communication" in row.kinds for row in found.rows)


@pytest.mark.costs("two programs are compiled anew")
@pytest.mark.fresh_compile
def test_names_are_those_of_this_model_whatever_the_cache_holds(tmp_path):
    """The same operations under another name are the same entry of JAX's persistent cache."""

    gram = sw.layer(lambda v, x: x @ (x.T @ x))

    def names(layer):
        found = profile(trainer(lambda v, x: L.Dense(10)(v.head, gram(v[layer], x))), batch(), steps=1)
        return {row.path for row in found.rows if row.layer and row.path != ("head",)}

    with compile_cache(tmp_path):
        assert names("one") == {("one",)}
        assert names("two") == {("two",)}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [({}, {"steps": 0}, "steps=0"), ({"jit": False}, {}, "jit=False"), ({"accumulate": 5}, {}, "accumulate=5")],
)
def test_what_cannot_be_profiled(change, options, said):
    with pytest.raises(ConfigError, match=said):
        profile(trainer(scanned, **change), batch(), **options)


def test_layers_of_any_name():
    called = ["größe 層", 'the "wide" one', "layer's", "back\\slash"]

    def model(v, x):
        for name in called:
            x = jnp.tanh(L.Dense(64)(v[name], x))
        return L.Dense(10)(v.head, x)

    found = profile(trainer(model), batch(), steps=1)
    assert {row.path for row in found.rows if row.layer} == {("head",), *((name,) for name in called)}
    assert all(found.row(name).backward > 0 for name in called)


@pytest.mark.parametrize("given", [{}, {"x": [[1.0, 2.0]]}, {"x": np.float32(1)}])
def test_what_is_no_batch(given):
    with pytest.raises(ConfigError, match="one batch is a dict of arrays with the examples along their first dim"):
        profile(trainer(scanned), given)


def test_steps_as_a_float_and_levels_that_no_table_has():
    found = profile(trainer(lambda v, x: L.Dense(10)(v.head, x)), batch(), steps=2.0)
    assert found.steps == 2
    with pytest.raises(ConfigError, match="at least 1 level"):
        found.table(0)


def test_another_profile_under_way(tmp_path):
    jax.profiler.start_trace(str(tmp_path))
    try:
        with pytest.raises(ConfigError, match="profiler of JAX cannot start"):
            profile(trainer(lambda v, x: L.Dense(10)(v.head, x)), batch(), steps=1)
    finally:
        jax.profiler.stop_trace()


# ---- the pieces -----------------------------------------------------------------------------------------------------

HLO = """HloModule jit_train_step, is_scheduled=true

%fused (p0: f32[8,8], p1: f32[8,8]) -> f32[8,8] {
  %p0 = f32[8,8]{1,0} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  %product = f32[8,8]{1,0} dot(%p0, %p1), metadata={op_name="jit(train_step)/transpose(jvp(a/0/up))/dot_general"}
  ROOT %sum = f32[8,8]{1,0} add(%product, %p1), metadata={op_name="jit(train_step)/optimizer/add"}
}

%body (c: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %c = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%c), index=1
  %inner = f32[8,8]{1,0} tanh(%x), metadata={op_name="jit(train_step)/jvp(s)/while/body/closed_call/norm/tanh"}
  %moved = f32[8,8]{0,1} copy(%inner)
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%c, %moved)
}

ENTRY %main (w: f32[8,8], y: f32[8,8]) -> f32[8,8] {
  %w = f32[8,8]{1,0} parameter(0), metadata={op_name="args[0].params[\\'a\\'][\\'0\\'][\\'up\\'][\\'kernel\\']"}
  %y = f32[8,8]{1,0} parameter(1), metadata={op_name="args[1][\\'x\\']"}
  %loop = (s32[], /*index=1*/f32[8,8]{1,0}) while(%y), condition=%cond, body=%body, metadata={op_name="jit(train_step)/jvp(s)/while"}
  %relu = f32[8,8]{1,0} maximum(%y, %y), metadata={op_name="jit(train_step)/jvp()/jit(up)/max"}
  %both = f32[8,8]{1,0} fusion(%y, %w), kind=kOutput, calls=%fused, metadata={op_name="jit(train_step)/optimizer/add"}
  %nameless = f32[8,8]{1,0} dot(%y, %y)
  %layout = f32[8,8]{0,1} copy(%nameless)
  %step = f32[8,8]{1,0} add(%layout, %w), metadata={op_name="jit(train_step)/optimizer/add"}
  %again = f32[8,8]{1,0} dot(%y, %y), metadata={op_name="jit(train_step)/transpose(jvp(a/0))/checkpoint/rematted_computation/up/dot_general"}
  ROOT %lost = f32[8,8]{1,0} copy(%y)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "path", "direction", "kind"),
    [
        ("both", ("a", "0", "up"), "backward", "matmul"),  # not the optimizer, whose addition is its root
        ("inner", ("s", "norm"), "forward", "elementwise"),
        ("moved", ("s",), "forward", "copy"),  # nameless in a loop
        ("loop", ("s",), "forward", "loop"),
        ("relu", (OBJECTIVE,), "forward", "elementwise"),  # a jitted function is no layer, whatever its name
        ("nameless", ("a", "0", "up"), "backward", "matmul"),  # the gradient of a kernel, by who reads it
        ("layout", (OPTIMIZER,), "update", "copy"),
        ("again", ("a", "0", "up"), "backward", "matmul"),  # what remat computes again is the backward pass's
        ("lost", ("(not attributed)",), "", "copy"),
        ("unheard of", ("(not attributed)",), "", "other"),
    ],
)
def test_attribution(name, path, direction, kind):
    place = Program(HLO, [("a", "0", "up"), ("s", "norm")]).place(name)
    assert (place.path, place.direction, place.kind) == (path, direction, kind)
    assert place.mixed == (name == "both")
    assert place.container == (name == "loop")


def test_an_operation_of_many_paths_in_a_name():
    program = Program(HLO, [("a", "0", "up")])
    assert program.label("reduce_sum") is None
    assert program.label("jit(train_step)/jvp(a/0)/vmap(up)/mul;jit(train_step)") == (("a", "0", "up"), "forward")
    assert program.label("jit(train_step)/jvp(optimizer)/mul") == ((OBJECTIVE,), "forward")


def traced(name, start, end, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=list(stats.items()))


def test_what_is_read_of_a_trace(monkeypatch, by_work):
    """When operations began and ended: one that goes on in other threads ends where its "end:" does."""
    ours = {"hlo_module": "jit_train_step", "run_id": 7}
    host = {
        "python": [
            traced("sapwood.steps", 10.0, 900.0),
            traced("sapwood.feed", 20.0, 30.0),
            traced("ThunkExecutor::Execute", 0.0, 5.0, hlo_op="none"),
        ],
        "thread": [
            traced("dot.1", 100.0, 110.0, hlo_op="dot.1", device_ordinal=0, _p=42, **ours),
            traced("end: dot.1", 290.0, 300.0, _c=42),
            traced("add.2", 300.0, 320.0, hlo_op="add.2", device_ordinal=1, _p=43, **ours),
            traced("sine", 400.0, 450.0, hlo_op="sine", hlo_module="jit_other", device_ordinal=0),
            traced("some call", 500.0, 550.0),
        ],
    }
    chip = {
        "Steps": [traced("1", 0.0, 900.0)],
        "XLA Ops": [traced("%fusion.3 = f32[8,8]{1,0} fusion(%p)", 50.0, 60.0, run_id=8)],
    }
    planes = [
        SimpleNamespace(name=name, lines=[SimpleNamespace(name=n, events=events) for n, events in lines.items()])
        for name, lines in {"/host:CPU": host, "/device:TPU:0": chip}.items()
    ]
    monkeypatch.setattr(
        jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda _: SimpleNamespace(planes=planes))
    )
    found = by_work("a.xplane.pb", "jit_train_step")
    assert (found.window, found.waits) == ((10.0, 900.0), [(20.0, 30.0)])
    assert found.devices == {
        0: [device_trace.Span(100.0, 300.0, "dot.1", 7), device_trace.Span(400.0, 450.0, None)],
        1: [device_trace.Span(300.0, 320.0, "add.2", 7)],
        "/device:TPU:0": [device_trace.Span(50.0, 60.0, "fusion.3", 8)],
    }


def test_moments_are_shared_and_gaps_told_apart():
    spans = [
        device_trace.Span(0, 4e9, "a", 1),
        device_trace.Span(2e9, 6e9, "b", 1),
        device_trace.Span(7e9, 8e9, "a", 1),
        device_trace.Span(11e9, 12e9, None),
        device_trace.Span(3e9, 3e9, "of no length", 1),
    ]
    trace = device_trace.Trace({}, (0, 12e9), [(8.5e9, 9e9)])
    found = device_trace.divide_time(spans, trace, "while".__eq__)
    assert found.seconds == {"a": 4.0, "b": 3.0}
    assert found.rest == {
        "(between operations)": 1.0,
        "(waiting for data)": 0.5,
        "(waiting for the host)": 2.5,
        "(other programs)": 1.0,
    }
    assert found.threads == 10.0


# ---- how it is shown ------------------------------------------------------------------------------------------------


def test_table(scan):
    lines = scan.table().splitlines()
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if line.startswith("layer "))
    rows = lines[lines.index(head) + 1 :]
    assert rows[-1].startswith("total ")
    assert rows[-1].endswith("cpu, 5 steps")
    end = head.index("ms/step") + len("ms/step")
    assert all(re.fullmatch(r"\d+\.\d{3}", line[:end].split()[-1]) and line[end] == " " for line in rows)  # aligned
    times = [float(line[:end].split()[-1]) for line in rows[:-1] if not line.startswith(" ")]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(1e3 * scan.seconds, abs=0.0006 * len(times))


def test_table_of_few_levels(scan):
    names = [line.split()[0] for line in scan.table(1).splitlines() if line]
    assert "blocks" in names
    assert not {"up", "(itself)"} & set(names)
    assert "up" in [line.split()[0] for line in scan.table(2).splitlines() if line]


def test_a_long_path_is_cut(scan):
    long = dataclasses.replace(scan.rows[0], path=("x" * 90,))
    assert max(map(len, dataclasses.replace(scan, rows=(long,)).table().splitlines())) <= 100


class Page(HTMLParser):
    """The boxes of a page, and a record of what is not closed or loaded from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.bad, self.boxes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.bad += [name for name in given if name in ("src", "href", "srcset")]
        if tag == "button":
            self.boxes.append(given)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


def test_page(scan):
    text = scan.html()
    page = Page(text)
    assert page.open == []
    assert page.bad == []
    assert "http" not in text
    assert "@import" not in text
    boxes = {box["title"].split("\n")[0]: box for box in page.boxes}
    assert set(boxes) == {"step", *("/".join(row.path) for row in scan.rows)}
    for row in scan.rows:
        box = boxes["/".join(row.path)]
        assert float(box["data-w"]) == pytest.approx(row.seconds / scan.seconds, abs=1e-5)
        outer = boxes["/".join(row.path[:-1]) or "step"]
        start, end = (float(box["data-x"]), float(box["data-x"]) + float(box["data-w"]))
        assert float(outer["data-x"]) - 1e-5 <= start <= end <= float(outer["data-x"]) + float(outer["data-w"]) + 1e-5
    assert "forward" in boxes["blocks/up"]["title"]
    assert "backward" in boxes["blocks/up"]["title"]


def test_names_are_escaped(scan):
    odd = dataclasses.replace(scan.rows[0], path=('<b a="1">&',))
    page = Page(dataclasses.replace(scan, rows=(odd,)).html())
    assert page.bad == []
    assert page.boxes[1]["title"].startswith('<b a="1">&\n')


def test_a_notebook_shows_the_page(scan):
    assert scan._repr_html_().startswith("<iframe srcdoc=")
    assert str(scan) == scan.table()
