from pathlib import Path

import numpy as np
import pytest

from jaxgen.checkpoints import load_safetensors
from jaxgen.sampling import FlowMatchingSchedule, shift_sigma

GOLDEN = load_safetensors(Path(__file__).parents[2] / "goldens/schedules.safetensors")


@pytest.mark.parametrize("name", GOLDEN)
def test_levels_are_those_of_diffusers(name):
    shift, steps = name.split(".")
    levels = FlowMatchingSchedule(float(shift)).sigmas(int(steps))
    assert levels.shape == (int(steps) + 1,)
    # Measured: at most 6e-8.
    np.testing.assert_allclose(levels, GOLDEN[name], rtol=0, atol=1e-6)


def test_fifty_steps_are_the_published_ones():
    sigmas = np.asarray(FlowMatchingSchedule().sigmas(50))
    assert sigmas.dtype == np.float32
    assert sigmas.shape == (51,)
    np.testing.assert_allclose(sigmas[:3], [1, 0.9931, 0.9861], atol=5e-5)
    np.testing.assert_allclose(sigmas[-4:], [0.1205, 0.0669, 0.0089, 0], atol=5e-5)
    counts = [int((sigmas[:-1] > bound).sum()) for bound in (0.9, 0.75, 0.5, 0.3)]
    assert counts == [13, 25, 37, 44]


def test_twenty_eight_steps_end_as_published():
    sigmas = FlowMatchingSchedule().sigmas(28)
    np.testing.assert_allclose(sigmas[-3:], [0.1109, 0.0089, 0], atol=5e-5)


def test_last_level_is_shifted_twice():
    once = shift_sigma(0.001, 3.0)
    assert once == pytest.approx(0.002994, abs=1e-6)
    last = float(FlowMatchingSchedule(shift=3.0).sigmas(10)[-2])
    assert last == pytest.approx(shift_sigma(once, 3.0), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_falls_from_one_to_zero(steps, shift):
    sigmas = np.asarray(FlowMatchingSchedule(shift).sigmas(steps))
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_without_shift_levels_are_even():
    sigmas = np.asarray(FlowMatchingSchedule(shift=1.0).sigmas(5))[:-1]
    np.testing.assert_allclose(np.diff(sigmas), np.diff(sigmas)[0], rtol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
def test_refuses_step_counts(steps):
    with pytest.raises(ValueError, match=r"steps must be an int of at least 1, got steps="):
        FlowMatchingSchedule().sigmas(steps)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf")])
def test_refuses_shifts(shift):
    with pytest.raises(ValueError, match="shift must be a positive finite number, got shift="):
        FlowMatchingSchedule(shift)
