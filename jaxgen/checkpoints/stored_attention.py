"""Self-attention as weights tell it: sparse-linear where they hold its parameters."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.layers import SLA1Attention, SparseLinearAttention

type SparseAttention = SparseLinearAttention | SLA1Attention

_PLUGGED = re.compile(r"blocks\.(\d+)\.attn1\.attend\.(.+)")
_KINDS: tuple[type[SparseAttention], ...] = (SparseLinearAttention, SLA1Attention)


def is_plugged(key: str) -> bool:
    """Whether an array belongs to self-attention that was plugged in."""
    return _PLUGGED.fullmatch(key) is not None


def stored_attention(
    arrays: Mapping[str, Any], source: str = "arrays"
) -> Callable[[int], SparseAttention] | None:
    """Returns what makes the self-attention that weights were trained with.

    Args:
        arrays: the weights of a Wan transformer by diffusers key.
        source: what to call the arrays in an error.

    Returns:
        A function that makes the module of a block from its number, with the settings and shapes
        that the weights have but without their values; None where no block has such parameters.

    Raises:
        ValueError: parameters of no module that we know, or settings out of range.
    """
    blocks: dict[int, dict[str, Any]] = {}
    for key, array in arrays.items():
        if found := _PLUGGED.fullmatch(key):
            blocks.setdefault(int(found[1]), {})[found[2]] = array
    if not blocks:
        return None

    def make(number: int) -> SparseAttention:
        parameters, where = blocks.get(number, {}), f"{source}: self-attention of block {number}"
        for kind in _KINDS:
            if parameters.keys() - kind.OPTIONAL == kind.PARAMETERS:
                shapes = {
                    name: jax.ShapeDtypeStruct(np.shape(array), array.dtype)
                    for name, array in parameters.items()
                }
                settings = np.asarray(parameters["settings"])
                try:
                    return kind.of_parameters(shapes, settings)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
        known = " or ".join(
            f"{kind.__name__} ({', '.join(sorted(kind.PARAMETERS))})" for kind in _KINDS
        )
        raise ValueError(
            f"{where} has the parameters {', '.join(sorted(parameters)) or '(none)'}; "
            f"it must be {known}"
        )

    return make
