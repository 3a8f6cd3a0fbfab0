"""How activations lie on a mesh: one table from what an axis of an array means to axes of a mesh.

The mesh is the one set with `jax.set_mesh`; without one, or where it has none of the axes named in
the table, nothing here does anything. The axes of the mesh:

- `data`: the batch is divided, parameters are repeated;
- `fsdp`: the batch is divided, and parameters too, which are gathered where they are used;
- `tensor`: the heads, the hidden units of the feed-forward and the vocabulary are divided;
- `context`: the tokens of each sequence are divided. For attention a device trades them for a part
  of the heads with all tokens (DeepSpeed-Ulysses, arXiv:2309.14509), so kernels and their
  gradients are those of one device, and causal masks load all devices alike.

`jaxgen.checkpoints.decoder_sharding` says the same of parameters.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

MESH_AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "tokens": ("context",),
        "features": ("tensor",),
        "heads": ("tensor", "context"),
        "vocabulary": ("tensor",),
    }
)
"""From the meaning of an axis to the axes of the mesh that divide it."""


def partition_spec(*meanings: str | None, mesh: Any) -> jax.P:
    """Returns how an array is divided, from the meaning of each of its axes; None: not at all.

    Args:
        *meanings: keys of `MESH_AXES`.
        mesh: a mesh, of which only those axes count that XLA divides arrays over by itself
            (`AxisType.Auto`): not those of an enclosing `jax.shard_map`.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def entry(meaning: str | None) -> str | tuple[str, ...] | None:
        axes = () if meaning is None else MESH_AXES[meaning]
        present = tuple(axis for axis in axes if kinds.get(axis) == AxisType.Auto)
        return present[0] if len(present) == 1 else present or None

    return jax.P(*map(entry, meanings))


def divide(x: Array, *meanings: str | None) -> Array:
    """Asks that an array be divided so; an axis that the devices do not divide stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries = [
        entry if size % devices_of(entry, mesh) == 0 else None
        for size, entry in zip(x.shape, partition_spec(*meanings, mesh=mesh), strict=True)
    ]
    if all(entry is None for entry in entries):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(*entries))


def devices_of(entry: str | tuple[str, ...] | None, mesh: Any) -> int:
    """Returns into how many parts an entry of a `jax.P` divides an axis."""
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def attend_on_mesh(
    attend: Callable[..., Array],
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens key_heads head_dim"],
    value: Float[Array, "batch tokens key_heads head_dim"],
    segment_ids: Int[Array, "batch tokens"] | None = None,
    *,
    kernel: bool,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Calls attention so that each device has its part of the batch and of the heads.

    Args:
        attend: `attend(query, key, value, segment_ids)`, that of one device.
        query: as for `attend`, on any devices.
        key: like the query, perhaps with fewer heads.
        value: like the key.
        segment_ids: which document a token belongs to.
        kernel: whether `attend` is a kernel, which XLA cannot divide.

    Raises:
        ValueError: the devices do not divide the heads of the keys.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = ("batch", None, "heads", None)
    spec = partition_spec(*names, mesh=mesh)
    if mesh.empty or mesh.size == 1 or all(entry is None for entry in spec):
        return attend(query, key, value, segment_ids)
    parts = devices_of(spec[2], mesh)
    if key.shape[2] % parts:
        raise ValueError(
            f"the mesh axes {' x '.join(MESH_AXES['heads'])} must divide the heads of the keys, "
            f"got {parts} devices for {key.shape[2]} heads"
        )
    # In two steps, so that only the devices of `context` trade tokens for heads.
    outside = ("batch", "tokens", "features", None)
    query, key, value = (divide(x, *outside) for x in (query, key, value))
    if kernel:
        attend = jax.shard_map(attend, in_specs=(spec, spec, spec, jax.P(spec[0])), out_specs=spec)
        return divide(attend(query, key, value, segment_ids), *outside)
    query, key, value = (divide(x, *names) for x in (query, key, value))
    segment_ids = None if segment_ids is None else divide(segment_ids, "batch", None)
    return divide(divide(attend(query, key, value, segment_ids), *names), *outside)
