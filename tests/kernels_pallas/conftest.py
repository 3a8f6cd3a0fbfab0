"""What the tests of the kernels share."""

import sys

import pytest


class Hopper:
    """What JAX says of an H100."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA H100 80GB HBM3", "9.0"


@pytest.fixture
def hopper(monkeypatch):
    """Calls choose their implementation as they would on an H100, to be lowered, not run."""
    api = sys.modules["kernels_pallas.sage_attention.api"]
    monkeypatch.setattr(api, "_device", lambda array: Hopper())
    return Hopper()
