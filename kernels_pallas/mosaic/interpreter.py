"""Run the kernels on a CPU, with races, out-of-bounds reads and uninitialized memory detected."""

import contextlib
import contextvars
from collections.abc import Iterator

_interpreting = contextvars.ContextVar("interpreting", default=False)


def interpreting() -> bool:
    """Whether kernels called here run in the interpreter."""
    return _interpreting.get()


@contextlib.contextmanager
def interpreted(*, detect_races: bool = True) -> Iterator[None]:
    """Runs kernels that are called inside on the CPU, in Mosaic GPU's interpreter.

    For tests. Barriers, copies and indices are the real ones. Products on tensor cores and the
    packing of bytes, which the interpreter lacks, are computed by their definition
    (`mosaic.products`). Uninitialized memory reads as NaN and reads out of bounds raise.

    Args:
        detect_races: also look for races, which raise.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # slow to import, and only for tests

    parameters = plgpu.InterpretGPUParams(
        detect_races=detect_races,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
    )
    token = _interpreting.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(parameters):
            yield
    finally:
        _interpreting.reset(token)
