"""What may differ between GPUs without changing a bit of the result.

The choices for a GPU are in `kernels_pallas/tuning/`, written by `python -m kernels_pallas.tune`;
other GPUs get the defaults. Nothing is measured unless asked for.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "tuning"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the Hopper kernels use their time and memory.

    Attributes:
        stages: most tiles in flight; fewer where shared memory does not hold as many.
        stagger: nanoseconds by which the last computing warpgroup of the backward kernels starts
            after the first. In step, all would wait for the tensor cores together and then
            exponentiate together; half a step is best.

    Raises:
        ValueError: a negative number, or no stage.
    """

    stages: int = 4
    stagger: int = 2000

    def __post_init__(self):
        if self.stages < 1 or self.stagger < 0:
            raise ValueError(
                "stages must be at least 1 and stagger at least 0, "
                f"got {self.stages} and {self.stagger}"
            )


_chosen: contextvars.ContextVar[Tuning | None] = contextvars.ContextVar("tuning", default=None)


@contextlib.contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """Programs traced inside use this tuning."""
    token = _chosen.set(tuning)
    try:
        yield
    finally:
        _chosen.reset(token)


def file_for(device_kind: str) -> Path:
    """Where the choices for a kind of device, such as "NVIDIA H100 80GB HBM3", are stored."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower())}.json"


def tuning_for(device_kind: str, head_dim: int) -> Tuning:
    """Returns the choices for a device; the defaults if there are none."""
    return _chosen.get() or _stored(file_for(device_kind), 64 if head_dim <= 64 else 128)


@functools.cache
def _stored(file: Path, head_dim: int) -> Tuning:
    if not file.is_file():
        return Tuning()
    choices = json.loads(file.read_text(encoding="utf-8"))["sage_attention"]
    return Tuning(**choices.get(str(head_dim), {}))
