"""The contexts of a session, and spare ones that are made while others run."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from llmtrt.runtime.context import Context, Shapes

Place = tuple[str, int]  # a plan and a profile of it


class ContextPool:
    """Gives a context to each key that asks for one, for good: a captured graph wants one whose shapes stay. That of no
    key serves steps that are not captured.

    ``make(plan, profile)`` makes one, in any thread. It takes TensorRT 8 ms a layer (TensorRT-RTX 1.6.1, H100), for which
    a sequence would stop at each new context bucket; it takes them without Python's lock, so a spare context can be made
    while steps run.
    """

    def __init__(self, make: Callable[[str, int], Context]):
        self._make = make
        self._given: dict[tuple, Context] = {}
        self._spare: dict[Place, Context] = {}
        self._needed: dict[tuple, int] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._coming: tuple[Place, Future[Context | None]] | None = None

    def get(self, plan: str, profile: int, *key: object) -> Context:
        """The context of ``key`` in that profile; the spare one, or a new one, when it is first asked for."""
        if (plan, profile, *key) not in self._given:
            self._given[plan, profile, *key] = self._spare_of((plan, profile))
            del self._spare[plan, profile]
        return self._given[plan, profile, *key]

    def needs(self, plan: str, profile: int, shapes: Shapes) -> int:
        """The bytes of activation memory for the inputs' ``shapes``; where that is not known yet, it is asked of a context
        whose shapes may change, which takes TensorRT some milliseconds: that of no key, or a spare one."""
        key = plan, profile, *shapes.items()
        if key not in self._needed:
            context = self._given.get((plan, profile)) or self._spare_of((plan, profile))
            self._needed[key] = context.set_shapes(shapes)
        return self._needed[key]

    def make_ahead(self, plan: str, profile: int) -> None:
        """Begins to make a spare context of the profile, where there is none."""
        if (plan, profile) in self._spare or self._coming:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "llmtrt-context")
        self._coming = (plan, profile), self._thread.submit(self._attempt, plan, profile)

    def settle(self) -> None:
        """Waits for what ``make_ahead`` began: TensorRT makes one context at a time, and none during a capture."""
        if self._coming:
            place, future = self._coming
            wait([future])  # where that is interrupted, it is still coming
            self._coming = None
            if (made := future.result()) is not None:
                self._spare[place] = made

    def close(self) -> None:
        """Lets go of every context, once nothing runs them."""
        self.settle()
        if self._thread is not None:
            self._thread.shutdown()
        self._given, self._spare, self._thread = {}, {}, None

    def _spare_of(self, place: Place) -> Context:
        self.settle()
        if place not in self._spare:
            self._spare[place] = self._make(*place)
        return self._spare[place]

    def _attempt(self, plan: str, profile: int) -> Context | None:
        try:
            return self._make(plan, profile)
        except Exception:  # noqa: BLE001
            return None  # whoever needs it makes it then, and hears why not
