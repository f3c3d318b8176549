"""Contexts that are made while others run: each key keeps its own, and what fails meanwhile is told where it is needed."""

import threading

import pytest

from llmtrt.errors import UserError
from llmtrt.runtime import context_pool
from llmtrt.runtime.context_pool import ContextPool


class Making:
    """Makes contexts by number, as slowly as ``gate`` says, and notes the thread that each was made in."""

    def __init__(self):
        self.threads, self.gate, self.error = [], threading.Event(), None
        self.gate.set()

    def __call__(self, plan, profile):
        self.gate.wait(10)
        if self.error:
            raise self.error
        self.threads.append(threading.get_ident())
        return Numbered(f"{plan}, {profile}: {len(self.threads)}")


class Numbered:
    def __init__(self, name):
        self.name, self.asked = name, []

    def set_shapes(self, shapes):
        self.asked.append(shapes)
        return sum(size for shape in shapes.values() for size in shape)


@pytest.fixture
def making():
    return Making()


@pytest.fixture
def pool(making):
    pool = ContextPool(making)
    yield pool
    making.gate.set()
    pool.close()


def test_each_key_keeps_its_context(pool):
    one, other, elsewhere = pool.get("a", 0, 1, 256), pool.get("a", 0, 1, 512), pool.get("a", 1)
    assert [each.name for each in (one, other, elsewhere)] == ["a, 0: 1", "a, 0: 2", "a, 1: 3"]
    assert pool.get("a", 0, 1, 256) is one and pool.get("a", 1) is elsewhere


def test_a_context_is_made_in_a_thread_while_others_run(pool, making):
    pool.get("a", 0, 256)
    making.gate.clear()
    pool.make_ahead("a", 0)
    pool.make_ahead("a", 0)  # it is under way
    assert pool.get("a", 0, 256).name == "a, 0: 1" and len(making.threads) == 1  # nobody waits for it
    making.gate.set()
    assert pool.get("a", 0, 512).name == "a, 0: 2" and len(making.threads) == 2
    assert making.threads[0] == threading.get_ident() != making.threads[1]


def test_a_spare_one_is_enough(pool, making):
    pool.make_ahead("a", 0)
    pool.settle()
    pool.make_ahead("a", 0)
    pool.settle()
    assert len(making.threads) == 1
    pool.make_ahead("b", 0)
    assert pool.get("a", 0).name == "a, 0: 1" and pool.get("b", 0).name == "b, 0: 2"


def test_a_spare_one_tells_what_shapes_need_once(pool, making):
    assert pool.needs("a", 0, {"x": (2, 3)}) == pool.needs("a", 0, {"x": (2, 3)}) == 5
    assert pool.needs("a", 0, {"x": (2, 4)}) == 6
    given = pool.get("a", 0, 256)
    assert given.asked == [{"x": (2, 3)}, {"x": (2, 4)}] and len(making.threads) == 1
    assert pool.needs("a", 0, {"x": (2, 3)}) == 5 and len(making.threads) == 1
    pool.needs("a", 0, {"x": (9,)})  # of a new one: what was given keeps its shapes
    assert len(given.asked) == 2 and len(making.threads) == 2


def test_what_is_not_captured_is_asked_itself(pool, making):
    prefill = pool.get("a", 1)
    assert pool.needs("a", 1, {"x": (2, 3)}) == 5 and prefill.asked == [{"x": (2, 3)}] and len(making.threads) == 1


@pytest.mark.parametrize("kind", [UserError, RuntimeError, TypeError])
def test_what_fails_ahead_is_told_to_whoever_needs_it(pool, making, kind):
    making.error = kind("no room")
    pool.make_ahead("a", 0)
    pool.settle()
    with pytest.raises(kind, match="no room"):
        pool.get("a", 0)
    making.error = None
    assert pool.get("a", 0).name == "a, 0: 1"


def test_an_interrupted_wait_forgets_nothing(pool, making, monkeypatch):
    making.gate.clear()
    pool.make_ahead("a", 0)

    def interrupted(futures):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context_pool, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.get("a", 0)
    making.gate.set()
    assert pool.get("a", 0).name == "a, 0: 1" and len(making.threads) == 1


def test_closing_waits_for_what_is_under_way(pool, making):
    making.gate.clear()
    pool.make_ahead("a", 0)
    threading.Timer(0.05, making.gate.set).start()
    pool.close()
    assert len(making.threads) == 1 and not any("llmtrt-context" in each.name for each in threading.enumerate())
