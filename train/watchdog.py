"""Reports a training step that hangs."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import jax

from train.distributed import PEER_FAILED


class Watchdog:
    """Reports steps that hang on stderr, with the Python stack of every thread; a context manager.

    A step hangs if no step's result was read for `hung_after` seconds; a report is repeated after
    as many seconds each. What is not counted: the first step, which compiles, and what is done
    under `paused`. Waiting for data is.

    One of several processes (`jax.process_count()`) ends with its second report and the exit code
    `train.distributed.PEER_FAILED`, saving nothing: if another process died, the collective that it
    waits for never returns. A process on its own goes on.

    A thread watches, so it sees nothing while another one is in code that holds Python's global
    lock; waiting for a device does not.

    Args:
        hung_after: Seconds; None: do nothing.
    """

    def __init__(self, hung_after: float | None):
        self._hung_after = hung_after
        self._awaited: tuple[int, float] | None = None  # the step, and since when
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def saw(self, step: int) -> None:
        """Take note that the result of a step was read."""
        self._awaited = step + 1, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent inside."""
        awaited, self._awaited = self._awaited, None
        try:
            yield
        finally:
            self._awaited = awaited and (awaited[0], time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self._hung_after is not None:
            arguments = (self._hung_after, jax.process_count() > 1)
            self._thread = threading.Thread(target=self._watch, args=arguments, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def _watch(self, hung_after: float, several: bool) -> None:
        awaited, reports = None, 0
        while not self._ended.wait(min(1.0, hung_after / 10)):
            if self._awaited is not awaited:
                awaited, reports = self._awaited, 0
            if awaited is None or time.monotonic() - awaited[1] < (reports + 1) * hung_after:
                continue
            reports += 1
            ending = several and reports == 2
            _report_hung(*awaited, "; ending this process" if ending else "")
            if ending:
                os._exit(PEER_FAILED)


def _report_hung(step: int, since: float, note: str) -> None:
    """Print what hangs, and the stack of every thread."""
    seconds = time.monotonic() - since
    clock = datetime.fromtimestamp(time.time() - seconds).isoformat(" ", "seconds")
    print(
        f"\nstep {step}, or one queued behind it, hangs: no result since "
        f"{clock}, for {seconds:.1f} s{note}; the stack of every thread:",
        file=sys.stderr,
        flush=True,
    )
    try:
        number = sys.stderr.fileno()
    except (AttributeError, OSError):  # not a file, for instance in a notebook
        number = 2
    faulthandler.dump_traceback(number)
