"""Contract 5: never the same key twice, or an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sapwood as sw
from sapwood import layers as L
from sapwood.core import vars as core_vars
from sapwood.core.rng import ROOT, mix, path_hash, segment


def bits(v, name="mask"):
    """What a draw at ``v`` gives: two numbers that tell its key from any other."""
    return jax.random.key_data(v.rng(name))


def cursor(seed=0):
    return sw.bind({}, {}, rng=seed)


def distinct(*draws):
    rows = [tuple(row) for draw in draws for row in np.asarray(draw).reshape(-1, 2).tolist()]
    return len(set(rows)) == len(rows)


def test_a_key_depends_on_seed_path_and_name_alone():
    v, w = cursor(), cursor()
    a, b = bits(v.a), bits(v.b)
    assert np.array_equal(bits(w.b), b)  # another order of calls
    assert np.array_equal(bits(w.a), a)
    assert distinct(a, b, bits(v.a, "other"), bits(cursor(1).a), bits(v.a.mask, "a"))


def test_numbers_are_one_whether_written_or_traced():
    names = [path_hash((str(i),)) for i in range(3)]
    assert [mix(ROOT, segment(str(i))) for i in range(3)] == names
    lanes = mix(ROOT, (np.arange(3, dtype=np.uint32), segment("0")[1]))
    assert [tuple(int(lane[i]) for lane in lanes) for i in range(3)] == names


USES = {
    "draw": lambda v: bits(v),
    "draw below": lambda v: bits(v.sub),
    "fork": lambda v: bits(v.fork()),
    "fork below": lambda v: bits(v.sub.fork()),
    "draw below a fork": lambda v: bits(v.fork().sub),
    "fold": lambda v: bits(v.fold(1)),
    "fork into jit": lambda v: jax.jit(bits)(v.fork()),
    "below a fork into jit": lambda v: jax.jit(bits)(v.fork().sub),
    "stack": lambda v: jax.vmap(bits)(v.stack(2)),
    "stack below": lambda v: jax.vmap(bits)(v.sub.stack(2)),
    "number": lambda v: bits(v[1]),
    "traced fold": lambda v: jax.lax.scan(lambda w, i: (w, bits(w.fold(i))), v.fork(), jnp.arange(2))[1],
    "carried out": lambda v: (lambda w, drawn: jnp.stack([*drawn, bits(w), bits(w.fork())]))(
        *jax.lax.scan(lambda w, _: (w, bits(w)), v.fork(), None, 2)
    ),
    "one fork twice": lambda v: (f := v.fork(), jnp.stack([jax.jit(bits)(f) for _ in range(2)]))[1],
    "pure": lambda v: sw.pure(bits)(v)[0],
    "fork in pure": lambda v: sw.pure(lambda v: bits(v.fork()))(v)[0],
    "used fork": lambda v: (f := v.fork(), jnp.stack([bits(f), bits(f, "b"), bits(f.fork()), bits(f.fork(), "b")]))[1],
    "fork of a fork": lambda v: (f := v.fork(), jnp.stack([bits(f.fork()), bits(f), bits(f.fold(1)), bits(f)]))[1],
    "used fold": lambda v: (f := v.fold(1), jnp.stack([bits(f), bits(f.fork()), bits(f.fold(1)), bits(f.fold(1))]))[1],
    "used inside": lambda v: jax.jit(lambda v: jnp.stack([bits(v), bits(v.fork()), bits(v.fork()), bits(v)]))(v.fork()),
    "used outside too": lambda v: (f := v.fork(), jnp.stack([jax.jit(bits)(f), bits(f), bits(f.fork()), bits(f)]))[1],
}


@pytest.fixture
def hashes(monkeypatch):
    """Draws give the 64 bits of their place in the stead of a key: the same rules, a fraction of the program."""
    monkeypatch.setattr(core_vars, "fold_once", lambda key, h: jnp.stack([jnp.asarray(lane, "uint32") for lane in h]))
    monkeypatch.setitem(globals(), "bits", lambda v, name="mask": v.rng(name))


DEAR = ("carried out", "traced fold", "used inside")  # `test_many_uses_never_meet` has them beside all others


@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("first", [pytest.param(use, marks=[pytest.mark.slow] * (use in DEAR)) for use in USES])
def test_two_uses_of_one_place_never_meet(first):
    @jax.jit
    def pairs():
        found = {}
        for second, use in USES.items():
            v = cursor().place
            found[second] = USES[first](v), use(v)
        return found

    for second, found in pairs().items():
        assert distinct(*found), second


@pytest.mark.usefixtures("hashes")
def test_many_uses_never_meet():
    @jax.jit
    def uses():
        v = cursor().place
        return [use(v) for _ in range(3) for use in USES.values()]

    assert distinct(*uses())


@pytest.mark.usefixtures("hashes")
def test_numbered_and_traced_folds_never_meet():
    def loop(v):
        return jax.lax.scan(lambda w, i: (w, bits(w.fold(i))), v.fork(), jnp.arange(6))[1]

    @jax.jit
    def uses():
        v = cursor().place
        return [bits(v.fold(3)), loop(v), bits(v.fold(4)), loop(v), bits(v.fold(4)), bits(v.fold(3)), bits(v.fold(5))]

    assert distinct(*uses())


WORDS = (0, 1, -1, 2**32, 2**32 + 1, 2**32 - 1, -(2**32), 2**63 - 1, -(2**63))


def test_fold_numbers_never_meet():
    assert distinct(*(bits(cursor().fold(i)) for i in WORDS))
    assert distinct(*(bits(cursor().fold(i)) for i in (3, 2**32 + 3)), bits(cursor()["3"]))


def test_a_traced_fold_number_is_the_written_one():
    fold = jax.jit(lambda w, i: bits(w.fold(i)))
    for i in (np.int32(5), np.int32(-1), np.uint32(2**32 - 1), np.int8(-128), np.uint8(255)):
        assert np.array_equal(fold(cursor().fork(), i), bits(cursor().fork().fold(int(i)))), repr(i)
    with jax.enable_x64(True):
        for i in (np.int64(-1), np.int64(2**40 + 1)):
            assert np.array_equal(fold(cursor().fork(), i), bits(cursor().fork().fold(int(i)))), repr(i)


def test_each_of_many_rows_has_a_key_of_its_own():
    def keys(v):
        return jax.vmap(lambda v: jax.random.key_data(v.rng("a")))(v.stack(200_000))

    found = np.asarray(jax.jit(keys)(cursor().fork())).astype(np.uint64)
    assert len(np.unique(found[:, 0] << np.uint64(32) | found[:, 1])) == 200_000
    assert len(np.unique(found[:, 0])) < 200_000  # by 32 bits some would share one


def test_a_key_of_another_generator_draws_by_all_bits_of_its_place():
    v = sw.bind({}, {}, rng=jax.random.key(0, impl="rbg"), train=True)
    assert len({tuple(bits(v.fold(i)).tolist()) for i in range(5)}) == 5


@pytest.mark.parametrize("i", [1.0, True, "1", None, 2**63, np.ones(2, int), jnp.float32(1)])
def test_fold_takes_one_integer(i):
    with pytest.raises(sw.ConfigError, match=r"place: fold\(i\) takes one integer from -2\*\*63 to 2\*\*63 - 1, got"):
        cursor().place.fold(i)


def test_names_that_look_alike_are_other_names():
    names = ("1", "01", "001", "١", "²", "4294967297", "one")
    assert distinct(*(bits(cursor()[name]) for name in names))
    assert np.array_equal(bits(cursor()["1"]), bits(cursor()[1]))
    params, _ = sw.init(lambda v, x: [L.Dense(4)(v[name], x) for name in names], 0, np.ones((1, 3), "float32"))
    assert len({leaf["kernel"].tobytes() for leaf in params.values()}) == len(names)


def test_a_tied_sub_tree_drawn_twice_gets_fresh_keys():
    twice = lambda v, x: [L.Dropout(0.5)(v.drop, x) for _ in range(2)]  # noqa: E731
    a, b = jax.jit(lambda x: sw.apply(twice, {}, {}, x, rng=0, train=True)[0])(np.ones(64, "float32"))
    assert not np.array_equal(a, b)


def test_a_fork_carries_its_place():
    """The path is a label, yet each place draws its own: the hash crosses as data."""
    f, draw = cursor().fork(), jax.jit(bits)
    assert distinct(*(draw(f.blocks[i]) for i in range(4)))
    assert np.array_equal(draw(cursor().fork().blocks[2]), bits(cursor().fork().blocks[2]))


def test_drawing_before_and_after_a_crossing():
    f, draw = cursor().fork(), jax.jit(bits)
    assert distinct(draw(f), bits(f), draw(f), draw(f.a), draw(f), *(draw(f) for _ in range(3)))
    f = cursor().fork()
    assert distinct(bits(f), draw(f), bits(f))
    f = cursor().fork()
    assert distinct(bits(f.a.b), draw(f.a.c), draw(f.a), draw(f.a.c.d))


@pytest.mark.usefixtures("hashes")
def test_uses_inside_and_outside_never_meet():
    f = cursor().fork()
    inside = jax.jit(lambda w: jnp.stack([bits(w), *(bits(w.fork()) for _ in range(3)), jax.jit(bits)(w)]))
    draws = [inside(f), bits(f), inside(f), *(bits(f.fork()) for _ in range(3)), inside(f.fork()), inside(f)]
    assert distinct(*draws)


def call(f, w):
    return jax.jit(f)(w)


def loop(f, w):
    return jax.lax.scan(lambda w, _: (w, f(w)), w, None, 2)


def accepts(w):
    """Keeps the first cursor that it gets back."""
    step, drawn = jax.jit(lambda w: (w, bits(w))), []
    for i in range(4):
        new, y = step(w)
        w = new if i == 0 else w
        drawn.append(y)
    return drawn


def debug_info(w):
    return call(bits, w)


STORIES = {  # what once gave the same numbers twice
    "a helper within itself": lambda w: call(
        lambda w: jnp.stack([call(bits, w), call(lambda w: bits(w), w), bits(w)]), w
    ),
    "a loop's helper within itself": lambda w: loop(lambda w: jnp.stack([loop(bits, w)[1], loop(bits, w)[1]]), w)[1],
    "a returned one used again": accepts,
    "handed out twice": lambda w: [bits(v) for v in jax.jit(lambda w: (w, w))(w)],
    "handed out twice by rows": lambda w: [jax.vmap(bits)(v) for v in jax.vmap(lambda w: (w, w))(w.stack(3))],
    "carried twice": lambda w: jax.lax.scan(
        lambda c, i: ((c[1].a, c[1]), jnp.stack([bits(c[0].fold(i)), bits(c[1])])), (w.fork(), w.fork()), jnp.arange(3)
    )[1],
    "one line, two transforms": lambda w: [
        f(w)
        for f in (jax.jit(bits), functools.partial(jax.lax.cond, True, bits, bits), jax.jit(bits), jax.checkpoint(bits))
    ],
    "steps of one number": lambda w: jax.lax.scan(lambda w, i: (w, bits(w.fold(i // 2))), w, jnp.arange(4))[1],
    "copies": lambda w: [bits(w := jax.tree.map(lambda a: a, w)) for _ in range(3)],
    "a name of JAX's": lambda w: [debug_info(w) for _ in range(3)],
    "twice in one call": lambda w: [jax.jit(lambda a, b: jnp.stack([bits(a), bits(b)]))(w, w) for _ in range(3)],
}


@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_stories_of_one_key(story):
    assert distinct(*story(cursor().fork()))
    assert distinct(*jax.jit(lambda w: story(w))(cursor().fork()))


def test_a_condition_does_not_draw():
    def condition(c):
        return jax.random.uniform(c[0].rng("go")) < c[1]

    with pytest.raises(sw.EffectError, match="in the condition of a while_loop would give what its body draws"):
        jax.lax.while_loop(condition, lambda c: c, (cursor().fork(), 0.5))


def test_a_crossing_is_the_same_whether_jax_traces_or_not():
    """JAX flattens the arguments of a jitted function once more where it traces it."""
    draw = jax.jit(bits)
    first, again = draw(cursor().fork()), draw(cursor().fork())
    assert np.array_equal(first, again)
    assert np.array_equal(first, bits(cursor()))


CROSSINGS = {
    "jit": lambda v: jax.jit(bits)(v),
    "vmap": lambda v: jax.vmap(lambda v, x: bits(v), in_axes=(None, 0))(v, jnp.ones(3)),
    "closed over by vmap": lambda v: jax.vmap(lambda x: bits(v))(jnp.ones(3)),
    "closed over by scan": lambda v: jax.lax.scan(lambda c, x: (c, bits(v)), 0, jnp.ones(3))[1],
    "closed over by jit": lambda v: jax.jit(lambda: bits(v))(),
}


LINES = {
    "jit": r"jax.jit\(f\)\(v.fork\(\), x\)",
    "vmap": r'jax.vmap\(lambda key, x: f\(v.replace\(rng=key\), x\)\)\(jax.random.split\(v.rng\("rows"\), n\), x\)',
    "scan": r"jax.lax.scan\(lambda w, x: \(w, f\(w, x\)\), v.fork\(\), xs\)",
}
"""The line to write that the error names, by what one draws in."""


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_a_plain_cursor_leaves_its_key_behind(crossing):
    line = LINES[crossing.removeprefix("closed over by ")] if "closed" in crossing else r"v.fork\(\), v.fold\(i\) or"
    with pytest.raises(sw.EffectError, match=line):
        CROSSINGS[crossing](cursor().place)


@pytest.mark.parametrize("crossing", ["vmap", "closed over by scan", "closed over by vmap", "closed over by jit"])
def test_one_fork_does_not_serve_all_rows(crossing):
    with pytest.raises(sw.EffectError, match=LINES[crossing.removeprefix("closed over by ")]):
        CROSSINGS[crossing](cursor().place.fork())


@pytest.mark.parametrize(
    "within", [jax.jit, jax.checkpoint, jax.custom_vjp, lambda f: jax.vmap(f, (0, None), axis_size=2)]
)
def test_what_lost_its_key_is_read_and_raises_where_it_draws(within):
    def inside(v, x):
        return v.param("w", (), None) * x

    v, x = sw.bind({"w": jnp.float32(2)}, {}, rng=0), jnp.ones(3)
    assert jax.vmap(jax.jit(inside), in_axes=(None, 0))(v.fork(), x).tolist() == [2, 2, 2]
    with pytest.raises(sw.EffectError, match="every row would get the same numbers"):
        jax.vmap(jax.jit(lambda v, x: bits(v)), in_axes=(None, 0))(v.fork(), x)
    if within is not jax.custom_vjp:  # which is no transform of its own here
        with pytest.raises(sw.EffectError, match="the same numbers"):
            jax.vmap(lambda v, x: jax.jit(lambda v: bits(v))(v.fork()), in_axes=(None, 0))(v.fork(), x)


class TestAKeyOfTheCallers:
    """`rng=` inside a transform: a key of its own for each row or step, or an error where one draws."""

    def model(self, v, x):
        return L.Dropout(0.5)(v.drop, x)

    def run(self, key, x):
        return sw.apply(self.model, {}, {}, x, rng=key, train=True)[0]

    X = jnp.ones((3, 64))

    def test_one_for_each_row(self):
        keys = jax.random.split(jax.random.key(0), 3)
        rows = jax.jit(jax.vmap(self.run))(keys, self.X)
        steps = jax.jit(lambda: jax.lax.scan(lambda c, kx: (c, self.run(*kx)), 0, (keys, self.X))[1])()
        assert np.array_equal(rows, steps)
        assert len({row.tobytes() for row in np.asarray(rows)}) == 3
        alike = jax.vmap(self.run)(jnp.broadcast_to(keys[0], (3,)), self.X)  # asked for in so many words
        assert len({row.tobytes() for row in np.asarray(alike)}) == 1

    @pytest.mark.parametrize("key", [0, "raw", "typed", "traced"])
    @pytest.mark.parametrize(
        "loop",
        [
            lambda f, xs: jax.vmap(f)(xs),
            lambda f, xs: jax.lax.map(f, xs),
            lambda f, xs: jax.lax.scan(lambda c, x: (c, f(x)), 0, xs),
            lambda f, xs: jax.lax.fori_loop(0, 3, lambda i, c: f(xs[i]), xs[0]),
            lambda f, xs: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, xs[0])),
            lambda f, xs: jax.vmap(jax.grad(lambda x: f(x).sum()))(xs),
        ],
    )
    def test_one_for_all(self, loop, key):
        made = {"raw": jax.random.PRNGKey(0), "typed": jax.random.key(0)}.get(key, key)
        run = lambda key: loop(lambda x: self.run(key, x), self.X)  # noqa: E731
        run, made = (jax.jit(run), jax.random.key(0)) if key == "traced" else (run, made)
        with pytest.raises(
            sw.EffectError, match=r"drop: rng\('mask'\) cannot draw: rng= is a key from outside of jax\."
        ):
            run(made)

    def test_what_runs_once_takes_any(self):
        plain, (x, *_) = self.run(0, self.X[0]), self.X
        once = (
            jax.jit(lambda: self.run(0, x)),
            jax.jit(lambda: jax.checkpoint(lambda x: self.run(0, x))(x)),
            lambda: jax.grad(lambda x: self.run(jax.random.key(0), x).sum())(x),  # of ones: the mask again
            lambda: jax.lax.cond(x.sum() > 0, lambda: self.run(0, x), lambda: x),
            lambda: jax.vmap(self.run, in_axes=(0, None))(jax.random.key(0)[None], x)[0],
        )
        for f in once:
            assert np.array_equal(f(), plain)


@pytest.mark.usefixtures("hashes")
class TestOnManyDevices:
    """In a `jax.shard_map` a key that is the same on all devices draws only where that is said."""

    def each(self, f, v, *names):
        mesh = sw.mesh("data=4", devices=jax.devices()[:4])
        run = jax.shard_map(f, mesh=mesh, in_specs=P(*names), out_specs=P("data"), check_vma=False)
        return np.asarray(jax.jit(run)(v)).reshape(-1, 2)

    def test_the_same_key_is_refused(self):
        for f in (bits, lambda w: bits(w.fold(0)), lambda w: jax.jit(bits)(w), lambda w: bits(w.sub.fork())):
            with pytest.raises(
                sw.EffectError, match=r"each device along 'data' the same.*v.fold\(jax.lax.axis_index\('data'"
            ):
                self.each(f, cursor().place.fork())
        with pytest.raises(sw.EffectError, match="each device along 'data' the same"):
            self.each(jax.vmap(bits), cursor().place.stack(3))

    def test_parts_along_one_of_two_axes(self):
        mesh = sw.mesh("data=2,tensor=2", devices=jax.devices()[:4])
        both = P(("data", "tensor"))
        run = lambda spec: jax.shard_map(  # noqa: E731
            jax.vmap(bits), mesh=mesh, in_specs=spec, out_specs=both, check_vma=False
        )(cursor().place.stack(4))
        assert distinct(run(both))
        with pytest.raises(sw.EffectError, match="the same numbers"):
            run(P("data"))

    def test_what_comes_out_is_free_again(self):
        mesh = sw.mesh("data=4", devices=jax.devices()[:4])
        out = jax.shard_map(lambda w: w, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(cursor().fork())
        assert distinct(bits(out), bits(out))

    def test_a_key_for_each_device(self):
        by_index = self.each(lambda w: bits(w.fold(jax.lax.axis_index("data"))), cursor().place.fork())
        nested = self.each(lambda w: jax.jit(bits)(w.fold(jax.lax.axis_index("data")).fork()), cursor().place.fork())
        parts = self.each(jax.vmap(bits), cursor().place.stack(8), "data")
        assert (len(by_index), len(nested), len(parts)) == (4, 4, 8)
        for drawn in (by_index, nested, parts):
            assert distinct(drawn)

    def test_the_same_numbers_on_all_where_asked_for(self):
        drawn = self.each(lambda key: bits(cursor().replace(rng=key)), jax.random.key(0))
        assert len(drawn) == 4
        assert len(np.unique(drawn, axis=0)) == 1


def test_inside_a_transform_a_run_is_plain_again():
    def body(v, x):
        return jax.jit(bits)(v)  # without a fork of its own

    with pytest.raises(sw.EffectError, match=r"rng\('mask'\) needs a key"):
        jax.jit(sw.pure(body))(cursor().fork(), 0)
    again = jax.jit(sw.pure(lambda v: (jax.jit(bits)(v.fork()), jax.jit(bits)(v.fork()))))
    assert distinct(*again(cursor().fork())[0])


def test_a_key_nested_two_transforms_deep():
    one = jax.jit(jax.checkpoint(sw.pure(bits)))(cursor().fork())[0]
    assert np.array_equal(one, bits(cursor()))
    nested = jax.jit(jax.vmap(lambda v: jax.lax.scan(lambda c, v: (c, bits(v)), 0, v.stack(3))[1]))
    rows = np.asarray(nested(cursor().stack(2)))
    assert rows.shape == (2, 3, 2)
    assert distinct(rows)
    assert np.array_equal(rows[1, 2], bits(cursor()[1][2]))


BODIES = {
    "draws": lambda w, i: bits(w),
    "folds": lambda w, i: bits(w.fold(i)),
    "folds by a constant": lambda w, i: bits(w.fold(3)),
    "forks": lambda w, i: bits(w.fork()),
    "draws below": lambda w, i: bits(w.sub),
    "jits": lambda w, i: jax.jit(bits)(w),
    "folds what it jits": lambda w, i: jax.jit(bits)(w.fold(i)),
    "remat": lambda w, i: jax.checkpoint(bits)(w.fork()),
    "folds twice": lambda w, i: bits(w.fold(i).fold(i)),
}


@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_fork_in_a_carry(body):
    """Each step draws other numbers, and so do steps of a loop in a loop and what comes after it."""

    def loop(w):
        return jax.lax.scan(lambda w, i: (w, body(w, i)), w, jnp.arange(3))

    def while_loop(w):
        out = jnp.zeros((3, 2), jnp.uint32)
        step = lambda c: (c[0] + 1, c[1], c[2].at[c[0]].set(body(c[1], c[0])))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < 3, step, (0, w, out))[1:]

    @jax.jit
    def uses(w):
        w, rows = jax.lax.scan(lambda w, _: loop(w), w, None, 2)
        kept = jax.lax.scan(lambda w, _: (w, loop(w)[1]), w, None, 2)  # the inner loop's cursor thrown away
        again, whiles = jax.lax.scan(lambda w, _: while_loop(w), kept[0], None, 2)
        return rows, kept[1], whiles, bits(again), bits(again.fold(0)), bits(again.fork())

    drawn = uses(cursor().fork())
    assert sum(np.size(rows) for rows in drawn) == 2 * (6 + 6 + 6 + 3)
    assert distinct(*drawn)


def test_a_stacked_cursor_does_not_draw():
    with pytest.raises(sw.EffectError, match=r"rng\('mask'\) on a stacked cursor; pass it through jax.vmap or"):
        bits(cursor().stack(3))


def test_another_key():
    v = cursor()
    assert np.array_equal(bits(v.a.replace(rng=5)), bits(cursor(5).a))
    with pytest.raises(sw.EffectError, match=r"needs a key: pass rng= to sw.apply or sw.bind"):
        bits(sw.bind({}))
    with pytest.raises(sw.EffectError, match="needs a key"):
        jax.jit(bits)(v.fork().replace(rng=5))  # bound here, so it takes a fork of its own to cross
    for key in (jax.random.key(3), jax.random.PRNGKey(3), 3, np.int64(3)):
        assert np.array_equal(bits(sw.bind({}, rng=key)), bits(cursor(3)))
    for wrong in ("3", 1.5, True, np.ones(3, "float32"), jax.random.split(jax.random.key(0))):
        with pytest.raises(sw.ConfigError, match=r"expected a random key \(jax.random.key\(0\)\) or an integer seed"):
            cursor(wrong)


def drop_all(layer, width=8):
    x = np.ones((6, width), "float32")
    return np.asarray(jax.jit(lambda x: sw.apply(lambda v, x: layer(v.here, x), {}, {}, x, rng=0, train=True)[0])(x))


def test_remat_and_plain_drop_the_same():
    assert np.array_equal(drop_all(L.Dropout(0.5)), drop_all(L.Remat(L.Dropout(0.5))))
    two = L.Sequential([L.Dropout(0.5), L.Dropout(0.5)])
    assert np.array_equal(drop_all(two), drop_all(L.Remat(two)))


@pytest.mark.costs("some of it runs without jit, op by op, which is what it is about")
def test_scanned_and_unrolled_drop_the_same():
    block = L.Sequential([L.Dropout(0.2), L.Remat(L.Dropout(0.2))])
    by_hand = lambda v, x: [x := block(v[i], x) for i in range(3)][-1]  # noqa: E731
    assert np.array_equal(drop_all(L.Scan(block, 3)), drop_all(by_hand))
    assert np.array_equal(drop_all(L.Scan(block, 3, remat="nothing_saveable")), drop_all(by_hand))
    with jax.disable_jit():
        assert np.array_equal(drop_all(L.Scan(block, 3)), drop_all(by_hand))


def test_every_row_and_step_drops_its_own():
    rows = drop_all(L.Vmap(L.Dropout(0.5), 4, in_axes=None))
    assert len({tuple(row) for row in rows.reshape(4, -1).tolist()}) == 4


def test_a_scanned_stack_without_variables():
    """Nothing to scan over but keys, and in eval mode not even those."""
    x = np.ones(3, "float32")
    for layer in (L.Scan(L.Dropout(0.5), 3), L.Vmap(L.Dropout(0.5), 3, in_axes=None)):
        y, _ = sw.apply(lambda v, x, layer=layer: layer(v.here, x), {}, {}, x)
        assert np.array_equal(y, np.ones_like(y))
