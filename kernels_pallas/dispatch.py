"""Which implementation of an operation runs a call, and why not a preferred one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer


class Implementation(NamedTuple):
    """How to run a call, and why it cannot be run so (None if it can)."""

    run: Callable[[Any], Any]
    unsupported: Callable[[Any], str | None]


def choose(
    implementations: Mapping[str, Implementation], call: Any, name: str | None
) -> tuple[str, dict[str, str]]:
    """Returns the implementation that runs a call, and why those before it do not.

    Args:
        implementations: by name, in order of preference.
        call: what they are asked to run.
        name: None, or the one to take.

    Raises:
        ValueError: unknown name.
        NotImplementedError: the one asked for does not support the call.
    """
    if name is None:
        candidates = list(implementations)
    elif isinstance(name, str) and name in implementations:
        candidates = [name]
    else:
        allowed = ", ".join(map(repr, implementations))
        raise ValueError(f"implementation must be None or one of {allowed}, got {name!r}")
    reasons: dict[str, str] = {}
    for candidate in candidates:
        reason = implementations[candidate].unsupported(call)
        if reason is None:
            return candidate, reasons
        reasons[candidate] = reason
    raise NotImplementedError(f"implementation={name!r} cannot run this: {reasons[candidates[-1]]}")


def describe(operation: str, chosen: str, reasons: Mapping[str, str]) -> str:
    """Returns one line that says what `choose` found."""
    refusals = [f", not as {name!r}: {reason}" for name, reason in reasons.items()]
    return f"{operation} runs as {chosen!r}" + "".join(refusals)


def device_of(array: jax.Array) -> Any:
    """Where a call runs: with its operands, or where JAX puts what is traced."""
    if not isinstance(array, Tracer) and isinstance(array, jax.Array):
        return min(array.devices(), key=lambda device: device.id)
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default
    return jax.local_devices(backend=default)[0]


def not_hopper(device: Any) -> str | None:
    """Says why kernels for Hopper GPUs cannot run on a device; None if they can."""
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA H100 or H200, this is {device.device_kind} ({device.platform})"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return (
            f"it needs compute capability 9.0 (H100, H200), {device.device_kind} has {capability}"
        )
    return None
