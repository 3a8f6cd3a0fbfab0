"""How activations are divided between the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers import attend_on_mesh, divide, exact_attention, partition_spec
from kernels_pallas import sage_attention


def mesh_of(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def test_axes_that_a_mesh_does_not_have_are_left_out():
    names = ("batch", "tokens", "heads", None)
    assert partition_spec(*names, mesh=mesh_of(data=4)) == jax.P("data", None, None, None)
    mesh = mesh_of(fsdp=1, tensor=2, context=2)
    expected = jax.P("fsdp", "context", ("tensor", "context"), None)
    assert partition_spec(*names, mesh=mesh) == expected
    assert partition_spec(*names, mesh=mesh_of(model=4)) == jax.P(None, None, None, None)


def test_an_axis_that_devices_do_not_divide_stays_whole():
    with jax.set_mesh(mesh_of(data=2, context=2)):
        x = jax.jit(lambda x: divide(x, "batch", "tokens"))(np.ones((4, 3)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


def operands(key_heads=4):
    shapes = [(4, 16, 8, 8), (4, 16, key_heads, 8), (4, 16, key_heads, 8)]
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return *drawn, jnp.repeat(jnp.arange(4, dtype=jnp.int32), 4)[None] + jnp.zeros((4, 1), int)


def exact(query, key, value, ids):
    mask = None if ids is None else (ids[:, :, None] == ids[:, None])[:, None]
    return exact_attention(query, key, value, mask=mask, is_causal=True)


def int8(query, key, value, ids):
    attend = functools.partial(sage_attention, is_causal=True)
    if ids is None:
        return attend(query, key, value)
    return attend(query, key, value, query_segment_ids=ids, key_value_segment_ids=ids)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("attend", "kernel"), [(exact, False), (int8, True)])
@pytest.mark.parametrize("axes", [{"data": 2, "context": 2}, {"tensor": 2, "context": 2}])
def test_attention_and_its_gradients_are_those_of_one_device(axes, attend, kernel, documents):
    *arrays, ids = operands()
    ids = ids if documents else None

    def both(*arrays):
        call = functools.partial(attend_on_mesh, attend, segment_ids=ids, kernel=kernel)
        out, pull = jax.vjp(call, *arrays)
        return out, pull(jnp.cos(out))

    alone = jax.jit(both)(*arrays)
    with jax.set_mesh(mesh_of(**axes)):
        together = jax.jit(both)(*arrays)
    assert len(together[0].sharding.device_set) == 4
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_heads_that_devices_do_not_divide_are_refused():
    *arrays, ids = operands(key_heads=2)
    with (
        jax.set_mesh(mesh_of(tensor=2, context=2)),
        pytest.raises(ValueError, match=r"tensor x context must divide .* 4 devices for 2 heads"),
    ):
        jax.jit(functools.partial(attend_on_mesh, exact, kernel=False))(*arrays, ids)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_nothing_is_asked_for_where_xla_does_not_divide(kind):
    """Inside a `jax.shard_map` of one's own, and on meshes with explicit axes."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    *arrays, ids = operands()

    def attend(query, key, value, ids):
        query = divide(query, "batch", "tokens", "features", None)
        return attend_on_mesh(exact, query, key, value, ids, kernel=False)

    with jax.set_mesh(mesh):
        if kind == "Auto":
            rows = jax.P("data")
            attend = jax.shard_map(attend, in_specs=rows, out_specs=rows)
        found = jax.jit(attend)(*arrays, ids)
    np.testing.assert_allclose(found, exact(*arrays, ids), atol=1e-5)
