"""`sw.summary` against numbers counted by hand, by XLA on the whole model, and against the unrolled model."""

import builtins
import dataclasses
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import normal, ones

import sapwood as sw
from sapwood import layers as L


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def rows(found):
    return {row.path: row for row in found.rows}


def mlp(v, x):
    return L.Dense(10)(v.logits, jax.nn.relu(L.Dense(16)(v.hidden, x)))


@sw.layer
def block(v, x):
    x = x + L.MultiHeadAttention(2, causal=True)(v.attn, L.LayerNorm()(v.norm, x))
    return x + L.Dense(8)(v.down, jax.nn.gelu(L.Dense(32)(v.up, x)))


def unrolled(v, x):
    for i in range(3):
        x = block(v.blocks[i], x)
    return x


def scanned(v, x):
    return L.Scan(block, 3)(v.blocks, x)


@pytest.fixture(scope="module")
def stack():
    """The summary of three unrolled blocks."""
    return sw.summary(unrolled, struct(2, 5, 8))


def xla_flops(model, *xs):
    """XLA's count of the whole model, by another way: `sw.apply` lowered as it is."""
    params, state = jax.tree.map(lambda param: param.struct, sw.spec(model, *xs))
    run = jax.jit(lambda params, state, xs: sw.apply(model, params, state, *xs)[0])
    return run.lower(params, state, xs).cost_analysis()["flops"]


def test_mlp_by_hand():
    found = sw.summary(mlp, struct(8, 4))
    hidden, logits = found.rows
    assert (hidden.path, hidden.layer, hidden.output) == ("hidden", "Dense(16)", "float32[8,16]")
    assert (hidden.params, hidden.nbytes) == (4 * 16 + 16, 4 * (4 * 16 + 16))
    assert hidden.flops == 2 * 8 * 4 * 16 + 8 * 16  # a multiply-add is two; then the bias
    assert logits.flops == 2 * 8 * 16 * 10 + 8 * 10
    assert found.flops == hidden.flops + logits.flops + 8 * 16  # the relu stands between the layers
    assert (found.params, found.param_bytes, found.state) == (80 + 170, 4 * 250, 0)


def test_conv_by_hand():
    def model(v, x):
        return L.BatchNorm()(v.norm, L.Conv(8, (3, 3), padding="VALID")(v.conv, x))

    found = sw.summary(model, struct(2, 6, 6, 3))
    conv, norm = found.rows
    assert conv.output == "float32[2,4,4,8]"
    assert conv.params == 3 * 3 * 3 * 8 + 8
    assert conv.flops == 2 * (2 * 4 * 4 * 8) * (3 * 3 * 3) + 2 * 4 * 4 * 8
    assert (norm.params, norm.state, norm.nbytes) == (16, 16, 4 * 32)
    assert (found.params, found.state, found.state_bytes) == (conv.params + 16, 16, 64)


@pytest.mark.parametrize(
    ("model", "xs"),
    [
        (mlp, (struct(8, 4),)),
        (block, (struct(2, 5, 8),)),
        (lambda v, x: L.Vmap(L.Dense(3), 4, in_axes=None)(v.experts, x), (struct(2, 4),)),
        (lambda v, x: jax.jit(L.Dense(4))(v.a, jax.jit(L.Dense(4))(v.a, x)), (struct(2, 4),)),
    ],
)
def test_total_is_that_of_xla(model, xs):
    assert sw.summary(model, *xs).flops == xla_flops(model, *xs)


def test_scan_counts_every_step(stack):
    # XLA itself counts a loop's body once.
    one, many = sw.summary(scanned, struct(2, 5, 8)), stack
    assert (one.flops, one.params) == (many.flops, many.params)
    assert xla_flops(scanned, struct(2, 5, 8)) < one.flops
    found, apart = rows(one), rows(many)
    assert found["blocks"].layer == "Scan of 3 × block"
    assert found["blocks"].copies == found["blocks/up"].copies == 3
    assert found["blocks/up"].layer == "3 × Dense(32)"
    assert found["blocks/up"].output == "float32[2,5,32]"
    for name in ("attn", "norm", "up", "down"):
        parts = [apart[f"blocks/{i}/{name}"] for i in range(3)]
        assert found[f"blocks/{name}"].flops == sum(part.flops for part in parts)
        assert found[f"blocks/{name}"].params == sum(part.params for part in parts)


def test_scan_in_scan_multiplies():
    found = rows(sw.summary(L.Scan(L.Scan(L.Sequential([L.Dense(4)]), 2), 3), struct(2, 4)))
    assert found["0"].copies == 6
    assert found["0"].flops == 6 * (2 * 2 * 4 * 4 + 2 * 4)
    assert found["0"].params == 6 * 20


def test_unrolled_convolution_counts_as_often():
    # On CPU a scan over a convolution is unrolled; the numbers are the same.
    found = sw.summary(L.Scan(L.Conv(4, (3, 3)), 3), struct(2, 6, 6, 4))
    single = sw.summary(L.Conv(4, (3, 3)), struct(2, 6, 6, 4))
    assert found.flops == 3 * single.flops
    assert found.rows[0].flops == 3 * single.flops


def test_cond_counts_the_costlier_branch_and_while_its_body_once():
    def cond(v, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: L.Dense(4)(v.small, x), lambda x: mlp4(v.big, x), x)

    def mlp4(v, x):
        return L.Dense(4)(v.b, L.Dense(64)(v.a, x))

    found = rows(sw.summary(cond, struct(2, 4)))
    total = sw.summary(cond, struct(2, 4)).flops
    assert found["small"].flops == 2 * 2 * 4 * 4 + 2 * 4
    assert 0 <= total - found["big/a"].flops - found["big/b"].flops < found["small"].flops

    def loop(v, x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, L.Dense(4)(v.w, c[1])), (0, x))[1]

    assert rows(sw.summary(loop, struct(2, 4)))["w"].flops == 2 * 2 * 4 * 4 + 2 * 4


def test_layers_that_decide_about_a_loop_are_counted():
    def halted(v, x):
        return jax.lax.while_loop(lambda x: L.Dense(1)(v.halt, x).sum() > 0, lambda x: L.Dense(4)(v.go, x), x)

    found = rows(sw.summary(halted, struct(2, 4)))
    assert found["halt"].flops == 2 * 2 * 4 + 2
    assert found["go"].flops == 2 * 2 * 4 * 4 + 2 * 4

    def same(v, x):
        return jax.lax.while_loop(lambda x: L.Dense(4)(v.w, x).sum() > 0, lambda x: L.Dense(4)(v.w, x), x)

    assert rows(sw.summary(same, struct(2, 4)))["w"].flops == 2 * (2 * 2 * 4 * 4 + 2 * 4)


def test_what_xla_does_not_know_counts_nothing():
    @sw.layer
    def outside(v, x):
        return jax.pure_callback(lambda x: x, struct(2, 4), x)

    found = sw.summary(lambda v, x: outside(v.outside, x), struct(2, 4))
    assert rows(found)["outside"].flops == found.flops == 0


def test_symbolic_sizes_are_refused():
    (points,) = jax.export.symbolic_shape("points")
    with pytest.raises(sw.ConfigError, match=r"float32\[points,4\] has symbolic ones; give arrays"):
        sw.summary(mlp, struct(points, 4))


def test_tied_embedding_counts_once_and_says_so():
    embed = L.Embed(100, 8)

    def tied(v, ids):
        return embed.attend(v.embed, L.LayerNorm()(v.norm, embed(v.embed, ids)))

    found = sw.summary(tied, struct(2, 5, dtype="int32"))
    assert found.params == 100 * 8 + 2 * 8
    assert rows(found)["embed"].shared
    assert not rows(found)["norm"].shared
    assert "Embed(100, 8) (shared)" in repr(found)


def test_layer_called_twice():
    def siamese(v, a, b):
        return L.Dense(4)(v.encoder, a) - L.Dense(4)(v.encoder, b)

    row = sw.summary(siamese, struct(2, 3), struct(2, 3)).rows[0]
    assert (row.calls, row.shared, row.params) == (2, True, 16)
    assert row.flops == 2 * (2 * 2 * 3 * 4 + 2 * 4)


def test_plain_function_shows_its_parameters():
    def plain(v, x):
        h = jnp.tanh(x @ v.a.param("w", (3, 5), normal()) + v.a.param("b", (5,), normal()))
        return h * v.state("scale", (), ones)

    found = rows(sw.summary(plain, struct(2, 3)))
    assert list(found) == ["a", "a/w", "a/b", "scale"]
    assert (found["a"].layer, found["a"].params, found["a"].flops) == ("", 20, None)
    assert (found["a/w"].layer, found["a/w"].output, found["a/w"].params) == ("parameter", "float32[3,5]", 15)
    assert (found["scale"].layer, found["scale"].state) == ("state", 1)
    assert sw.summary(plain, struct(2, 3)).flops > 2 * 2 * 3 * 5


def test_layer_with_layers_and_variables_of_its_own():
    class Scaled(sw.Layer):
        def __call__(self, v, x):
            return L.Dense(3)(v.dense, x * v.param("scale", (x.shape[-1],), ones))

    found = rows(sw.summary(Scaled(), struct(2, 4)))
    assert {path: row.params for path, row in found.items()} == {"scale": 4, "dense": 15}


def test_rows_follow_the_program(stack):
    found = rows(stack)
    below = [path for path in found if path.startswith("blocks/0/")]
    assert below == [f"blocks/0/{name}" for name in ("norm", "attn", "up", "down")]
    assert next(iter(found)) == "blocks"


def test_depth(stack):
    paths = [row.path for row in sw.summary(unrolled, struct(2, 5, 8), depth=2).rows]
    assert paths == ["blocks", "blocks/0", "blocks/1", "blocks/2"]
    assert paths == [path for path in rows(stack) if path.count("/") < 2]
    assert rows(sw.summary(mlp, struct(8, 4), depth=1)) == rows(sw.summary(mlp, struct(8, 4)))
    with pytest.raises(sw.ConfigError, match="depth must be at least 1"):
        sw.summary(mlp, struct(2, 4), depth=0)


def test_bfloat16():
    found = sw.summary(mlp, struct(8, 4), policy="bfloat16")
    assert found.output == "bfloat16[8,10]"
    assert [row.output for row in found.rows] == ["bfloat16[8,16]", "bfloat16[8,10]"]
    assert found.param_bytes == 4 * 250  # stored in float32
    half = sw.summary(mlp, struct(8, 4), policy=sw.Policy("bfloat16", param="bfloat16"))
    assert half.param_bytes == 2 * 250


def test_eval_mode_and_keys():
    def model(v, x):
        return L.Dropout(0.5)(v.drop, x)

    (row,) = sw.summary(model, struct(2, 4)).rows
    assert (row.layer, row.flops, row.params) == ("Dropout(0.5)", 0, 0)
    noisy = sw.summary(lambda v, x: x + jax.random.normal(v.rng("z"), x.shape), struct(2, 4))
    assert noisy.flops > 8  # a model that draws in eval mode is given a key


def test_error_that_the_model_catches_leaves_no_trace():
    def tries(v, x):
        with pytest.raises(sw.InputError):
            L.Conv(4, (3, 3))(v.conv, x)
        return L.Dense(4)(v.dense, x)

    found = rows(sw.summary(tries, struct(2, 4)))
    assert list(found) == ["dense"]
    assert found["dense"].flops == 2 * 2 * 4 * 4 + 2 * 4


def test_nothing_is_computed():
    huge = 10**6
    found = sw.summary(lambda v, x: L.Dense(huge)(v.dense, x), struct(huge, huge))
    assert found.params == huge * huge + huge
    assert found.flops == pytest.approx(2 * huge**3, rel=1e-4)


def test_trees_of_inputs_and_results():
    def model(v, batch, extra):
        return {"y": L.Dense(2)(v.y, batch["x"]), "z": extra[0]}

    found = sw.summary(model, {"x": struct(2, 4)}, (struct(3),))
    assert (found.inputs, found.output) == ("float32[2,4], float32[3]", "float32[2,2], float32[3]")


def test_model_without_layers_or_variables():
    found = sw.summary(lambda v, x: x, struct(2, 4))
    assert (found.rows, found.params, found.flops) == ((), 0, 0)
    assert "0 parameters" in repr(found)


def test_result_is_frozen_and_arrays_serve_as_inputs():
    found = sw.summary(mlp, np.zeros((8, 4), np.float32))
    assert found == sw.summary(mlp, struct(8, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.params = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.rows[0].params = 0


def test_plain_text_columns_line_up():
    title, heading, rule, *body, last, totals = repr(sw.summary(scanned, struct(2, 5, 8))).splitlines()
    assert title == "scanned(float32[2,5,8]) -> float32[2,5,8]"
    ends = [k for k, c in enumerate(rule + " ") if c == " " and rule[k - 1] == "-"]
    assert heading[: ends[3]].endswith("parameters")
    for line in body:
        assert line[: ends[3]][-1].isdigit()  # numbers end where their column ends
        assert len(line) <= len(rule)
    assert last == rule
    assert "FLOPs" in totals


def test_rich_table_shows_every_row(stack, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found = stack
    found.show()
    shown = capsys.readouterr().out
    for row in found.rows:
        assert row.path in shown
    assert f"{found.params:,} parameters" in shown


class _Outline(HTMLParser):
    """What `<details>` there are, how deep, and whether each has its `<summary>`."""

    def __init__(self, text):
        super().__init__()
        self.depth, self.deepest, self.details, self.summaries = 0, 0, 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.summaries += tag == "summary"
        if tag == "details":
            self.details, self.depth = self.details + 1, self.depth + 1
            self.deepest = max(self.deepest, self.depth)

    def handle_endtag(self, tag):
        self.depth -= tag == "details"


def test_notebook_tree_by_treescope():
    treescope = pytest.importorskip("treescope")
    found = sw.summary(L.Sequential([L.Sequential([L.Dense(4)]), L.Dense(2)]), struct(2, 4))
    lines = treescope.render_to_text(found).splitlines()
    assert lines[0] == "Sequential(float32[2,4]) -> float32[2,2]"
    assert [line.split(" float32")[0] for line in lines[1:4]] == ["  0 Sequential", "    0 Dense(4)", "  1 Dense(2)"]
    assert lines[4].strip() == found.totals
    assert "treescope" in found._repr_html_()


def test_notebook_tree_without_treescope(stack, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "treescope":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    page = stack._repr_html_()
    outline = _Outline(page)
    assert outline.depth == 0
    assert outline.deepest == 2  # blocks, blocks/0
    assert outline.details == outline.summaries == 4
    assert page.count("Dense(32)") == 3
    assert "float32[2,5,32]" in page


def test_html_is_escaped(monkeypatch):
    monkeypatch.setattr("sapwood.inspection.summaries.tree._OPEN", 0)
    from sapwood.inspection.summaries.tree import plain_html

    page = plain_html(sw.summary(lambda v, x: L.Dense(2)(v["a<b>"].c, x), struct(2, 3)))
    assert "<b>a&lt;b&gt;/c</b>" in page
    assert "a<b>" not in page
