"""Checks and canonical forms of configuration fields, shared by the frozen model configs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FLOATS = tuple(map(np.dtype, (jnp.bfloat16, np.float16, np.float32, np.float64)))


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless each of these fields of `config` is a positive int."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {name}={value!r}")


def require_number(config: Any, name: str, fits: Callable[[float], bool], wanted: str) -> None:
    """Raises ValueError if a field holds a number, of Python or NumPy, that does not fit.

    What may be an array is left alone, for instance while JAX takes a pytree apart.
    """
    value = getattr(config, name)
    if isinstance(value, int | float | np.number) and not fits(float(value)):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def require_bool(config: Any, *names: str) -> None:
    """Raises ValueError unless each of these fields of `config` is True or False."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def require_divides(config: Any, divisor: str, total: str) -> None:
    """Raises ValueError unless field `divisor` divides field `total`."""
    small, large = getattr(config, divisor), getattr(config, total)
    if large % small:
        raise ValueError(
            f"{divisor} must divide {total}, got {divisor}={small} and {total}={large}"
        )


def set_field(config: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass from its `__post_init__`."""
    object.__setattr__(config, name, value)


def set_float_dtypes(config: Any) -> None:
    """Makes `dtype` and `param_dtype` NumPy dtypes, so that equal configs compare equal.

    Raises:
        ValueError: none of bfloat16, float16, float32 and, with `jax_enable_x64`, float64.
    """
    allowed = _FLOATS if jax.config.jax_enable_x64 else _FLOATS[:-1]
    for name in ("dtype", "param_dtype"):
        value = getattr(config, name)
        try:
            dtype = None if value is None else jnp.dtype(value)  # of None it makes float64
        except TypeError:
            dtype = None
        if dtype is None or dtype not in allowed:
            raise ValueError(
                f"{name} must be a float dtype such as bfloat16, got {value!r}; allowed are "
                "bfloat16, float16, float32 and, with jax_enable_x64, float64"
            )
        set_field(config, name, dtype)
