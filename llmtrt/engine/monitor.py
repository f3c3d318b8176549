"""The progress of a TensorRT build, and the way to stop it."""

from typing import Any

from llmtrt.engine.flavor import Flavor
from llmtrt.progress import Report


def make_monitor(flavor: Flavor, report: Report) -> Any:
    """An IProgressMonitor of the flavor: reports the steps of the outermost phase, noting the innermost.

    After ``cancel()`` the build ends at its next step, which may be seconds away, so a last note says "stopping…"; what
    ``report`` raised, which cannot pass through TensorRT, ends it too and is kept in ``error``. TensorRT keeps no
    reference of its own: hold it.
    """
    trt = flavor.module

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.stop, self.error = False, None
            self._outer, self._done, self._total, self._open = "", 0, 1, []

        def cancel(self):
            if not self.stop:
                self._report("stopping…")
            self.stop = True

        def _report(self, note):
            if self.stop:
                return
            try:
                report(self._done, self._total, note)
            except BaseException as error:  # noqa: BLE001 - it is raised again when the build has ended
                self.stop, self.error = True, error

        def phase_start(self, name, parent, steps):
            if parent is None:
                self._outer, self._done, self._total = name, 0, steps
            self._open.append(name)
            self._report(name)

        def step_complete(self, name, step):
            if name == self._outer:
                self._done = step + 1
                self._report(self._open[-1] if self._open else name)
            return not self.stop

        def phase_finish(self, name):
            if name in self._open:
                self._open.remove(name)

    return Monitor()
