"""The suite that every implementation of `sage_attention` inherits.

A subclass sets `implementation`. Inputs are drawn in float32 and cast: drawn in bfloat16 they would
take only 128 distinct values, and rounding errors would not average out.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import sage_attention

from .exact_attention import cosine, exact_attention, relative_l2

MASK_NAMES = {
    "is_causal": "is_causal",
    "query_seq_lengths": "query_lengths",
    "key_value_seq_lengths": "key_lengths",
    "local_window_size": "window",
    "mask": "mask",
    "bias": "bias",
    "scale": "scale",
}


def draw(seed, *, batch=1, queries=128, keys=None, heads=2, kv_heads=None, dim=64, key_bias=0.0):
    """N(0, 1) query, key, value and output cotangent, float32; optionally biased key channels."""
    keys, kv_heads = keys or queries, kv_heads or heads
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    query, d_out = normal(batch, queries, heads, dim), normal(batch, queries, heads, dim)
    key, value = normal(batch, keys, kv_heads, dim), normal(batch, keys, kv_heads, dim)
    key += key_bias * normal(1, 1, kv_heads, dim)
    return query, key, value, d_out


class AttentionConformance:
    """Accuracy, semantics and robustness of one implementation."""

    implementation: str
    # With few and wide scores; larger where more tokens share a scale.
    wide_scores_error = 0.026

    @functools.cached_property
    def attend(self):
        return functools.partial(sage_attention, implementation=self.implementation)

    def run(self, query, key, value, d_out, **options):
        """Output and gradients through one jitted program."""

        @jax.jit
        def program(query, key, value, d_out):
            out, pullback = jax.vjp(functools.partial(self.attend, **options), query, key, value)
            return out, pullback(d_out)

        out, gradients = program(query, key, value, d_out)
        return out, gradients

    def check(self, inputs, *, out_error=0.026, gradient_error=0.03, **options):
        """Compare with float64 and return the output and gradients."""
        out, gradients = self.run(*inputs, **options)
        segments = [options.pop(f"{side}_segment_ids", None) for side in ("query", "key_value")]
        names = {MASK_NAMES[name]: value for name, value in options.items()}
        if segments[0] is not None:
            names["mask"] = segments[0][:, None, :, None] == segments[1][:, None, None, :]
        if isinstance(window := names.get("window"), int):
            names["window"] = (window, window)
        expected_out, _, expected = exact_attention(*inputs, **names)
        assert cosine(out, expected_out) >= 0.9996
        assert relative_l2(out, expected_out) <= out_error
        for name, actual, wanted in zip("qkv", gradients, expected, strict=False):
            if np.linalg.norm(wanted) < 1e-6:  # every query sees one key: dS is zero
                assert np.abs(actual).max() <= 0.2, f"d{name}"
                continue
            assert cosine(actual, wanted) >= 1 - gradient_error**2, f"d{name}"
            assert relative_l2(actual, wanted) <= gradient_error, f"d{name}"
        return out, gradients

    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("tokens", [64, 256, 1024])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_accuracy_against_float64(self, tokens, dim, is_causal):
        self.check(draw(tokens + dim, queries=tokens, dim=dim), is_causal=is_causal)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_error_does_not_grow_with_length(self, is_causal):
        errors = []
        for tokens in (256, 2048):
            inputs = draw(3, queries=tokens, heads=2, kv_heads=1, dim=128)
            out, gradients = self.check(inputs, is_causal=is_causal)
            expected_out, _, expected = exact_attention(*inputs, is_causal=is_causal)
            pairs = zip((out, *gradients), (expected_out, *expected[:3]), strict=True)
            errors.append([relative_l2(actual, wanted) for actual, wanted in pairs])
        assert np.all(np.array(errors[1]) <= 1.15 * np.array(errors[0]))

    @pytest.mark.parametrize("tokens", [64, 300, 1024])
    def test_biased_keys_are_smoothed(self, tokens):
        self.check(draw(5, queries=tokens, key_bias=8.0))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
    def test_grouped_query_heads(self, heads, kv_heads):
        self.check(draw(7, batch=2, queries=200, heads=heads, kv_heads=kv_heads), is_causal=True)

    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 77), (77, 1), (63, 65), (100, 333)])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_odd_lengths(self, queries, keys, is_causal):
        self.check(draw(11, queries=queries, keys=keys), is_causal=is_causal)

    @pytest.mark.parametrize("dim", [8, 24, 40, 80, 96, 256])
    def test_head_dims(self, dim):
        self.check(draw(13, queries=150, dim=dim))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        inputs = [jnp.asarray(x).astype(dtype) for x in draw(17, queries=200)]
        out, gradients = self.check(inputs)
        assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}

    @pytest.mark.parametrize("window", [(3, 2), (100, 0), 17])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_local_window(self, window, is_causal):
        self.check(draw(19, queries=190), local_window_size=window, is_causal=is_causal)

    def test_lengths(self):
        query_lengths, key_lengths = np.array([150, 3, 1]), np.array([9, 150, 64])
        self.check(
            draw(23, batch=3, queries=150),
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
        )

    @pytest.mark.parametrize(
        "shape", [(2, 4, 90, 130), (1, 1, 90, 130), (2, 1, 1, 130), (1, 4, 90, 1), (90, 130)]
    )
    def test_masks_of_every_shape(self, shape):
        mask = np.random.default_rng(0).random(shape) < 0.7
        self.check(draw(29, batch=2, queries=90, keys=130, heads=4, kv_heads=2), mask=mask)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_segments(self, is_causal):
        """Packed sequences: documents of uneven length, one of a single token, one unseen."""
        inputs = draw(30, batch=2, queries=150, heads=4, kv_heads=2)
        of_query = np.stack([np.repeat([3, 1, 7], [80, 1, 69]), np.repeat([0, 1], [20, 130])])
        of_key = np.stack([np.repeat([3, 1, 7], [80, 1, 69]), np.repeat([0, 2, 1], [20, 9, 121])])
        segments = {"query_segment_ids": of_query, "key_value_segment_ids": of_key}
        self.check(inputs, **segments, is_causal=is_causal)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_segments_are_a_mask(self, is_causal):
        inputs = draw(30, batch=2, queries=150)
        ids = np.random.default_rng(7).integers(0, 4, (2, 2, 150))
        segments = {"query_segment_ids": ids[0], "key_value_segment_ids": ids[1]}
        actual = self.run(*inputs, **segments, is_causal=is_causal)
        mask = ids[0][:, None, :, None] == ids[1][:, None, None, :]
        expected = self.run(*inputs, mask=mask, is_causal=is_causal)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    @pytest.mark.parametrize("scale", [0.02, 1.0])
    def test_scale(self, scale):
        self.check(
            draw(31, dim=16), scale=scale, out_error=self.wide_scores_error, gradient_error=0.12
        )

    @pytest.mark.parametrize(
        "shape", [(2, 4, 90, 130), (1, 4, 1, 130), (2, 1, 90, 1), (1, 1, 1, 1), (4, 90, 130)]
    )
    def test_bias_and_its_gradient(self, shape):
        inputs = draw(37, batch=2, queries=90, keys=130, heads=4, kv_heads=2)
        bias = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        self.check(inputs, bias=bias)
        query, key, value, d_out = inputs
        _, pullback = jax.vjp(lambda b: self.attend(query, key, value, b), jnp.asarray(bias))
        (d_bias,) = pullback(d_out)
        ds = exact_attention(*inputs, bias=bias)[2][3]
        lifted = (1,) * (4 - len(shape)) + shape
        axes = tuple(axis for axis, size in enumerate(lifted) if size == 1)
        expected = ds.sum(axes, keepdims=True).reshape(shape)
        assert d_bias.shape == shape
        if 130 in shape:
            assert relative_l2(d_bias, expected) <= 0.065
        else:  # summed over all keys the gradient is zero: every row of dS sums to zero
            np.testing.assert_allclose(d_bias, 0, atol=2e-3 * np.abs(ds).sum())

    def test_residual_and_its_gradient(self):
        inputs = draw(41, batch=2, queries=100, keys=70, heads=4, kv_heads=2, key_bias=4.0)
        d_lse = np.random.default_rng(2).standard_normal((2, 100, 4)).astype(np.float32)
        attend = functools.partial(self.attend, return_residual=True)
        (_, lse), pullback = jax.vjp(attend, *inputs[:3])
        _, expected_lse, expected = exact_attention(*inputs, d_lse=d_lse)
        assert lse.dtype == jnp.float32
        np.testing.assert_allclose(lse, expected_lse, atol=0.05)
        for actual, wanted in zip(pullback((inputs[3], d_lse)), expected, strict=False):
            assert relative_l2(actual, wanted) <= 0.065

    def test_agrees_with_jax_nn(self):
        query, key, value, _ = draw(43, batch=2, queries=80, heads=4, kv_heads=2)
        options = {"is_causal": True, "local_window_size": (20, 5)}
        out, lse = self.attend(query, key, value, return_residual=True, **options)
        expected, expected_lse = jax.nn.dot_product_attention(
            query, key, value, return_residual=True, **options
        )
        assert relative_l2(out, expected) <= 0.026
        np.testing.assert_allclose(lse, expected_lse, atol=0.05)

    def test_without_batch_axis(self):
        query, key, value, _ = draw(47, queries=70)
        out = self.attend(query, key, value)
        np.testing.assert_array_equal(self.attend(query[0], key[0], value[0]), out[0])

    def test_two_runs_are_bit_identical(self):
        inputs = draw(53, batch=2, queries=200)
        first, second = self.run(*inputs), self.run(*inputs)
        jax.tree.map(np.testing.assert_array_equal, first, second)

    def test_vmap_remat_and_scan(self):
        query, key, value, _ = draw(59, batch=3, queries=70)
        expected = self.attend(query, key, value)
        mapped = jax.vmap(self.attend)(query, key, value)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
        loss = lambda attend: jax.grad(lambda q: jnp.sum(attend(q, key, value) ** 2))(query)
        remat = loss(jax.checkpoint(self.attend))
        np.testing.assert_allclose(remat, loss(self.attend), rtol=1e-5, atol=1e-6)
        _, scanned = jax.lax.scan(lambda carry, x: (carry, self.attend(*x)), 0, (query, key, value))
        np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-6)

    def test_the_result_does_not_depend_on_x64_mode(self):
        query, key, value, _ = draw(63, queries=70, heads=4, kv_heads=2)
        options = {"is_causal": True, "local_window_size": 9, "query_seq_lengths": np.array([60])}
        gradient = jax.grad(lambda q: jnp.sum(self.attend(q, key, value, **options) ** 2))
        expected = gradient(query)
        with jax.enable_x64(True):
            actual = gradient(query)
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_traced_scale(self, dtype):
        inputs = [jnp.asarray(x).astype(dtype) for x in draw(61, queries=70)]
        query, key, value, weights = inputs
        traced = jax.jit(lambda s: self.attend(query, key, value, scale=s))
        expected = self.attend(query, key, value, scale=0.3)
        actual = traced(jnp.float32(0.3))
        assert actual.dtype == dtype
        assert relative_l2(actual, expected) <= 0.01
        loss = lambda s: jnp.sum((traced(s) * weights).astype(jnp.float32))
        slope = jax.grad(loss)(jnp.float32(0.3))
        step = 0.05
        losses = [
            np.sum(exact_attention(*inputs, scale=s)[0] * np.asarray(weights, np.float64))
            for s in (0.3 + step, 0.3 - step)
        ]
        size = np.sqrt(query.size)
        assert abs(slope - (losses[0] - losses[1]) / (2 * step)) <= 0.1 * abs(slope) + 0.05 * size

    def test_traced_scale_does_not_overflow_half_precision(self):
        query, key, value, _ = (jnp.asarray(x).astype(jnp.float16) for x in draw(62, queries=70))
        scaled = self.attend(100 * query, key, value, scale=jnp.float32(1000.0))
        assert np.isfinite(scaled).all()

    @pytest.mark.parametrize("shift", [-1e4, -1e9, float(jnp.finfo(jnp.float32).min)])
    def test_a_bias_that_shifts_a_whole_row_changes_nothing(self, shift):
        """An additive mask on padded queries: softmax ignores it, and so must the gradients."""
        inputs = draw(65, queries=70)
        bias = np.zeros((1, 1, 70, 1), np.float32)
        bias[:, :, 60:] = shift
        _, gradients = self.run(*inputs, bias=bias)
        _, expected = self.run(*inputs)
        # At such scores float32 keeps no differences between keys: their rows become uniform.
        query, key, value, d_out = inputs
        query = query.copy()
        query[:, 60:] *= 0.0 if shift < -1e8 else 1.0
        _, _, (dq, dk, dv, _) = exact_attention(query, key, value, d_out)
        assert relative_l2(gradients[0][:, :60], expected[0][:, :60]) <= 0.03
        assert relative_l2(gradients[2], dv) <= 0.065
        if shift > -1e8:
            assert relative_l2(gradients[0], dq) <= 0.065
            assert relative_l2(gradients[1], dk) <= 0.065

    @pytest.mark.parametrize("broken", ["query", "key", "value", "d_out", "bias"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_visible_nan_and_infinity_are_not_hidden(self, broken, value):
        """A training loop that skips updates that are not finite has to see them."""
        inputs = dict(zip(("query", "key", "value", "d_out"), draw(66, queries=70), strict=True))
        inputs["bias"] = np.zeros((1, 1, 70, 70), np.float32)
        inputs[broken][0, 0, 1, 3] = value
        out, gradients = self.run(
            inputs["query"], inputs["key"], inputs["value"], inputs["d_out"], bias=inputs["bias"]
        )
        assert not all(np.isfinite(x).all() for x in (out, *gradients))
        if broken != "d_out":
            assert not np.isfinite(out).all()

    def test_lengths_out_of_range_inside_jit_are_cut_off(self):
        inputs = draw(68, queries=70)
        lengths = jnp.array([100], jnp.int32)

        @jax.jit
        def program(lengths):
            names = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
            return self.attend(*inputs[:3], **names)

        np.testing.assert_array_equal(program(lengths), program(jnp.array([70], jnp.int32)))
        assert not np.any(program(-lengths))

    @pytest.mark.parametrize("sigma", [1.0, 3.0])
    def test_biased_values_and_wide_scores(self, sigma):
        """Section 7.1 of the paper at sigma 3; channel means of V and dO of deviation 4 and 1."""
        query, key, value, d_out = draw(69, queries=512, dim=128)
        rng = np.random.default_rng(1)
        value = value + 4 * rng.standard_normal((1, 1, 2, 128)).astype(np.float32)
        d_out = d_out + rng.standard_normal((1, 1, 2, 128)).astype(np.float32)
        inputs = (sigma * query, sigma * key, value, d_out)
        out, gradients = self.run(*inputs, smooth_values=True)
        expected_out, _, expected = exact_attention(*inputs)
        limit = 0.065 if sigma == 1.0 else 0.09
        assert relative_l2(out, expected_out) <= 0.026
        for actual, wanted in zip(gradients, expected, strict=False):
            assert relative_l2(actual, wanted) <= limit
        _, plain = self.run(*inputs)
        assert relative_l2(plain[0], expected[0]) <= 0.2

    def test_values_with_a_large_mean_need_smoothing(self):
        query, key, value, d_out = draw(70, queries=200)
        inputs = (query, key, value + 50, d_out)
        expected = exact_attention(*inputs)[2]
        _, smooth = self.run(*inputs, smooth_values=True)
        _, plain = self.run(*inputs)
        assert relative_l2(smooth[0], expected[0]) <= 0.065
        assert relative_l2(plain[0], expected[0]) >= 2 * relative_l2(smooth[0], expected[0])

    def test_fully_masked_rows(self):
        query, key, value, d_out = draw(67, batch=2, queries=70)
        mask = np.ones((2, 1, 70, 70), bool)
        mask[0, :, 5] = mask[1] = False
        out, gradients = self.run(query, key, value, d_out, mask=mask)
        assert all(np.isfinite(x).all() for x in (out, *gradients))
        assert not np.any(out[0, 5])
        assert not np.any(out[1])
        assert all(not np.any(x[1]) for x in gradients)
        out, lse = self.attend(query, key, value, mask=mask, return_residual=True)
        assert np.isfinite(lse).all()

    def test_all_zero_inputs(self):
        zeros = [np.zeros((1, 70, 2, 64), np.float32)] * 4
        out, gradients = self.run(*zeros)
        assert all(not np.any(x) for x in (out, *gradients))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("tokens", [1, 130])
    def test_huge_inputs(self, tokens, dtype):
        inputs = [jnp.asarray(1e4 * x).astype(dtype) for x in draw(71, queries=tokens)]
        out, gradients = self.run(*inputs, is_causal=True)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, *gradients))

    def test_tiny_inputs(self):
        inputs = [1e-30 * x for x in draw(73, queries=70)]
        out, gradients = self.run(*inputs)
        assert all(np.isfinite(x).all() for x in (out, *gradients))

    @pytest.mark.parametrize("by_mask", [False, True])
    def test_nan_in_padding_does_not_leak(self, by_mask):
        query, key, value, d_out = draw(79, batch=2, queries=100, heads=4, kv_heads=2)
        lengths = np.array([100, 37], np.int32)
        seen = np.arange(100)[None, :] < lengths[:, None]
        if by_mask:
            options = {"mask": seen[:, None, None, :] & seen[:, None, :, None]}
        else:
            options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        clean = self.run(query, key, value, d_out, **options)
        fill = lambda x: np.where(seen[..., None, None], x, np.nan).astype(np.float32)
        dirty = self.run(fill(query), fill(key), fill(value), fill(d_out), **options)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)

    def test_future_tokens_do_not_change_the_past_much(self):
        """Causal: only the mean of the keys, which softmax ignores, can carry anything back."""
        query, key, value, _ = draw(83, queries=128)
        changed = key.copy()
        changed[:, 100:] += 1.0
        before = self.attend(query, key, value, is_causal=True)[:, :64]
        after = self.attend(query, changed, value, is_causal=True)[:, :64]
        assert relative_l2(after, before) <= 0.02

    @hypothesis.settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.differing_executors],
    )
    @hypothesis.given(data=st.data())
    def test_fuzz(self, data):
        lengths = st.sampled_from([1, 2, 31, 63, 64, 65, 127, 129, 192])
        queries, keys = data.draw(lengths), data.draw(lengths)
        kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        dim = data.draw(st.sampled_from([8, 16, 40, 64, 72, 128]))
        batch = data.draw(st.integers(1, 3))
        options = {"is_causal": data.draw(st.booleans())}
        if data.draw(st.booleans()):
            options["local_window_size"] = (data.draw(lengths), data.draw(lengths))
        of_length = lambda most: np.array(
            data.draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch)), np.int32
        )
        if data.draw(st.booleans()):
            options["query_seq_lengths"] = of_length(queries)
        if data.draw(st.booleans()):
            options["key_value_seq_lengths"] = of_length(keys)
        inputs = draw(
            data.draw(st.integers(0, 99)),
            batch=batch, queries=queries, keys=keys, heads=kv_heads * group, kv_heads=kv_heads,
            dim=dim, key_bias=data.draw(st.sampled_from([0.0, 8.0])),
        )  # fmt: skip
        magnitude = np.float32(data.draw(st.sampled_from([1e-3, 1.0, 1e3])))
        inputs = (*inputs[:2], inputs[2] * magnitude, inputs[3] * magnitude)
        out, gradients = self.run(*inputs, **options)
        names = {MASK_NAMES[name]: value for name, value in options.items()}
        expected_out, _, expected = exact_attention(*inputs, **names)
        pairs = zip("oqkv", (out, *gradients), (expected_out, *expected[:3]), strict=True)
        for name, actual, wanted in pairs:
            # dQ and dK cancel where a query sees a single key; what is left is rounding of V.
            floor = magnitude * (0.01 if name in "ov" else 0.2 * magnitude / np.sqrt(keys))
            error = np.linalg.norm(np.asarray(actual, np.float64) - wanted)
            assert error <= 0.08 * np.linalg.norm(wanted) + floor * np.sqrt(wanted.size), name
