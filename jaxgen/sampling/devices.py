"""Models on devices of their own: where a model's inputs must be, and bringing them there."""

from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding


class Home(NamedTuple):
    """Where a model is.

    Attributes:
        sharding: Of its inputs: repeated on all devices that hold its weights.
        committed: Whether its weights were put there on purpose. Others are where arrays are by
            default, and a program takes them along to where its other inputs are.
    """

    sharding: Sharding
    committed: bool

    @property
    def devices(self) -> tuple[Any, ...]:
        """Its devices, in the order in which programs count them."""
        return _devices_of(self.sharding)


def home_of(weights: Any) -> Home | None:
    """Return where a model is, from a tree of arrays; None if traced or not on devices.

    Of weights of which some are divided and others left where arrays are by default, those decide
    that are on purpose on the most devices.
    """
    leaves = [leaf for leaf in jax.tree.leaves(weights) if isinstance(leaf, jax.Array)]
    if not leaves or any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    committed = [leaf for leaf in leaves if leaf.committed]
    widest = max(committed or leaves, key=lambda leaf: len(leaf.sharding.device_set)).sharding
    if isinstance(widest, NamedSharding):
        widest = NamedSharding(widest.mesh, jax.P())
    return Home(widest, bool(committed))


def live_apart(one: Home | None, other: Home | None) -> bool:
    """Return whether two models are on different devices, so that no program can have both."""
    return one is not None and other is not None and one.devices != other.devices


def bring[T: Any](tree: T, home: Home | None) -> T:
    """Copy arrays to where a model is, without waiting; None leaves them where they are."""
    return tree if home is None else jax.device_put(tree, home.sharding)


def meet[T: Any](tree: T, home: Home | None) -> T:
    """Bring only those arrays that a program cannot have together with the model."""

    def met(x: Any) -> Any:
        if home is None or not isinstance(x, jax.Array) or isinstance(x, Tracer):
            return x
        devices = _devices_of(x.sharding)
        if devices == home.devices:
            return x
        elsewhere = home.committed or set(devices).isdisjoint(home.devices)
        return bring(x, home) if elsewhere else x

    return jax.tree.map(met, tree)


def _devices_of(sharding: Sharding) -> tuple[Any, ...]:
    if isinstance(sharding, NamedSharding):
        mesh: Any = sharding.mesh
        return tuple(mesh.devices.flat)
    return tuple(sharding.device_set)
