"""Contract 5: never the same key twice, or an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    "traced fold": lambda v: jax.lax.scan(lambda c, i: (c, bits(v.fold(i))), 0, jnp.arange(2))[1],
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


@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("first", USES)
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
        return jax.lax.scan(lambda c, i: (c, bits(v.fold(i))), 0, jnp.arange(6))[1]

    @jax.jit
    def uses():
        v = cursor().place
        w = cursor().place
        mixed = [bits(v.fold(3)), loop(v), bits(v.fold(4)), loop(v), bits(v.fold(4)), bits(v.fold(3)), bits(v.fold(5))]
        return mixed, loop(cursor().place), [bits(w.fold(i)) for i in range(6)]

    mixed, scanned, unrolled = uses()
    assert distinct(*mixed)
    assert np.array_equal(scanned, np.stack(unrolled))


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
    f = cursor().fork()
    assert distinct(jax.jit(bits)(f), bits(f))
    f = cursor().fork()
    bits(f)
    with pytest.raises(sw.EffectError, match=r"key has been used here and would give the same numbers again inside"):
        jax.jit(bits)(f)
    f = cursor().fork()
    bits(f.a.b)
    jax.jit(bits)(f.a.c)  # another place
    with pytest.raises(sw.EffectError, match="a: this cursor's key has been used here"):
        jax.jit(bits)(f.a)
    with pytest.raises(sw.EffectError, match="a/c/d: this cursor's key has been used here"):
        jax.jit(bits)(f.a.c.d)


CROSSINGS = {
    "jit": lambda v: jax.jit(bits)(v),
    "vmap": lambda v: jax.vmap(lambda v, x: bits(v), in_axes=(None, 0))(v, jnp.ones(3)),
    "scan": lambda v: jax.lax.scan(lambda c, x: (c, bits(v)), 0, jnp.ones(3))[1],
    "closed over by vmap": lambda v: jax.vmap(lambda x: bits(v))(jnp.ones(3)),
    "closed over by jit": lambda v: jax.jit(lambda: bits(v))(),
}


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_a_plain_cursor_leaves_its_key_behind(crossing):
    with pytest.raises(sw.EffectError, match=r"v.fork\(\), v.fold\(i\) or v.stack\(n\)"):
        CROSSINGS[crossing](cursor().place)


@pytest.mark.parametrize("crossing", ["vmap", "scan", "closed over by vmap", "closed over by jit"])
def test_one_fork_does_not_serve_all_rows(crossing):
    with pytest.raises(sw.EffectError, match="would give every row or step the same numbers"):
        CROSSINGS[crossing](cursor().place.fork())


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


def test_a_fork_in_a_carry():
    with pytest.raises(sw.EffectError, match="this cursor's key has been used here"):
        jax.lax.scan(lambda v, x: (v, bits(v)), cursor().fork(), jnp.ones(3))


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
