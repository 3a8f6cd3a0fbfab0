"""Several processes, each with its own devices, that train one model: starting, stopping, failing.

All run the same program and take the same decisions. What only one of them knows, a signal or that
its time is up, travels with its rows of the batch through the compiled step, so that all learn it
with the result of the same step.
"""

import json
import os
import secrets
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.options import Options

HEARTBEAT_SECONDS = 30
"""A process that was silent for so long is taken for dead, and the others end."""
EXPORT_SECONDS = 3600
"""So long the others wait at the end for the first process, which exports."""
PEER_FAILED = 75
"""Exit code of a process that ends because of another; starting all again resumes the run."""


def start(config: Options) -> None:
    """Join the other processes, if the options or the environment say that there are some.

    `--coordinator auto` finds them by SLURM, Open MPI or Kubernetes, as `jax.distributed` does.
    Call it before anything else of JAX.

    Raises:
        ValueError: A number of processes without a coordinator, or the reverse.
    """
    if config.coordinator is None:
        if (config.processes, config.process) != (1, 0):
            raise ValueError(
                "several processes need --coordinator HOST:PORT, an address of process 0, got "
                f"processes={config.processes}, process={config.process} and none"
            )
        return
    found: dict[str, Any] = {}
    if config.coordinator != "auto":
        if not 0 <= config.process < config.processes:
            raise ValueError(
                f"process must be from 0 to processes - 1, got process={config.process} and "
                f"processes={config.processes}"
            )
        found = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
    jax.distributed.initialize(
        **found,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=EXPORT_SECONDS,
    )


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def everywhere(true: bool) -> bool:
    """Whether something is true in every process."""
    return true if jax.process_count() == 1 else bool(_gathered(np.bool_(true)).all())


def alike(value: Any) -> bool:
    """Whether every process has the same value, anything that JSON can hold."""
    if jax.process_count() == 1:
        return True
    seen = _gathered(np.uint32(zlib.crc32(json.dumps(value, sort_keys=True).encode())))
    return bool((seen == seen.flat[0]).all())


def shared(folder: Path) -> bool:
    """Whether every process sees what the first one writes into a folder.

    Raises:
        OSError: The first one cannot.
    """
    if jax.process_count() == 1:
        return True
    number = int(_gathered(np.uint32(secrets.randbits(32))).flat[0])
    path = folder / f".shared-{number:08x}"
    if first():
        path.touch(exist_ok=False)
    wait_for_all("shared folder")
    seen = everywhere(path.exists())
    if first():
        path.unlink()
    return seen


def _gathered(number: Any) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(number))


def require_alike(options: dict[str, Any], data: Any) -> None:
    """Refuse processes that were started with other options, or read other data.

    Args:
        options: All options as JSON holds them.
        data: The position in the data, which names them, as JSON holds it.

    Raises:
        ValueError: They differ between processes, in every process.
    """
    options = {name: value for name, value in options.items() if name != "process"}
    for what, value in (("options", options), ("data", data)):
        if not alike(value):
            raise ValueError(
                f"all processes need the same {what}, got different ones; this one has {value}"
            )


def wait_for_all(where: str) -> None:
    """Return when every process has come to the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def ending_together(run: Callable[[], Any], expected: tuple[type[Exception], ...] = ()) -> Any:
    """Run a program of several processes; if it fails in this one, end without waiting for others.

    They notice within `HEARTBEAT_SECONDS`: a failed process would otherwise wait for them to reach
    its end, and they for its part of the next step. The error is printed, and the exit code is 1,
    or `PEER_FAILED` where the error is that another process went away.

    Args:
        run: The program.
        expected: Errors whose message says everything, so that no traceback is printed.
    """
    try:
        return run()
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        _end(error, expected)


def _end(error: BaseException, expected: tuple[type[Exception], ...]) -> NoReturn:
    where = f"process {jax.process_index()} of {jax.process_count()}"
    if is_of_peer(error):
        print(
            f"{where}: another process went away, so this one ends; see what that one printed. "
            f"Start all of them again with the same command to go on from the newest checkpoint. "
            f"({type(error).__name__}: {str(error).splitlines()[0]})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PEER_FAILED)
    if isinstance(error, expected):
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)
    print(f"{where} failed; the others end, too", file=sys.stderr, flush=True)
    os._exit(1)


def is_of_peer(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a connection to another process."""
    if error is None:
        return False
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "gloo", "nccl", "heartbeat")
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError)
    return (of_runtime and any(sign in text for sign in signs)) or is_of_peer(error.__cause__)
