"""Sparse-linear attention on Hopper GPUs."""

from typing import Any

import jax

from kernels_pallas.dispatch import not_hopper
from kernels_pallas.sparse_linear_attention.reference import Options


def unsupported(options: Options, query: jax.Array, device: Any) -> str | None:
    """Says why a call cannot use the kernels; None if it can."""
    if device is not None and (reason := not_hopper(device)):
        return reason
    return "todo"
