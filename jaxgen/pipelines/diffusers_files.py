"""What the pipeline folders of diffusers have in common: JSON, and the scheduler's shift."""

from pathlib import Path
from typing import Any

from jaxgen.checkpoints import parse_json_object, write_json
from jaxgen.sampling import FlowMatchingSchedule

EULER = "FlowMatchEulerDiscreteScheduler"

_SCHEDULER = "scheduler/scheduler_config.json"
# Options of diffusers' schedulers that make other noise levels than a shift does.
_OTHER_LEVELS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def load_schedule(folder: Path) -> FlowMatchingSchedule:
    """Return the schedule with the shift of a pipeline's scheduler, if there is one."""
    path = folder / _SCHEDULER
    if not path.is_file():
        return FlowMatchingSchedule()
    values = read_json(path)
    other = [name for name in _OTHER_LEVELS if values.get(name)]
    if other:
        raise ValueError(
            f"{path}: {other[0]} must be false or null, got {values[other[0]]!r}: noise levels can "
            "be shifted only"
        )
    found = [name for name in ("flow_shift", "shift") if values.get(name) is not None]
    if not found:
        return FlowMatchingSchedule()
    shift = values[found[0]]
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise ValueError(f"{path}: {found[0]} must be a number, got {shift!r}")
    try:
        return FlowMatchingSchedule(float(shift))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_schedule(folder: Path, schedule: FlowMatchingSchedule) -> None:
    """Write a schedule as a scheduler of diffusers."""
    values = {"_class_name": EULER, "num_train_timesteps": 1000, "shift": schedule.shift}
    write_json(folder / _SCHEDULER, values)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an error names its path."""
    return parse_json_object(path.read_bytes(), str(path))
