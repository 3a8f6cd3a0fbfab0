"""The reference against dense float64: output, every gradient, limits, errors."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import (
    explain_sparse_linear_attention,
    resize_mixing_logits,
    soft_topk_logits,
    sparse_linear_attention,
)
from kernels_pallas.sparse_linear_attention import api, reference
from kernels_pallas.sparse_linear_attention.blocks import Blocks
from kernels_pallas.sparse_linear_attention.router import block_means, block_scores, choose
from tests.kernels_pallas.sparse_linear_attention import dense

attend = functools.partial(sparse_linear_attention, implementation="xla")


def draw(queries, keys=None, *, batch=1, heads=2, dim=16, blocks=(16, 8), dtype=np.float32, seed=0):
    """Query, key, value, mixing logits and a cotangent."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    keys = queries if keys is None else keys
    return (
        normal(batch, queries, heads, dim),
        normal(batch, keys, heads, dim) + 0.5 * normal(dim),
        normal(batch, keys, heads, dim),
        normal(heads, -(-queries // blocks[0])),
        normal(batch, queries, heads, dim),
    )


def weights_of(query, key, kept, *, block_q, block_k):
    """The hard choice as dense weights."""
    blocks = Blocks(query.shape[1], key.shape[1], block_q, block_k, kept)
    means = block_means(blocks, jnp.asarray(query), jnp.asarray(key))
    return choose(blocks, block_scores(means, None, None), means.keys).mask


def relative(found, wanted):
    wanted = np.asarray(wanted, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


def results(function, inputs):
    """Output and gradients of a function of query, key, value and logits."""

    @jax.jit  # compiles once instead of every operation
    def run(*operands, d_out):
        out, pullback = jax.vjp(function, *operands)
        return out, *pullback(d_out)

    *operands, d_out = map(jnp.asarray, inputs)
    return run(*operands, d_out=d_out)


def dense_results(inputs, kept, *, block_q, block_k, **options):
    """The same in float64."""
    weights = np.asarray(weights_of(*inputs[:2], kept, block_q=block_q, block_k=block_k))
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in inputs]

        def function(query, key, value, logits):
            return dense.attention(
                query,
                key,
                value,
                jax.nn.sigmoid(logits),
                jnp.asarray(weights, jnp.float64),
                block_q=block_q,
                block_k=block_k,
                **options,
            )

        return [np.asarray(x) for x in results(function, wide)]


NAMES = ("out", "query", "key", "value", "logits")


@pytest.mark.parametrize(
    ("queries", "keys", "kept"),
    [(64, 64, 0.25), (90, 90, 0.2), (50, 77, 0.5), (33, 9, 0.5), (16, 8, 1.0), (7, 200, 0.04)],
)
def test_output_and_every_gradient(queries, keys, kept):
    smooth_features = queries != keys  # and the features of SLA where they are equal
    inputs = draw(queries, keys, batch=2)
    options = {"block_q": 16, "block_k": 8, "smooth_features": smooth_features}
    found = results(
        functools.partial(attend, kept_fraction=kept, quantize=False, **options), inputs
    )
    wanted = dense_results(inputs, kept, **options)
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        if np.linalg.norm(y) < 1e-9:  # nothing is mixed where all is kept
            assert np.abs(x).max() < 1e-6, name
        else:
            assert relative(x, y) <= 1e-5, name


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.floats(0.01, 1.0), st.integers(0, 99))
def test_any_lengths(queries, keys, kept, seed):
    inputs = draw(queries, keys, heads=1, dim=8, seed=seed)
    options = {"block_q": 16, "block_k": 8}
    found = results(
        functools.partial(attend, kept_fraction=kept, quantize=False, **options), inputs
    )
    wanted = dense_results(inputs, kept, **options)
    for name, x, y in zip(NAMES, found, wanted, strict=True):
        assert np.linalg.norm(x - y) <= 2e-5 * (np.linalg.norm(y) + 0.1), name


def test_all_blocks_are_full_attention():
    query, key, value, logits, _ = draw(90)
    out = attend(
        query, key, value, logits, kept_fraction=1.0, block_q=16, block_k=8, quantize=False
    )
    exact = jax.nn.dot_product_attention(*map(jnp.asarray, (query, key, value)))
    assert relative(out, exact) <= 1e-6


def test_exact_ratio_and_complement_are_full_attention():
    """With alpha the chosen mass, and softmax over the rest in place of the linear branch."""
    query, key, value, _, _ = draw(64, heads=1)
    kept, blocks = 0.25, {"block_q": 16, "block_k": 8}
    sparse = attend(
        query,
        key,
        value,
        np.full((1,), 40.0, np.float32),
        kept_fraction=kept,
        quantize=False,
        **blocks,
    )
    mask = np.asarray(dense.expand(weights_of(query, key, kept, **blocks), 64, 64, 16, 8)[0, 0])
    q, k, v = (np.asarray(x[0, :, 0], np.float64) for x in (query, key, value))
    p = np.exp(q @ k.T / 4)
    p /= p.sum(axis=1, keepdims=True)
    alpha = (p * mask).sum(axis=1, keepdims=True)
    rest = p * ~mask
    mixed = alpha * np.asarray(sparse[0, :, 0]) + (1 - alpha) * (rest / (1 - alpha) @ v)
    assert relative(mixed, p @ v) <= 1e-6


def test_the_mean_of_the_keys_is_invisible():
    inputs = draw(64)
    options = {"kept_fraction": 0.25, "block_q": 16, "block_k": 8}
    shifted = inputs[0], inputs[1] + 3.0, *inputs[2:]
    for x, y in zip(
        results(functools.partial(attend, **options), inputs),
        results(functools.partial(attend, **options), shifted),
        strict=True,
    ):
        assert relative(x, y) <= 1e-3


@pytest.mark.parametrize(("sigma", "error"), [(1.0, 0.012), (2.0, 0.03)])
def test_quantized_forward(sigma, error):
    query, key, value, logits, d_out = draw(256, dim=64, blocks=(128, 64))
    inputs = sigma * query, sigma * key, value, logits, d_out
    exact = results(functools.partial(attend, kept_fraction=0.5, quantize=False), inputs)
    found = results(functools.partial(attend, kept_fraction=0.5), inputs)
    assert 1e-4 < relative(found[0], exact[0]) < error
    for name, x, y in zip(NAMES[1:], found[1:], exact[1:], strict=True):
        assert relative(x, y) < 3 * error, name


def test_wide_scores_want_the_scores_of_the_codes():
    """Section 4 of the method's caution: S of the two passes must agree."""
    query, key, value, logits, d_out = draw(256, dim=64, blocks=(128, 64))
    inputs = 3 * query, 3 * key, value, logits + 4, d_out
    exact = results(functools.partial(attend, kept_fraction=0.5, quantize=False), inputs)
    errors = {}
    for scores in ("exact", "int8"):
        found = results(
            functools.partial(attend, kept_fraction=0.5, gradient_scores=scores), inputs
        )
        errors[scores] = [relative(x, y) for x, y in zip(found[1:4], exact[1:4], strict=True)]
    assert all(a < b for a, b in zip(errors["int8"], errors["exact"], strict=True)), errors


def test_bfloat16():
    inputs = draw(200, dim=64, blocks=(128, 64))
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]]
    options = {"kept_fraction": 0.5, "quantize": False}
    found = results(
        functools.partial(attend, **options), (*narrow, inputs[3], jnp.bfloat16(inputs[4]))
    )
    wide = [np.asarray(x, np.float32) for x in narrow]
    exact = results(functools.partial(attend, **options), (*wide, inputs[3], inputs[4]))
    assert found[0].dtype == jnp.bfloat16
    assert found[4].dtype == jnp.float32
    for name, x, y in zip(NAMES, found, exact, strict=True):
        assert relative(x, y) < 1e-2, name


SMALL = {"block_q": 8, "block_k": 4, "kept_fraction": 0.3, "quantize": False}


class TestSoftChoice:
    def test_rows_add_up(self):
        scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50, 512)), jnp.float32)
        for count in (1, 15, 300.5, 511):
            total = jax.nn.sigmoid(soft_topk_logits(scores, count)).sum(axis=-1)
            np.testing.assert_allclose(total, count, atol=1e-3)

    def test_everything(self):
        scores = jnp.asarray([[1.0, 2.0, 3.0]])
        assert (jax.nn.sigmoid(soft_topk_logits(scores, 3)) == 1).all()
        gradient = jax.grad(lambda x: jax.nn.sigmoid(soft_topk_logits(x, 3)).sum())(scores)
        assert (gradient == 0).all()

    def test_low_temperature_is_the_hard_choice(self):
        scores = jnp.asarray(np.random.default_rng(1).standard_normal((20, 40)), jnp.float32)
        y = jax.nn.sigmoid(soft_topk_logits(scores, 7, 1e-5))
        largest = jnp.sort(scores, axis=-1)[:, -7, None] <= scores
        np.testing.assert_allclose(y, largest, atol=1e-4)

    def test_it_is_the_dense_operation(self):
        query, key, value, logits, _ = draw(30, 22, dim=8, blocks=(8, 4))
        blocks = Blocks(30, 22, 8, 4, 0.3)
        means = block_means(blocks, jnp.asarray(query), jnp.asarray(key))
        scores = block_scores(means, None, None)
        y = jax.nn.sigmoid(soft_topk_logits(scores, blocks.kept))
        out = attend(query, key, value, logits, selection="soft", **SMALL)
        wanted = dense.attention(
            *map(jnp.asarray, (query, key, value)), jax.nn.sigmoid(logits), y, block_q=8, block_k=4
        )
        assert relative(out, wanted) <= 1e-5

    def test_low_temperature_is_the_hard_operation(self):
        inputs = draw(64, dim=8, blocks=(8, 4))[:4]
        soft = attend(*inputs, selection="soft", temperature=1e-6, **SMALL)
        assert relative(soft, attend(*inputs, **SMALL)) <= 1e-5

    def test_gradients_by_finite_differences(self):
        """Of everything, the projections of the router through SoftTop-k included, in float64."""
        with jax.enable_x64(True):
            *inputs, d_out = draw(30, 22, heads=2, dim=4, blocks=(8, 4), dtype=np.float64)
            rng = np.random.default_rng(2)
            routers = [np.eye(4) + 0.3 * rng.standard_normal((4, 4)) for _ in "qk"]
            arguments = tuple(map(jnp.asarray, (*inputs, *routers)))

            @jax.jit
            def loss(query, key, value, logits, query_router, key_router):
                out = attend(
                    query, key, value, logits, query_router=query_router, key_router=key_router,
                    selection="soft", temperature=0.5, **SMALL,
                )  # fmt: skip
                return jnp.sum(out * d_out)

            gradients = jax.grad(loss, argnums=tuple(range(6)))(*arguments)
            for i, gradient in enumerate(gradients):
                direction = rng.standard_normal(gradient.shape)
                direction /= np.linalg.norm(direction)
                step = 1e-5

                def along(t, i=i, direction=direction):
                    return loss(
                        *(x + t * direction if n == i else x for n, x in enumerate(arguments))
                    )

                change = (along(step) - along(-step)) / (2 * step)
                wanted = jnp.sum(gradient * direction)
                assert abs(change - wanted) <= 1e-6 * max(1.0, abs(wanted)), i

    def test_routers_learn_nothing_from_the_hard_choice(self):
        query, key, value, logits, _ = draw(64, dim=8, blocks=(8, 4))

        def loss(router):
            return attend(query, key, value, logits, query_router=router, **SMALL).sum()

        assert (jax.grad(loss)(jnp.eye(8)) == 0).all()


def test_hard_gradients_by_finite_differences():
    with jax.enable_x64(True):
        *inputs, d_out = draw(30, 22, heads=2, dim=4, blocks=(8, 4), dtype=np.float64)
        arguments = tuple(map(jnp.asarray, inputs))
        rng = np.random.default_rng(2)

        @jax.jit
        def loss(*arguments):
            out = attend(*arguments, block_q=8, block_k=4, kept_fraction=0.3, quantize=False)
            return jnp.sum(out * d_out)

        gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)
        for i, gradient in enumerate(gradients):
            direction = rng.standard_normal(gradient.shape) / math.sqrt(gradient.size)

            def along(t, i=i, direction=direction):
                return loss(*(x + t * direction if n == i else x for n, x in enumerate(arguments)))

            change = (along(1e-5) - along(-1e-5)) / 2e-5
            assert abs(change - jnp.sum(gradient * direction)) <= 1e-6, i


def test_routers():
    query, key, value, logits, _ = draw(64)
    options = {"kept_fraction": 0.25, "block_q": 16, "block_k": 8}
    plain = attend(query, key, value, logits, **options)
    for eye in (np.eye(16, dtype=np.float32), np.stack([np.eye(16, dtype=np.float32)] * 2)):
        same = attend(query, key, value, logits, query_router=eye, key_router=eye, **options)
        np.testing.assert_array_equal(same, plain)
    opposite = attend(
        query, key, value, logits, query_router=-np.eye(16, dtype=np.float32), **options
    )
    assert relative(opposite, plain) > 0.1


def test_ties_go_to_the_smaller_id():
    blocks = Blocks(16, 40, 16, 8, 0.4)
    routing = choose(blocks, jnp.zeros((1, 1, 1, 5)), jnp.zeros((1, 1, 4)))
    assert routing.chosen.tolist() == [[[[0, 1]]]]


@pytest.mark.parametrize(
    ("fraction", "keys", "kept"),
    [(0.03, 32760, 15), (0.05, 75600, 59), (0.001, 64, 1), (0.3, 640, 3)],
)
def test_number_of_blocks(fraction, keys, kept):
    assert Blocks(64, keys, 128, 64, fraction).kept == kept


def test_one_ratio_a_head_and_no_batch_axis():
    query, key, value, _, _ = draw(64)
    options = {"kept_fraction": 0.25, "block_q": 16, "block_k": 8}
    whole = attend(query, key, value, np.full((2, 4), 0.3, np.float32), **options)
    heads = attend(query[0], key[0], value[0], np.full((2,), 0.3, np.float32), **options)
    np.testing.assert_array_equal(heads, whole[0])


def test_vmap_jit_and_remat():
    inputs = draw(64, batch=3)
    options = {"kept_fraction": 0.25, "block_q": 16, "block_k": 8}
    function = functools.partial(attend, **options)
    mapped = jax.vmap(function, in_axes=(0, 0, 0, None))(*inputs[:4])
    np.testing.assert_allclose(mapped, function(*inputs[:4]), atol=1e-6)
    plain = results(function, inputs)
    for x, y in zip(results(jax.jit(jax.checkpoint(function)), inputs), plain, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_shard_map_over_batch_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    inputs = draw(40, batch=2)
    function = functools.partial(attend, kept_fraction=0.25, block_q=16, block_k=8)
    split, heads = jax.P("data", None, "tensor"), jax.P("tensor")
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(split, split, split, heads), out_specs=split
    )
    for x, y in zip(results(jax.jit(sharded), inputs), results(function, inputs), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("selection", ["hard", "soft"])
def test_portions_of_any_size_give_the_same(selection):
    query, key, value, logits, d_out = draw(90, 77, heads=3, batch=2)
    options = {"kept_fraction": 0.3, "block_q": 16, "block_k": 8, "quantize": False}

    def run(entries):
        def attend(*operands):
            call, _ = api._canonical(*operands, selection=selection, **options)
            fewer = dataclasses.replace(call.options, entries_at_once=entries)
            return api._xla(dataclasses.replace(call, options=fewer))

        return results(attend, (query, key, value, logits, d_out))

    blocks = Blocks(90, 77, 16, 8, 0.3)
    attended = blocks.kept * 8 if selection == "hard" else 77

    def portion(entries):
        fewer = reference.Options(blocks, 1.0, entries_at_once=entries)
        return reference._Portion.of(fewer, attended, 16)

    row = attended * 48  # six of them are more than what the linear branch holds
    one, some, all_rows, heads = 1, 4 * row, 6 * row, 3 * 6 * row
    assert [portion(x) for x in (one, some, all_rows, heads)] == [(1, 1), (1, 4), (1, 6), (3, 6)]
    wanted = run(one)
    for entries in (some, all_rows, heads):
        for name, x, y in zip(NAMES, run(entries), wanted, strict=True):
            assert relative(x, y) <= 1e-6, (entries, name)


def test_no_array_of_queries_times_keys():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    logits = jax.ShapeDtypeStruct((1,), jnp.float32)

    def largest(selection):
        def loss(*arguments):
            return attend(*arguments, kept_fraction=0.1, selection=selection).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*[shape] * 3, logits).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for selection in ("hard", "soft"):
        assert largest(selection) < 4096**2 * 4 / 4, selection


def test_nan_is_seen():
    query, key, value, logits, _ = draw(64)
    key[0, 3] = np.nan
    assert np.isnan(attend(query, key, value, logits, block_q=16, block_k=8)).any()


def test_resized_logits():
    logits = jnp.asarray([[0.0, 1.0], [2.0, 2.0]])
    resized = resize_mixing_logits(logits, 4)
    np.testing.assert_allclose(resized, [[0, 0.25, 0.75, 1], [2, 2, 2, 2]], atol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(heads, blocks\).*got \(3,\)"):
        resize_mixing_logits(jnp.zeros(3), 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mixing_logits": np.zeros((2, 3), np.float32)}, ValueError, r"\(2, 4\).*got \(2, 3\)"),
        ({"mixing_logits": np.zeros(2, np.int32)}, TypeError, "mixing_logits must have a float"),
        ({"key": np.zeros((1, 64, 1, 16), np.float32)}, ValueError, "same shape"),
        ({"query": np.zeros((1, 64, 4, 16), np.float32)}, ValueError, "no grouped-query"),
        ({"query": np.zeros((1, 64, 2, 16), np.float16)}, TypeError, "same dtype"),
        ({"query": np.zeros((1, 0, 2, 16), np.float32)}, ValueError, "no axis of size 0"),
        ({"kept_fraction": 0.0}, ValueError, "kept_fraction.*got 0.0"),
        ({"kept_fraction": 1.5}, ValueError, "kept_fraction.*got 1.5"),
        ({"block_q": 0}, ValueError, "block_q and block_k.*got 0 and 8"),
        ({"selection": "top"}, ValueError, "'hard' or 'soft', got 'top'"),
        ({"gradient_scores": "fp4"}, ValueError, "'exact' or 'int8', got 'fp4'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"query_router": np.eye(4, dtype=np.float32)}, ValueError, r"\(16, 16\).*got \(4, 4\)"),
        ({"implementation": "triton"}, ValueError, "'mosaic_gpu', 'xla', got 'triton'"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "needs an NVIDIA H100"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    query, key, value, logits, _ = draw(64)
    arguments = {"query": query, "key": key, "value": value, "mixing_logits": logits}
    options = {"block_q": 16, "block_k": 8}
    with pytest.raises(error, match=message):
        sparse_linear_attention(**{**arguments, **options, **change})


def test_explain():
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((2,), jnp.float32)
    text = explain_sparse_linear_attention(shape, shape, shape, logits)
    assert text.startswith("sparse_linear_attention runs as 'xla', not as 'mosaic_gpu': it needs")
