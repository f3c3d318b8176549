"""Times of steps, told from when their tokens come."""

import itertools

import pytest

from llmtrt.runtime import pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that is one second further each time."""
    ticks = itertools.count(10.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(ticks))


def test_only_a_step_behind_another_is_the_time_of_one(clock):
    timed = pace.Pace()
    timed.tokens = 3
    assert timed.step(0, behind=True) == (3, None, False)  # nobody knows when it began
    assert timed.step(0, behind=True) == (0, 1.0, True)
    assert timed.step(0, behind=False) == (0, 1.0, False)
    assert timed.step(0, behind=True) == (0, 1.0, False)  # its own begin waited for the one before
    assert timed.step(0, behind=True) == (0, 1.0, True)


def test_what_runs_alone_behind_a_drained_queue_is_not_the_time_of_one(clock):
    timed = pace.Pace()
    timed.step(0, behind=True)
    timed.tokens += 1  # the queue's last
    timed.drained()
    timed.tokens += 1
    assert timed.step(0, behind=True) == (2, 1.0, False)
    assert timed.step(0, behind=True) == (0, 1.0, True)


def test_what_else_took_time_does_not_count(clock):
    timed = pace.Pace()
    timed.step(0, behind=True)
    assert timed.step(1, behind=True) == (0, None, False)  # a shape was new
    assert timed.step(1, behind=True) == (0, 1.0, True)
    timed.tokens = 2
    timed.interrupt()
    assert timed.step(1, behind=True) == (0, None, False)
