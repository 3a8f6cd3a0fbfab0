"""Noise levels visited by a sampler of a rectified flow."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SMALLEST_SIGMA = 0.001
"""Noise level of the first of the 1,000 training steps of Stable Diffusion 3."""


def shift_sigma(sigma: Any, shift: float) -> Any:
    """Move noise levels towards 1: `shift * sigma / (1 + (shift - 1) * sigma)`.

    Larger pictures need more noise for the same loss of information (Stable Diffusion 3,
    arXiv:2403.03206, equation 23); `shift` is that ratio, 1 changes nothing.

    Args:
        sigma: Noise levels in [0, 1]; a number or an array of any shape.
        shift: Positive ratio.

    Returns:
        The shifted levels, of the same type and shape; 0 and 1 stay where they are.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class FlowMatchingSchedule:
    """The schedule of Stable Diffusion 3 for Euler sampling.

    Levels fall evenly from 1 to the shifted smallest training level and are then shifted. That
    last level is therefore shifted twice (0.0089 with `shift=3`): the published samplers do so,
    and weights are tuned against it.

    Attributes:
        shift: Positive ratio of `shift_sigma`. The SD3 models use 3.

    Raises:
        ValueError: `shift` is not a positive finite number.
    """

    shift: float = 3.0

    def __post_init__(self):
        if not (np.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be a positive finite number, got shift={self.shift}")

    def sigmas(self, steps: int) -> Float[Array, "steps+1"]:
        """Return the noise levels before each step and, last, the 0 that sampling ends at.

        Args:
            steps: Number of Euler steps, at least 1. It decides a shape, so it is a Python int.

        Returns:
            float32, strictly falling from 1 to 0.

        Raises:
            ValueError: `steps` is not an int of at least 1.
        """
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"steps must be an int of at least 1, got steps={steps!r}")
        evenly = np.linspace(1.0, shift_sigma(SMALLEST_SIGMA, self.shift), int(steps))
        levels = np.append(shift_sigma(evenly, self.shift), 0.0)
        return jnp.asarray(levels, dtype=jnp.float32)
