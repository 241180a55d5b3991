"""`sw.graph`: what stands where, which way values flow, and pictures in which lines cross no boxes."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest
from jax.nn.initializers import normal, zeros

import sapwood as sw
from sapwood import layers as L

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def mlp(v, x):
    return L.Dense(10)(v.logits, jax.nn.relu(L.Dense(16)(v.hidden, x)))


def conv(v, image):
    x = jax.nn.relu(L.BatchNorm()(v.norm, L.Conv(8, (3, 3))(v.stem, image)))
    shortcut = L.Conv(16, (1, 1), strides=2)(v.shortcut, x)
    h = jax.nn.relu(L.Conv(16, (3, 3), strides=2)(v.first, x))
    x = shortcut + L.Conv(16, (3, 3))(v.second, h)
    return L.Dense(10)(v.logits, L.Dropout(0.1)(v.drop, x.mean((1, 2))))


@sw.layer
def block(v, x):
    x = x + L.MultiHeadAttention(2, causal=True, rotary=L.Rotary())(v.attn, L.RMSNorm()(v.norm1, x))
    return x + L.Dense(8)(v.down, jax.nn.gelu(L.Dense(32)(v.up, L.RMSNorm()(v.norm2, x))))


def transformer(n, scan=False):
    def transformer(v, ids):
        embed = L.Embed(100, 8)
        x = embed(v.embed, ids)
        if scan:
            x = L.Scan(block, n)(v.blocks, x)
        else:
            for i in range(n):
                x = block(v.blocks[i], x)
        return embed.attend(v.embed, L.RMSNorm()(v.norm, x))

    return transformer


def plain_blocks(v, x, memory):
    """Residual blocks that are plain functions, and a second input that all of them read."""
    for i in range(2):
        b = v.blocks[i]
        x = x + L.Dense(4)(b.up, L.LayerNorm()(b.norm, x))
        x = x + L.Dense(4)(b.cross, jnp.concatenate([x, memory], -1))
    return x


def entered_again(v, x):
    """A scope that the program comes back to, so that one edge leads up."""
    x = L.Dense(4)(v.b.middle, L.Dense(4)(v.a.first, x))
    return L.Dense(4)(v.a.last, x), x


def dense_net(v, x):
    """Every layer reads what all layers before it gave."""
    found = [x]
    for i in range(4):
        found.append(L.Dense(4)(v[f"layer{i}"], jnp.concatenate(found, -1)))
    return found[-1]


def stage(v, x):
    """It begins and ends with operations of its own, in a scope of plain functions."""
    x = L.Dense(4)(v.first, jnp.tanh(x))
    x = affine(v.affine, L.max_pool(x, (2,)))
    return jnp.log(1 + jnp.exp(x)).mean(1)


def affine(v, x):
    """Parameters, and no layer."""
    return jnp.sin(x) * v.param("scale", (4,), zeros) + v.param("bias", (4,), zeros)


def around(v, x, shared):
    """A function that holds a layer of another place."""
    return jnp.cos(L.Dense(4)(shared, x * v.param("scale", (4,), zeros)))


def plain_functions(v, x):
    x = stage(v.stages[0], x)
    x = jax.nn.softmax(x) - 1
    x = stage(v.stages[1], jnp.sqrt(x[:, None] * jnp.ones((1, 6, 1))))
    x = around(v.around, x, v.shared)
    for _ in range(2):
        x = x + L.global_max_pool(L.max_pool(x[:, None] * jnp.ones((1, 6, 1)), (3,)))
    return x


MODELS = {
    "mlp": (mlp, (struct(8, 4),)),
    "conv": (conv, (struct(2, 8, 8, 3),)),
    "transformer": (transformer(12), (struct(2, 5, dtype="int32"),)),
    "scanned": (transformer(12, scan=True), (struct(2, 5, dtype="int32"),)),
    "plain": (plain_blocks, (struct(2, 4), struct(2, 4))),
    "again": (entered_again, (struct(2, 4),)),
    "functions": (plain_functions, (struct(2, 6, 4),)),
    "dense net": (dense_net, (struct(2, 4),)),
}
_drawn: dict = {}


def drawn(name):
    if name not in _drawn:
        _drawn[name] = sw.graph(MODELS[name][0], *MODELS[name][1])
    return _drawn[name]


def names(group):
    """The edges of a group by the names of its items; "in" and "out" are its own places of entry and exit."""
    known = {item.id: item.name or item.kind for item in group.items}

    def name(end):
        return known.get(end) or known[end.split("|")[0]]

    return {(name(edge.source), name(edge.target)) for edge in group.edges}


def child(group, *path):
    for name in path:
        group = next(item for item in group.items if item.name == name)
    return group


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_mlp():
    root = drawn("mlp").root
    assert names(root) == {("x", "hidden"), ("hidden", "relu"), ("relu", "logits"), ("logits", "output")}
    hidden = child(root, "hidden")
    assert (hidden.kind, hidden.label, hidden.shape, hidden.params) == ("layer", "Dense(16)", "float32[8,16]", 80)
    assert [edge.shape for edge in root.edges] == ["float32[8,4]", "float32[8,16]", "float32[8,16]", "float32[8,10]"]
    assert root.params == 250


def test_conv_with_shortcut():
    assert names(drawn("conv").root) == {
        ("image", "stem"), ("stem", "norm"), ("norm", "relu"), ("relu", "shortcut"), ("relu", "first"),
        ("first", "relu"), ("relu", "second"), ("second", "add"), ("shortcut", "add"), ("add", "mean"),
        ("mean", "drop"), ("drop", "logits"), ("logits", "output"),
    }  # fmt: skip


def test_transformer_block():
    root = drawn("transformer").root
    assert names(root) == {
        ("ids", "embed"), ("embed", "blocks"), ("blocks", "norm"), ("norm", "embed"), ("embed", "output"),
    }  # fmt: skip
    blocks = child(root, "blocks")
    assert names(blocks) == {("in", "0"), *((str(i), str(i + 1)) for i in range(11)), ("11", "out")}
    for i in range(12):
        assert names(child(blocks, str(i))) == {
            ("in", "norm1"), ("norm1", "attn"), ("attn", "add"), ("in", "add"), ("add", "norm2"), ("norm2", "up"),
            ("up", "gelu"), ("gelu", "down"), ("down", "add"), ("add", "add"), ("add", "out"),
        }  # fmt: skip
    attention = child(blocks, "0", "attn")
    assert names(attention) == {
        ("in", "query"),
        ("in", "key"),
        ("in", "value"),
        ("query", "rotary"),
        ("key", "rotary"),
        ("rotary", "attention"),
        ("value", "attention"),
        ("attention", "out"),
        ("out", "out"),  # the scope, and the way out
    }  # fmt: skip


def test_plain_functions_with_a_cursor_hold_their_operations():
    root = drawn("functions").root
    assert names(root) == {
        ("x", "stages"), ("stages", "around"), ("around", "shared"), ("shared", "around"), ("around", "multiply"),
        ("around", "global max pool, add"), ("multiply", "max pool"), ("max pool", "global max pool, add"),
        ("global max pool, add", "multiply"), ("global max pool, add", "global max pool, add"),
        ("global max pool, add", "output"),
    }  # fmt: skip
    assert names(child(root, "stages")) == {
        ("in", "0"), ("0", "softmax, subtract"), ("softmax, subtract", "multiply, sqrt"), ("multiply, sqrt", "1"),
        ("1", "out"),
    }  # fmt: skip
    for name in ("0", "1"):
        assert names(child(root, "stages", name)) == {
            ("in", "tanh"), ("tanh", "first"), ("first", "max pool"), ("max pool", "affine"),
            ("affine", "exp, add, log"), ("exp, add, log", "mean"), ("mean", "out"),
        }  # fmt: skip
    node = child(root, "stages", "0", "affine")
    assert (node.kind, node.label, node.params) == ("scope", "sin, multiply, add", 8)


def test_tied_table_is_drawn_where_it_is_used_again():
    first, again = (item for item in drawn("transformer").root.items if item.name == "embed")
    assert (first.kind, first.params) == ("layer", 800)
    assert (again.kind, again.params, again.label) == ("scope", 0, "matmul (shared)")


def test_scanned_stack_is_one_group_of_n_copies():
    blocks = child(drawn("scanned").root, "blocks")
    assert (blocks.label, blocks.copies) == ("Scan of 12 × block", 12)
    assert blocks.params == child(drawn("transformer").root, "blocks").params
    one = child(drawn("transformer").root, "blocks", "0")
    assert names(blocks) == names(one)
    assert child(blocks, "up").label == "Dense(32)"  # the group says how often


def test_residual_sums_belong_to_the_scope_that_they_close():
    root = drawn("plain").root
    assert names(root) == {("x", "blocks"), ("memory", "blocks"), ("blocks", "output")}
    blocks = child(root, "blocks")
    assert names(blocks) == {("in", "0"), ("in", "1"), ("0", "1"), ("1", "out")}
    for i in "01":
        assert names(child(blocks, i)) == {
            ("in", "norm"), ("norm", "up"), ("up", "add"), ("in", "add"), ("add", "concatenate"),
            ("in", "concatenate"), ("concatenate", "cross"), ("cross", "add"), ("add", "add"), ("add", "out"),
        }  # fmt: skip


def test_scope_that_is_entered_again():
    root = drawn("again").root
    assert names(root) == {("x", "a"), ("a", "b"), ("b", "a"), ("b", "output 1"), ("a", "output 0")}
    assert names(child(root, "a")) == {("in", "first"), ("first", "out"), ("in", "last"), ("last", "out")}


def test_two_passes_are_two_groups():
    def siamese(v, a, b):
        encode = L.Sequential([L.Dense(4), jax.nn.relu, L.Dense(4)])
        return encode(v.encoder, a) - encode(v.encoder, b)

    root = sw.graph(siamese, struct(2, 3), struct(2, 3)).root
    first, second = (item for item in root.items if item.kind == "group")
    assert first.id != second.id
    assert names(first) == names(second) == {("in", "0"), ("0", "relu"), ("relu", "2"), ("2", "out")}
    sources = {edge.source for edge in root.edges if edge.target.startswith((first.id + "|", second.id + "|"))}
    assert sources == {item.id for item in root.items if item.kind == "input"}


def test_plain_function_is_drawn_by_its_scopes():
    def plain(v, x):
        h = jnp.tanh(x @ v.a.param("w", (3, 5), normal()) + v.a.param("b", (5,), zeros))
        return h @ (2 * v.b.param("w", (5, 2), normal()))

    root = sw.graph(plain, struct(2, 3)).root
    assert names(root) == {("x", "a"), ("a", "tanh"), ("tanh", "b"), ("b", "output")}
    a, b = child(root, "a"), child(root, "b")
    assert (a.kind, a.label, a.params, a.shape) == ("scope", "matmul, add", 20, "float32[2,5]")
    assert (b.label, b.params) == ("matmul", 10)


def cond(v, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: L.Dense(4)(v.a, x), lambda x: L.Dense(4)(v.b, x), x)


def jitted_twice(v, x):
    dense = jax.jit(L.Dense(4))
    return dense(v.a, dense(v.a, x))


def loop(v, x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, L.Dense(4)(v.a, c[1])), (0, x))[1]


def in_a_checkpoint(v, x):
    return L.Remat(L.Dense(4))(v.a, x)


def side_by_side(v, x):
    return L.Vmap(L.Dense(4), 3, in_axes=None)(v.a, x)


def chosen(v, x):
    few = L.Dense(1)(v.a, x).sum() > 0
    return jax.lax.cond(few, lambda x: L.Dense(4)(v.b, x), lambda x: x, x)


def halted(v, x):
    return jax.lax.while_loop(lambda x: L.Dense(4)(v.a, x).sum() > 0, jnp.tanh, x)


def states_before(v, x):
    """Each step gives what the one before carried to it."""
    return jax.lax.scan(lambda h, row: (L.Dense(4)(v.a, h) + row, h), jnp.zeros(4), x)[1]


def loss_of_the_first(v, x):
    """A loss of each step that only its first layer has a part in."""

    def step(v, x):
        h = L.Dense(4)(v.a, x)
        v.loss("size", (h**2).sum())
        return L.Dense(4)(v.b, h)

    return L.Scan(sw.layer(step), 3)(v, x)


def test_a_loss_in_a_loop_comes_from_the_layer_that_makes_it():
    root = sw.graph(loss_of_the_first, struct(2, 4)).root
    assert names(root) == {
        ("x", "a"), ("a", "b"), ("b", "output"), ("a", "power"), ("power", "sum"), ("sum", "loss/size"),
    }  # fmt: skip


def in_turns(v, x):
    """Each round of the loop reads what the other layer gave in the round before."""
    turn = lambda c: (c[0] + 1, L.Dense(4)(v.a, c[2]), L.Dense(4)(v.b, c[1]))  # noqa: E731
    return jax.lax.while_loop(lambda c: c[0] < 3, turn, (0, x, x))[1]


@pytest.mark.parametrize(
    ("model", "edges", "label"),
    [
        (cond, {("x", "a"), ("x", "b"), ("a", "output"), ("b", "output")}, "Dense(4)"),
        (jitted_twice, {("x", "a"), ("a", "a"), ("a", "output")}, "Dense(4)"),
        (loop, {("x", "a"), ("a", "output")}, "Dense(4)"),
        (
            chosen,
            {("x", "a"), ("a", "sum"), ("sum", "gt"), ("gt", "output"), ("x", "b"), ("b", "output"), ("x", "output")},
            "Dense(1)",
        ),
        (
            halted,
            {("x", "a"), ("a", "sum"), ("sum", "gt"), ("gt", "output"), ("x", "tanh"), ("tanh", "output")},
            "Dense(4)",
        ),
        (in_turns, {("x", "a"), ("x", "b"), ("a", "output"), ("b", "output")}, "Dense(4)"),
        (states_before, {("x", "add"), ("a", "add"), ("add", "output")}, "Dense(4)"),
        (in_a_checkpoint, {("x", "a"), ("a", "output")}, "Remat of Dense(4)"),
        (side_by_side, {("x", "a"), ("a", "output")}, "Vmap of 3 × Dense(4)"),
    ],
)
def test_through_transforms(model, edges, label):
    root = sw.graph(model, struct(2, 4)).root
    assert names(root) == edges
    assert child(root, "a").label == label
    assert child(root, "output").shape == ("float32[3,2,4]" if model is side_by_side else "float32[2,4]")


def test_results_and_losses():
    def model(v, x):
        h = L.Dense(4)(v.h, x)
        v.loss("size", (h**2).sum())
        return {"y": L.Dense(2)(v.head, h), "h": h}

    root = sw.graph(model, struct(2, 3)).root
    ends = {item.name for item in root.items if item.kind == "output"}
    assert ends == {"y", "h", "loss/size"}
    assert {("h", "h"), ("head", "y")} <= names(root)


class Model:
    def __call__(self, v, image):
        return L.Dense(4)(v.a, image)


@pytest.mark.parametrize("model", [Model(), Model().__call__, jax.jit(lambda v, image: L.Dense(4)(v.a, image))])
def test_inputs_have_the_names_of_arguments(model):
    assert names(sw.graph(model, struct(2, 4)).root) == {("image", "a"), ("a", "output")}


def test_what_only_converts_or_moves_is_called_that():
    def model(v, x):
        return L.Dense(4)(v.a, x.astype("float32")), L.Dense(4)(v.b, jnp.ones((4, 4)) @ x.T.astype("float32")), x.T

    found = names(sw.graph(model, struct(2, 4, dtype="int8")).root)
    assert {("x", "convert"), ("convert", "a"), ("x", "transpose"), ("transpose", "output 2")} <= found


def test_indexing_is_called_by_what_it_does():
    root = sw.graph(lambda v, x: L.Dense(4)(v.a, x[:, 0]), struct(2, 3, 4)).root
    assert names(root) == {("x", "index"), ("index", "a"), ("a", "output")}


def test_names_of_symbolic_sizes_stay_whole():
    (points,) = jax.export.symbolic_shape("points")
    drawing = sw.graph(lambda v, x: L.Dense(3)(v.head, x), jax.ShapeDtypeStruct((points, 4), "float32"))
    assert "f32[points,4]" in drawing.svg()


def test_what_depends_on_nothing():
    identity = sw.graph(lambda v, x: x, struct(2)).root
    assert names(identity) == {("x", "output")}
    noise = sw.graph(lambda v: jax.random.normal(v.rng("z"), (2, 3)) @ v.param("w", (3, 4), zeros)).root
    assert names(noise) >= {("matmul", "output")}


def test_drawing_again_gives_the_same():
    again = sw.graph(*MODELS["conv"][:1], *MODELS["conv"][1])
    assert (again.svg(), again.html()) == (drawn("conv").svg(), drawn("conv").html())


# ---- which groups are open -------------------------------------------------------------------------------------------


def test_all_open_where_it_fits():
    small = drawn("scanned")
    assert small.opened == {group.id for group in small.root.groups()}


def test_only_the_first_of_many_alike():
    large = drawn("transformer")
    blocks = child(large.root, "blocks")
    opened = [item.name for item in blocks.items if item.id in large.opened]
    assert opened == ["0"]
    nothing = sw.graph(transformer(3), struct(2, 5, dtype="int32"), limit=1)
    assert nothing.opened == frozenset()


def test_bad_options(tmp_path):
    with pytest.raises(sw.ConfigError, match="at least 1 box"):
        sw.graph(mlp, struct(8, 4), limit=0)
    with pytest.raises(sw.ConfigError, match=r"\.svg or \.html, not 'mlp\.png'"):
        drawn("mlp").save(tmp_path / "mlp.png")


def test_save(tmp_path):
    for suffix, text in ((".svg", drawn("mlp").svg()), (".html", drawn("mlp").html())):
        drawn("mlp").save(tmp_path / f"mlp{suffix}")
        assert (tmp_path / f"mlp{suffix}").read_text(encoding="utf-8") == text


# ---- the still picture -----------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture):
    """(class, left, top, right, bottom) of every box."""
    found = []
    for rect in picture.iter(f"{SVG}rect"):
        if rect.get("class", "").startswith("box") and not rect.get("class").endswith("shade"):
            x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            found.append((rect.get("class").split()[-1], x, y, x + width, y + height))
    return found


def points(path):
    """The corners of a line made of M, V, H and q, with steps of at most 2 in between."""
    x = y = 0.0
    found = []
    for command, numbers in re.findall(r"([MVHq])([-\d., ]+)", path):
        values = [float(n) for n in re.findall(r"-?[\d.]+", numbers)]
        if command == "M":
            x, y = values
            found.append((x, y))
            continue
        across, down = ([0.0] * (command == "V") + values + [0.0] * (command == "H"))[-2:]
        end = (x + across, y + down) if command == "q" else (across, y) if command == "H" else (x, down)
        steps = max(1, int(max(abs(end[0] - x), abs(end[1] - y)) / 2))
        found += [(x + (end[0] - x) * k / steps, y + (end[1] - y) * k / steps) for k in range(1, steps + 1)]
        x, y = end
    return found


@pytest.mark.parametrize("name", MODELS)
def test_boxes_do_not_overlap(name):
    found = [box[1:] for box in boxes(ET.fromstring(drawn(name).svg())) if box[0] not in ("closed", "group")]
    assert len(found) == len(list(shown_nodes(drawn(name))))
    for k, (left, top, right, bottom) in enumerate(found):
        for left2, top2, right2, bottom2 in found[k + 1 :]:
            assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top


@pytest.mark.parametrize("name", MODELS)
def test_lines_cross_no_boxes_and_nothing_leaves_the_picture(name):
    picture = ET.fromstring(drawn(name).svg())
    solid = [box[1:] for box in boxes(picture) if box[0] != "group"]
    lines = [points(path.get("d")) for path in picture.iter(f"{SVG}path") if path.get("class") == "edge"]
    assert lines
    width, height = float(picture.get("width")), float(picture.get("height"))
    for line in lines:
        assert line[0][1] < line[-1][1] or name in ("again", "functions")  # values flow downwards
        for x, y in line:
            assert 0 <= x <= width
            assert 0 <= y <= height
            assert not any(left + 1 < x < right - 1 and top + 1 < y < bottom - 1 for left, top, right, bottom in solid)
    for _, left, top, right, bottom in boxes(picture):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def shown_nodes(graph, group=None):
    for item in (group or graph.root).boxes:
        if item.kind != "group":
            yield item
        elif item.id in graph.opened:
            yield from shown_nodes(graph, item)


def test_picture_says_what_there_is():
    picture = ET.fromstring(drawn("scanned").svg())
    said = [text.text for text in picture.iter(f"{SVG}text")]
    assert "Scan of 12 × block" in said
    assert "Embed(100, 8)" in said
    assert "f32[2,5,8] · 800 params" in said
    assert {node.name for node in shown_nodes(drawn("scanned"))} <= set(said)


# ---- the page --------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """A page's elements, held to close where they should."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.groups: dict[str, bool] = {}
        self.parents: dict[str, str] = {}
        self.within: list[str] = []
        self.summaries, self.links, self.text = 0, [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [value for name, value in attrs.items() if name in ("src", "href")]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "summary":
            assert self.open[-1] == "details"
            self.summaries += 1
        if tag == "details":
            self.parents[attrs["id"]] = self.within[-1] if self.within else ""
            self.groups[attrs["id"]] = "open" in attrs
            self.within.append(attrs["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "details":
            self.within.pop()

    def handle_data(self, data):
        self.text.append(data)


def edges_of(page):
    return json.loads(re.search(r"const EDGES = (\[.*?\]);", page).group(1))


@pytest.mark.parametrize("name", MODELS)
def test_page_holds_every_group_and_edge(name):
    graph = drawn(name)
    text = graph.html()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.summaries == len(page.groups)
    assert {group for group, is_open in page.groups.items() if is_open} == graph.opened
    for group in [graph.root, *graph.root.groups()]:
        for item in group.items:
            assert item.id in page.ids
            if item.kind == "group":
                assert page.parents[item.id] == ("" if group is graph.root else group.id)
    edges = edges_of(text)
    assert len(edges) == sum(len(group.edges) for group in [graph.root, *graph.root.groups()])
    for edge in edges:
        marks = {f"{edge['g']}.grid", f"{edge['g']}.row{edge['r1']}", f"{edge['g']}.row{edge['r2']}"}
        marks |= {f"{edge['g']}.{edge['l']}"} if edge["l"] else set()
        assert {edge["s"], edge["t"], edge["si"], edge["ti"], *marks} <= set(page.ids)


def test_page_needs_nothing_else():
    text = drawn("conv").html()
    assert not Page(text).links
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "@import" not in text
    assert "url(#tip)" in text


def test_names_are_escaped():
    graph = sw.graph(lambda v, x: L.Dense(2)(v["<i>&"].c, x), struct(2, 3))
    assert Page(graph.html()).open == []
    assert "<i>&" not in graph.html()
    ET.fromstring(graph.svg())
    assert 'srcdoc="&lt;!DOCTYPE' in graph._repr_html_()


PROBE = """<script>
const report = [], note = () => report.push(document.querySelectorAll('path.edge').length + ' ' +
  [...document.querySelectorAll('.box')].filter(b => !b.closest('details:not([open])')).length);
note();
const first = document.querySelector('details');
const later = (f, n) => setTimeout(() => { f(); setTimeout(() => { note(); n && n(); }, 100); }, 100);
later(() => { first.querySelector('summary').click(); }, () => later(() => first.querySelector('summary').click(),
  () => later(() => all(false), () => later(() => all(true), () => { document.title = report.join('; '); }))));
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_groups_open_and_close_in_a_browser(tmp_path):
    graph = drawn("scanned")
    page = tmp_path / "page.html"
    page.write_text(graph.html().replace("</body>", PROBE), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    report = re.search(r"<title>(.*?)</title>", done.stdout).group(1).split("; ")
    whole = f"{sum(len(group.edges) for group in [graph.root, *graph.root.groups()])} {len(list(graph.root.nodes()))}"
    closed = f"{len(graph.root.edges)} {sum(item.kind != 'group' for item in graph.root.items)}"
    assert report == [whole, closed, whole, closed, whole]
