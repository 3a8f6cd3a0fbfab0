"""What the devices do in a few steps, as a trace for a viewer, and how much memory they took."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

from train.metrics import Row


class Profiler:
    """Writes a trace of some steps of a training loop.

    https://ui.perfetto.dev opens the file `*.trace.json.gz`, XProf and TensorBoard the folder.

    Args:
        folder: Where to write.
        steps: Numbers, from 1, of the first and the last step in the trace; None: no trace. Of a
            run that is resumed between them, the rest is traced.
        write: Whether to write it. Of several processes one does; the others read results at the
            same steps all the same, or they would not agree when to stop.
    """

    def __init__(
        self,
        folder: Path | None = None,
        steps: tuple[int, int] | None = None,
        *,
        write: bool = True,
    ):
        self._folder, self._steps, self._write = folder, steps, write
        self._running = False

    def due(self, done: int) -> bool:
        """Whether a trace begins or ends after `done` steps: nothing should be in flight then."""
        first, last = self._steps or (0, 0)
        return (first <= done + 1 <= last) != self._running

    def switch(self, done: int) -> None:
        """Begin or end the trace after `done` steps, if that is due."""
        if self.due(done) and self._running:
            self.close()
        elif self.due(done):
            self._running = True
            if self._write:
                jax.profiler.start_trace(str(self._folder))

    def step(self, number: int) -> AbstractContextManager[Any]:
        """Name a step in the trace."""
        if self._running:
            return jax.profiler.StepTraceAnnotation("train", step_num=number)
        return nullcontext()

    def close(self) -> None:
        """End the trace early if it is running."""
        if self._running:
            self._running = False
            if self._write:
                jax.profiler.stop_trace()


def peak_memory() -> Row:
    """Return `memory_gib`, the most memory that one of the devices had in use since the start.

    Of the devices of this process; nothing where the backend does not tell, as on CPUs.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"memory_gib": max(peaks) / 2**30} if peaks else {}
