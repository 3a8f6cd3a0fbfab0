"""What the tests of the kernels share."""

import pytest

from kernels_pallas import dispatch


class Hopper:
    """What JAX says of an H100."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA H100 80GB HBM3", "9.0"


@pytest.fixture
def hopper(monkeypatch):
    """Calls choose their implementation as they would on an H100, to be lowered, not run."""
    monkeypatch.setattr(dispatch, "device_of", lambda array: Hopper())
    return Hopper()
