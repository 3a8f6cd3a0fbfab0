"""The reference implementation, and what only it can show: exactness without quantization."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import sage_attention
from kernels_pallas.sage_attention import reference, vjp
from kernels_pallas.sage_attention.masking import Masking, Structure, coverage
from kernels_pallas.sage_attention.reference import Options
from kernels_pallas.sage_attention.tiling import Tiling
from tests.conformance.attention import AttentionConformance, draw
from tests.conformance.exact_attention import exact_attention, relative_l2


class TestXla(AttentionConformance):
    implementation = "xla"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(200, 200, 4), (130, 70, 2), (1, 9, 1)])
def test_without_quantization_the_same_path_is_exact(queries, keys, kv_heads, is_causal):
    inputs = draw(1, batch=2, queries=queries, keys=keys, heads=4, kv_heads=kv_heads, key_bias=2.0)
    options = Options(0.125, Structure(is_causal, None), quantize=False)
    masking = Masking(None, jnp.array([queries], jnp.int32), jnp.array([keys], jnp.int32))
    bias = np.random.default_rng(0).standard_normal((1, 4, queries, keys)).astype(np.float32)

    @jax.jit
    def program(query, key, value, bias, cotangents):
        attend = lambda *inputs: vjp.attention(reference, options, *inputs, masking)
        out, pullback = jax.vjp(attend, query, key, value, bias)
        return out, pullback(cotangents)

    d_lse = np.random.default_rng(1).standard_normal(inputs[0].shape[:3]).astype(np.float32)
    (out, lse), gradients = program(*inputs[:3], bias, (inputs[3], d_lse))
    expected_out, expected_lse, (*expected, ds) = exact_attention(
        *inputs, bias=bias, scale=0.125, is_causal=is_causal, d_lse=d_lse
    )
    assert relative_l2(out, expected_out) <= 1e-5
    assert relative_l2(lse, expected_lse) <= 1e-5
    wanted = (*expected, ds.sum(0, keepdims=True))
    for name, actual, gradient in zip("qkvb", gradients, wanted, strict=True):
        error = np.linalg.norm(np.asarray(actual) - gradient)
        assert error <= 1e-5 * np.linalg.norm(gradient) + 1e-5, f"d{name}"


def test_no_array_of_queries_times_keys():
    """Every intermediate of forward and backward is smaller than queries x keys."""
    tokens = 2048
    query = jnp.zeros((1, tokens, 1, 64))
    loss = lambda q, k, v: jnp.sum(sage_attention(q, k, v, implementation="xla", is_causal=True))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, query, query)
    sizes = [x.aval.size for equation in _equations(jaxpr.jaxpr) for x in equation.outvars]
    assert max(sizes) == tokens * 64


def test_products_are_integer_products():
    """Six of the seven products are int8 x int8 -> int32; dP alone is a float product."""
    query = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    loss = lambda q, k, v: jnp.sum(sage_attention(q, k, v).astype(jnp.float32))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, query, query)
    kinds = [
        (str(e.invars[0].aval.dtype), str(e.outvars[0].aval.dtype))
        for e in _equations(jaxpr.jaxpr)
        if e.primitive.name == "dot_general"
    ]
    # Forward: QKᵀ, PV. Backward: QKᵀ again, PᵀdO, dO Vᵀ, dS K, dSᵀQ.
    assert sorted(kinds) == [("bfloat16", "float32")] + [("int8", "int32")] * 6


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)  # a closed jaxpr holds an open one
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


GOOD = jnp.zeros((2, 8, 4, 16))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"same shape, got \(2, 8, 4, 16\) and \(2, 9", {"value": (2, 9, 4, 16)}),
        (ValueError, r"agree in batch and head_dim", {"key": (2, 8, 4, 8), "value": (2, 8, 4, 8)}),
        (ValueError, r"agree in batch", {"key": (3, 8, 4, 16), "value": (3, 8, 4, 16)}),
        (ValueError, r"multiple of .* got 4 and 3", {"key": (2, 8, 3, 16), "value": (2, 8, 3, 16)}),
        (ValueError, r"no axis of size 0", {"query": (2, 0, 4, 16)}),
        (ValueError, r"shape \(batch, tokens, heads, head_dim\)", {"query": (8, 16)}),
        (TypeError, r"float32, bfloat16, float16, got int8", {"query": GOOD.astype("i1")}),
        (TypeError, r"same dtype, got bfloat16", {"query": GOOD.astype(jnp.bfloat16)}),
        (ValueError, r"mask must be broad.* got \(1, 1, 8, 7\)", {"mask": jnp.ones((8, 7)) > 0}),
        (TypeError, r"mask must be bool", {"mask": jnp.ones((8, 8))}),
        (ValueError, r"bias must be broadcastable .*\(2, 4, 8, 8\)", {"bias": (3, 4, 8, 8)}),
        (ValueError, r"bias must be broadcastable", {"bias": (1, 2, 4, 8, 8)}),
        (TypeError, r"bias must have a float dtype", {"bias": jnp.ones((8, 8), bool)}),
        (ValueError, r"\[0, 8\], got \[-1, 2\]", {"query_seq_lengths": jnp.array([-1, 2])}),
        (ValueError, r"\[0, 8\], got \[3, 9\]", {"key_value_seq_lengths": jnp.array([3, 9])}),
        (ValueError, r"shape \(batch,\) = \(2,\)", {"key_value_seq_lengths": jnp.array([3])}),
        (TypeError, r"must hold integers", {"query_seq_lengths": jnp.array([1.0, 2.0])}),
        (ValueError, r"must not be negative, got \(3, -1\)", {"local_window_size": (3, -1)}),
        (TypeError, r"\(left, right\) ints, got \(1\.7, 2\)", {"local_window_size": (1.7, 2)}),
        (TypeError, r"an int or \(left, right\) ints, got \(1,\)", {"local_window_size": (1,)}),
        (TypeError, r"an int or \(left, right\) ints, got True", {"local_window_size": True}),
        (ValueError, r"float scalar, got float32 of shape \(16,\)", {"scale": jnp.ones((16,))}),
        (ValueError, r"number or a float scalar, got 'a'", {"scale": "a"}),
        (
            ValueError,
            "given together, got only query_segment_ids",
            {"query_segment_ids": np.zeros((2, 8), np.int32)},
        ),
        (
            ValueError,
            r"key_value_segment_ids must have shape \(2, 8\), got \(8,\)",
            {
                "query_segment_ids": np.zeros((2, 8), np.int32),
                "key_value_segment_ids": np.zeros(8, np.int32),
            },
        ),
        (
            TypeError,
            "query_segment_ids must hold integers, got float32",
            {
                "query_segment_ids": np.zeros((2, 8), np.float32),
                "key_value_segment_ids": np.zeros((2, 8), np.int32),
            },
        ),
        (ValueError, r"one of 'mosaic_gpu', 'xla', got 'cudnn'", {"implementation": "cudnn"}),
        (ValueError, r"one of 'mosaic_gpu', 'xla', got \['xla'\]", {"implementation": ["xla"]}),
        (NotImplementedError, r"own matrix products", {"qk_attn_weights_einsum": jnp.einsum}),
        (TypeError, r"unexpected keyword argument 'causal'", {"causal": True}),
        (NotImplementedError, r"no attention dropout, got dropout_rate=0.1", {"dropout_rate": 0.1}),
        (NotImplementedError, r"cannot sow", {"module": object()}),
    ],
)  # fmt: skip
def test_errors_name_what_was_given_and_what_is_allowed(error, message, arguments):
    make = lambda x: jnp.zeros(x) if isinstance(x, tuple) and len(x) > 1 and x[0] > 0 else x
    given = {"query": GOOD, "key": GOOD, "value": GOOD}
    for name, x in arguments.items():
        given[name] = make(x) if name in ("query", "key", "value", "bias") else x
    with pytest.raises(error, match=message):
        sage_attention(**given)


def test_numpy_lengths_are_checked_inside_jit():
    attend = jax.jit(lambda x: sage_attention(x, x, x, query_seq_lengths=np.array([3, 9])))
    with pytest.raises(ValueError, match=r"\[0, 8\], got \[3, 9\]"):
        attend(GOOD)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 5), (10**12, 2)])
def test_coverage_by_formula_is_coverage_by_inspection(is_causal, window):
    """Without a mask there is a formula; with one that allows everything, pairs are examined."""
    window = window and tuple(min(side, 200) for side in window)
    structure = Structure(is_causal, window)
    lengths = (jnp.array([30, 0, 17], jnp.int32), jnp.array([20, 40, 3], jnp.int32))
    everything = jnp.ones((1, 1, 1, 1), bool)
    by_formula = coverage(Masking(None, *lengths), structure, 30, 40, 8)
    by_inspection = coverage(Masking(everything, *lengths), structure, 30, 40, 8)
    for formula, inspection in zip(by_formula, by_inspection, strict=True):
        np.testing.assert_array_equal(jnp.broadcast_to(formula, inspection.shape), inspection)


def test_windows_wider_than_any_integer():
    x = draw(3, queries=20)[0]
    wide = sage_attention(x, x, x, local_window_size=(2**40, 2**40))
    np.testing.assert_array_equal(wide, sage_attention(x, x, x))


@pytest.mark.parametrize("spec", [jax.P("data"), jax.P(None, None, "data")], ids=["batch", "heads"])
def test_sharded_batches_and_heads_need_no_communication(spec):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, spec)
    loss = lambda q, k, v: jnp.sum(sage_attention(q, k, v, is_causal=True) ** 2)
    inputs = [jax.device_put(x, sharding) for x in draw(2, batch=2, queries=70)[:3]]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=(sharding,) * 3)
    program = gradient.lower(*inputs).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(np.asarray, inputs))
    jax.tree.map(np.testing.assert_array_equal, gradient(*inputs), expected)


# SageBwd (arXiv 2603.02170), Table 1: relative L2 of O, dQ, dK, dV by the deviation of Q and K.
PUBLISHED = {
    1.0: (0.0160, 0.0184, 0.0220, 0.0159),
    3.0: (0.0389, 0.0758, 0.0777, 0.0387),
    5.0: (0.0603, 0.2014, 0.2007, 0.0605),
    8.0: (0.0972, 0.4666, 0.4699, 0.0973),
}


@pytest.mark.parametrize("sigma", PUBLISHED)
def test_errors_are_those_of_the_paper(sigma):
    query, key, value, d_out = draw(int(sigma) + 64, queries=1024, heads=2)
    inputs = (sigma * query, sigma * key, value, d_out)
    attend = functools.partial(sage_attention, implementation="xla", is_causal=True)
    out, pullback = jax.vjp(attend, *inputs[:3])
    exact, _, gradients = exact_attention(*inputs, is_causal=True)
    actual = [relative_l2(out, exact)]
    actual += [relative_l2(x, y) for x, y in zip(pullback(d_out), gradients, strict=False)]
    assert np.all(np.array(actual) <= 1.15 * np.array(PUBLISHED[sigma]))


def test_one_scale_a_tile_is_less_accurate():
    inputs = draw(3, queries=512)
    masking = Masking(None, jnp.array([512], jnp.int32), jnp.array([512], jnp.int32))
    errors = {}
    for scales in ("tile", "vector"):
        tiling = Tiling(gradient_scales=scales)
        options = Options(0.125, Structure(False, None), tiling=tiling)
        attend = lambda *x, options=options: vjp.attention(reference, options, *x, None, masking)[0]
        gradients = jax.vjp(attend, *map(jnp.asarray, inputs[:3]))[1](jnp.asarray(inputs[3]))
        expected = exact_attention(*inputs)[2]
        errors[scales] = [relative_l2(x, y) for x, y in zip(gradients, expected, strict=False)]
    assert np.all(2 * np.array(errors["vector"]) <= 1.1 * np.array(errors["tile"]))
    assert np.max(errors["tile"]) <= 0.052


def test_keys_with_a_large_mean_need_smoothing():
    """Without it their common part takes the codes; both compute the same attention."""
    keys = jax.random.split(jax.random.key(0), 5)
    query, key, value = (jax.random.normal(k, (1, 200, 2, 32)) for k in keys[:3])
    errors = {}
    for shift in (0.0, 20.0):
        moved = key + shift * jax.random.normal(keys[3], (1, 1, 1, 32))
        exact = jax.nn.dot_product_attention(query, moved, value)
        for smooth in (True, False):
            out = sage_attention(query, moved, value, smooth_keys=smooth, implementation="xla")
            errors[shift, smooth] = float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
    assert errors[0.0, False] < 0.03
    assert errors[20.0, True] == pytest.approx(errors[0.0, True], rel=0.1)
    assert errors[20.0, False] > 5 * errors[20.0, True]
