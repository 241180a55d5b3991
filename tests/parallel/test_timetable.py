"""Pipeline schedules: every piece of work once and in an order that can be, and bubbles as the theory has them."""

import numpy as np
import pytest

import sapwood as sw
from sapwood.parallel.pipeline import engine, timetable
from sapwood.parallel.pipeline.settings import Pipeline

SIZES = [(4, 4), (4, 8), (4, 16), (2, 6), (8, 32), (1, 3)]


def show(name, table, bubble):
    print(f"\n{name}: bubble {table.bubble:.4f}, in theory {bubble:.4f}\n{table}")


@pytest.mark.parametrize(("s", "m"), SIZES)
def test_pipeline_bubble_of_gpipe(s, m):
    table = timetable.forward(s, m)
    show(f"GPipe, {s} stages, {m} micro-batches", table, (s - 1) / (m + s - 1))
    assert table.bubble == pytest.approx((s - 1) / (m + s - 1), abs=1e-12)
    assert table.ticks == m + s - 1


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize(("s", "m"), [(4, 4), (4, 8), (2, 6), (8, 32)])
def test_pipeline_bubble_of_interleaved(s, m, r):
    table = timetable.forward(s, m, r)
    show(f"interleaved, {s} stages, {m} micro-batches, {r} rounds", table, (s - 1) / (r * m + s - 1))
    assert table.bubble == pytest.approx((s - 1) / (r * m + s - 1), abs=1e-12)


@pytest.mark.parametrize(("s", "m"), SIZES)
def test_pipeline_bubble_and_memory_of_one_forward_one_backward(s, m):
    table = timetable.forward_backward(s, m)
    show(f"1F1B, {s} stages, {m} micro-batches", table, 2 * (s - 1) / (m + 2 * (s - 1)))
    assert table.bubble == pytest.approx(2 * (s - 1) / (m + 2 * (s - 1)), abs=1e-12)
    assert timetable.in_flight(table) == min(m, 2 * s - 1)
    assert timetable.in_flight(timetable.forward(s, m)) == m


@pytest.mark.parametrize(("s", "m", "r"), [(4, 8, 1), (4, 8, 2), (3, 6, 3), (2, 2, 4)])
def test_each_piece_of_work_is_done_once_and_a_tick_after_what_it_needs(s, m, r):
    table = timetable.forward(s, m, r)
    when = table.when()  # (stages, rounds, micro-batches)
    assert (when >= 0).all()
    assert np.count_nonzero(table.microbatch >= 0) == s * m * r
    np.testing.assert_array_equal(when[1:] - when[:-1], 1)  # sent on at once
    np.testing.assert_array_equal(when[0, 1:] - when[-1, :-1], 1)  # from the last stage to the first, too: none waits
    for ends, stage in ((table.entering(), 0), (table.leaving(), s - 1)):
        assert [b for b in ends if b >= 0] == list(range(m))  # in order, as the streams of inputs and outputs are
        assert (table.microbatch[ends >= 0, stage] == ends[ends >= 0]).all()


def test_a_backward_pass_follows_that_of_the_next_stage():
    table = timetable.forward_backward(4, 6)
    first, second = (
        np.array([[list(t[:, s]).index(b) for b in range(6)] for s in range(4)])
        for t in (table.microbatch, table.backward)
    )
    np.testing.assert_array_equal(first[-1], second[-1])  # the last stage turns round at once
    np.testing.assert_array_equal(second[:-1] - second[1:], 1)
    assert (first[1:] - first[:-1] == 1).all()


@pytest.mark.parametrize(("s", "r"), [(4, 2), (2, 4), (3, 2), (4, 4), (4, 3), (8, 2), (5, 1)])
def test_pieces_are_dealt_by_permutations(s, r):
    held = [[stage * r + i for i in range(r)] for stage in range(s)]
    got = [[None] * r for _ in range(s)]
    for to, sent, kept in engine.deal(s, r):
        assert sorted(to) == list(range(s))
        for stage in range(s):
            assert got[to[stage]][kept[to[stage]]] is None
            got[to[stage]][kept[to[stage]]] = held[stage][sent[stage]]
    assert got == [[turn * s + stage for turn in range(r)] for stage in range(s)]


def test_rounds_need_a_multiple_of_the_stages():
    with pytest.raises(sw.ConfigError, match="6 micro-batches are no multiple of 4; take 4 or 8"):
        timetable.forward(4, 6, 2)
    with pytest.raises(sw.ConfigError, match="2 micro-batches are no multiple of 4; take 4"):
        timetable.forward(4, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "gpip"}, "schedule='gpip'.*did you mean 'gpipe'"),
        ({"schedule": 3}, "schedule=3.*there are gpipe, interleaved, 1f1b"),
        ({"microbatches": 0}, "microbatches=0"),
        ({"rounds": True}, "rounds=True"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(sw.ConfigError, match=message):
        Pipeline(**options)
