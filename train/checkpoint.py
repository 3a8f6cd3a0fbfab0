"""Checkpoints of a training run: Orbax for arrays, JSON for the rest. Nothing is unpickled."""

import itertools
import json
import logging
import os
import re
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from train import distributed
from train.state import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, or none can be read."""


class Checkpoints:
    """The checkpoints in one folder, each named by its step; a context manager.

    A checkpoint is written in the background into a temporary folder and renamed when complete,
    so a killed process never leaves half of one behind; the next one removes such folders. Beside
    the arrays lies a fingerprint of each, because files of which bits flipped can still be read.

    Only one run at a time may use a folder.

    Args:
        folder: Made if it does not exist.
        keep: How many of the newest are kept, at least 1.

    Raises:
        ValueError: `keep` is less than 1.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint must be kept, got {keep}")
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Errors are raised besides.
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            pass  # Refused now rather than with the first save.
        self._keep = keep
        self._saving: int | None = None
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers.LatestN(self._keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=True, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Copy the state to the host and write it in the background.

        Args:
            step: Batches seen; saving a step twice is an error.
            state: May be donated to the next step as soon as this returns.
            extra: Anything that JSON can hold, such as the position in the data.

        Raises:
            CheckpointError: This or the save before it failed, for instance because the disk is
                full; the message names folder, step, reason and the newest complete checkpoint.
        """
        self.wait()
        record = _sign({"extra": extra, "fingerprints": fingerprints(state)})
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(vars(state)), extra=ocp.args.JsonSave(record)
        )
        with self._explained(step):
            self._manager.save(step, args=arguments)
        self._saving = step

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the newest readable checkpoint, or None if there is none at all.

        A checkpoint that cannot be read, or whose arrays are not those that were saved, is renamed
        to `<step>.unreadable`, with a warning, and the one before it is tried.

        Args:
            abstract_state: ShapeDtypeStructs with the shardings that the arrays shall have.

        Raises:
            CheckpointError: There are checkpoints, but none can be read; or other processes see
                other ones.
        """
        if not distributed.alike(self.steps()):
            raise CheckpointError(
                f"processes see different checkpoints, this one {self.steps()} in {self.folder}; "
                "--output must be a folder that all of them share"
            )
        failures = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract_state)
            except Exception as error:  # Orbax and TensorStore raise many types
                if distributed.is_of_peer(error):
                    raise
                failures.append(f"{self.folder / str(step)}: {_reason(error)}")
                warnings.warn(f"cannot read checkpoint {failures[-1]}", stacklevel=2)
                continue
            self._set_aside_after(step)
            return restored
        if failures:
            raise CheckpointError("no readable checkpoint:\n  " + "\n  ".join(failures))
        return None

    def _restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(vars(abstract_state)), extra=ocp.args.JsonRestore()
        )
        try:
            restored, error = self._manager.restore(step, args=arguments), None
        except Exception as failed:  # Orbax and TensorStore raise many types
            restored, error = {}, failed
        if not distributed.everywhere(error is None):
            raise error or OSError("another process cannot read it")
        state, record = type(abstract_state)(**restored["state"]), restored["extra"]
        _check(record, fingerprints(state))
        return state, record["extra"]

    def _set_aside_after(self, step: int) -> None:
        """Rename every checkpoint later than `step` to `<step>.unreadable`, or a free name."""
        later = [name for name in self.steps() if name > step]
        if not later:
            return
        self._manager.close()
        for name in later if distributed.first() else ():
            names = itertools.chain([""], map("-{}".format, itertools.count(2)))
            places = (self.folder / f"{name}.unreadable{number}" for number in names)
            free = next(place for place in places if not place.exists())
            (self.folder / str(name)).rename(free)
        distributed.wait_for_all("renamed")
        self._manager = self._open()

    def wait(self) -> None:
        """Return when everything saved is on disk.

        Raises:
            CheckpointError: It could not be saved.
        """
        step, self._saving = self._saving, None
        if step is None:
            return
        with self._explained(step):
            self._manager.wait_until_finished()
            if distributed.first() and not (self.folder / str(step)).is_dir():
                raise FileNotFoundError("it was not completed")

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turn any error into one that says what could not be saved, and what there is."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types
            complete = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
            after = (
                f"the newest complete checkpoint is step {max(complete)}, from which the same "
                "command goes on when the cause is removed"
                if complete
                else "no checkpoint is complete"
            )
            raise CheckpointError(
                f"cannot save step {step} in {self.folder}: {_reason(error)}; {after}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))
        finally:
            self._close()

    def _close(self) -> None:
        """Close Orbax's manager, which may repeat an error of a save that `wait` has raised."""
        try:
            self._manager.close()
        except Exception as error:  # Orbax and TensorStore raise many types
            logging.getLogger(__name__).debug("closing failed: %s", error)


def abstract(state: Any, shardings: Any) -> Any:
    """Return ShapeDtypeStructs with shardings, for `Checkpoints.restore`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


@contextmanager
def without_stray_errors() -> Iterator[None]:
    """Do not print what Orbax and TensorStore leave behind after an error that was raised.

    Coroutines and C++ threads that were still at work find their event loop closed. They say so
    when they end, so an exception that leaves the context leaves this in place.
    """
    hook, asyncio = sys.unraisablehook, logging.getLogger("asyncio")
    level = asyncio.level

    def filtered(found: Any) -> None:
        text = str(found.exc_value)
        if "Event loop is closed" not in text and "TensorStore details" not in text:
            hook(found)

    sys.unraisablehook = filtered
    asyncio.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    yield
    sys.unraisablehook = hook
    asyncio.setLevel(level)


def fingerprints(state: TrainState) -> dict[str, int]:
    """Return a number for each array by name that any change of one of its elements changes.

    Changes of several elements change it with a probability of 1 - 2**-32. It does not depend on
    how the array is spread over devices, on which it is computed.
    """
    paths = jax.tree_util.tree_flatten_with_path(vars(state))[0]
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): _fingerprint(leaf)
        for path, leaf in paths
    }
    return {name: int(number) for name, number in jax.device_get(found).items()}


@jax.jit
def _fingerprint(array: Array) -> UInt32[Array, ""]:
    """The sum, modulo 2**32, of a hash of the bits and the place of each element."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * width}").astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3, a permutation of the 32-bit numbers."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _sign(record: dict[str, Any]) -> dict[str, Any]:
    """Add the CRC-32 of a record, as it is after a way through JSON."""
    record = json.loads(json.dumps(record))
    return record | {"crc32": zlib.crc32(json.dumps(record, sort_keys=True).encode())}


def _check(record: dict[str, Any], found: dict[str, int]) -> None:
    """Raise ValueError if a record, or the arrays that it is about, are not those saved."""
    if _sign({name: value for name, value in record.items() if name != "crc32"}) != record:
        raise ValueError("the record beside the arrays has changed since it was saved")
    expected = record["fingerprints"]
    names = expected.keys() | found.keys()
    changed = sorted(name for name in names if expected.get(name) != found.get(name))
    if changed:
        raise ValueError(f"arrays have changed since they were saved: {', '.join(changed)}")


def _reason(error: Exception) -> str:
    """Return one line about an error; of those with a number, what the system says of it."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
