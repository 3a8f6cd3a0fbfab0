"""Writes golden files of noise levels, computed by diffusers' scheduler.

Usage: write_schedules.py FOLDER. Run by `goldens/make.sh`, which installs what this needs.

`schedules.safetensors` holds `SHIFT.STEPS`: the levels of that shift and that many steps, the final
zero included. Shift 3 is that of Stable Diffusion 3 and 3.5.
"""

import sys
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

SHIFTS = (1.0, 3.0, 5.0)
STEPS = (1, 2, 8, 28, 50, 1000)


def levels(shift: float, steps: int) -> torch.Tensor:
    """Returns the noise levels from the first to the final zero."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def main() -> None:
    """Writes the file."""
    folder = Path(sys.argv[1])
    arrays = {f"{shift:g}.{steps}": levels(shift, steps) for shift in SHIFTS for steps in STEPS}
    save_file(
        arrays, folder / "schedules.safetensors", metadata={"diffusers": diffusers.__version__}
    )


if __name__ == "__main__":
    main()
