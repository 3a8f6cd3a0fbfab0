"""Attention to keys and values that are gathered from several devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers import attend_to_gathered, exact_attention
from kernels_pallas import sage_attention

DEVICES = 4
MESH = jax.make_mesh((DEVICES,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))


def operands(key_heads=3, bias=0.0):
    shapes = [(2, 32, 3, 16), (2, 32, key_heads, 16), (2, 32, key_heads, 16), (2, 32, 3, 16)]
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    drawn[1] += bias
    return drawn


def divided(attend, wire):
    """The output and all gradients, with tokens on four devices."""
    gathered = functools.partial(attend_to_gathered, attend, wire=wire)
    spec = jax.P(None, "context")
    run = jax.shard_map(gathered, mesh=MESH, in_specs=(spec,) * 3, out_specs=spec)
    return both(run)


def both(attend):
    def run(query, key, value, weight):
        out, back = jax.vjp(attend, query, key, value)
        return out, *back(weight)

    return jax.jit(run)


def distances(found, wanted):
    pairs = [[np.asarray(x, np.float32) for x in two] for two in zip(found, wanted, strict=True)]
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]


def test_exact_arrays_give_what_one_device_gives():
    arrays = operands()
    found = divided(exact_attention, "exact")(*arrays)
    assert max(distances(found, both(exact_attention)(*arrays))) < 1e-5


@pytest.mark.parametrize("bias", [0.0, 20.0])
def test_codes_give_nearly_the_same(bias):
    arrays = operands(bias=bias)
    wanted = both(exact_attention)(*arrays)
    found = distances(divided(exact_attention, "int8")(*arrays), wanted)
    assert 1e-4 < max(found) < 0.015
    # The error of INT8 attention hardly grows.
    int8 = distances(both(sage_attention)(*arrays), wanted)
    gathered = distances(divided(sage_attention, "int8")(*arrays), wanted)
    assert max(gathered) < 1.5 * max(int8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_need_not_be_as_many_as_devices(dtype):
    arrays = operands(key_heads=1)
    found = divided(sage_attention, "int8")(*(x.astype(dtype) for x in arrays))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert [x.shape for x in found] == [x.shape for x in (arrays[0], *arrays[:3])]
    assert max(distances(found, both(exact_attention)(*arrays))) < 0.05


def test_bytes_travel():
    program = divided(exact_attention, "int8").lower(*operands()).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather\(", program)
    assert sorted(gathered) == [("f32", "2,32,3,1")] * 2 + [("s8", "2,32,3,16")] * 2


def test_what_is_not_finite_stays_so():
    query, key, value, weight = operands()
    value = value.at[0, 3, 1, 2].set(jnp.nan)
    out, *_ = divided(exact_attention, "int8")(query, key, value, weight)
    assert np.isnan(out[0, :, 1]).all()
    assert np.isfinite(out[1]).all()


def test_refuses_another_wire():
    with pytest.raises(ValueError, match="wire must be int8 or exact, got 'int4'"):
        attend_to_gathered(exact_attention, *operands()[:3], wire="int4")
