"""Models on devices of their own: where a model's inputs must be, and bringing them there."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding


def home_of(weights: Any) -> Sharding | None:
    """Return where inputs of a model must be: repeated on all devices that hold its weights.

    Args:
        weights: A tree of arrays; None is returned for one that is being traced or not on devices.
    """
    first = next(iter(jax.tree.leaves(weights)), None)
    if not isinstance(first, jax.Array) or isinstance(first, Tracer):
        return None
    place = first.sharding
    return NamedSharding(place.mesh, jax.P()) if isinstance(place, NamedSharding) else place


def live_apart(one: Sharding | None, other: Sharding | None) -> bool:
    """Return whether two models are on different devices, so that no program can have both."""
    return one is not None and other is not None and one.device_set != other.device_set


def bring[T: Any](tree: T, home: Sharding | None) -> T:
    """Copy arrays to where they must be, without waiting; None leaves them where they are."""
    return tree if home is None else jax.device_put(tree, home)
