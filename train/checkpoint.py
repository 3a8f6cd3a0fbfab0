"""Checkpoints of a training run: Orbax for arrays, JSON for the rest. Nothing is unpickled."""

import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.state import TrainState


class Checkpoints:
    """The checkpoints in one folder, each named by its step; a context manager.

    A checkpoint is written in the background into a temporary folder and renamed when complete,
    so a killed process never leaves half of one behind.

    Args:
        folder: Made if it does not exist.
        keep: How many of the newest are kept, at least 1.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint must be kept, got {keep}")
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers.LatestN(self._keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=True)
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
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(vars(state)), extra=ocp.args.JsonSave(extra)
        )
        self._manager.save(step, args=arguments)

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the newest readable checkpoint, or None if there is none at all.

        A checkpoint that cannot be read is renamed to `<step>.unreadable`, with a warning, and
        the one before it is tried.

        Args:
            abstract_state: ShapeDtypeStructs with the shardings that the arrays shall have.

        Raises:
            RuntimeError: There are checkpoints, but none can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract_state)
            except Exception as error:  # Orbax and TensorStore raise many types
                failures.append(f"{self.folder / str(step)}: {_first_line(error)}")
                warnings.warn(f"cannot read checkpoint {failures[-1]}", stacklevel=2)
                continue
            self._set_aside_after(step)
            return restored
        if failures:
            raise RuntimeError("no readable checkpoint:\n  " + "\n  ".join(failures))
        return None

    def _restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(vars(abstract_state)), extra=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=arguments)
        return type(abstract_state)(**restored["state"]), restored["extra"]

    def _set_aside_after(self, step: int) -> None:
        """Rename every checkpoint later than `step` to `<step>.unreadable`, or a free name."""
        later = [name for name in self.steps() if name > step]
        if not later:
            return
        self._manager.close()
        for name in later:
            names = itertools.chain([""], map("-{}".format, itertools.count(2)))
            places = (self.folder / f"{name}.unreadable{number}" for number in names)
            free = next(place for place in places if not place.exists())
            (self.folder / str(name)).rename(free)
        self._manager = self._open()

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._manager.close()


def abstract(state: Any, shardings: Any) -> Any:
    """Return ShapeDtypeStructs with shardings, for `Checkpoints.restore`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
