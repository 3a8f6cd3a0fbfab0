import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels_pallas
from jaxgen.layers import (
    HeadProjections,
    JointAttention,
    SelfAttention,
    attention_function,
    block_diffusion_mask,
    exact_attention,
)


def _random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_attention_names():
    assert attention_function("exact") is exact_attention
    assert attention_function("int8") is kernels_pallas.sage_attention


@pytest.mark.parametrize(
    ("changes", "implementation"),
    [
        ({}, "cudnn"),
        ({"dtype": jnp.float16}, "cudnn"),
        ({"dtype": jnp.float32}, None),
        ({"shape": (1, 2047, 4, 64)}, None),  # fewer than 2**24 scores
        ({"shape": (1, 2048, 4, 60)}, None),
        ({"shape": (1, 2048, 4, 256)}, None),
        ({"mask": jnp.ones((1, 1, 1, 2048), jnp.bool_)}, "cudnn"),
        ({"mask": jnp.ones((1, 1, 2048, 2048), jnp.bool_)}, "cudnn"),
        ({"shape": (2, 2048, 4, 64), "mask": jnp.ones((1, 1, 1, 2048), jnp.bool_)}, "cudnn"),
        ({"shape": (2, 2048, 4, 64), "mask": jnp.ones((2, 1, 1, 2048), jnp.bool_)}, "cudnn"),
        ({"shape": (3, 2048, 4, 64), "mask": jnp.ones((2, 1, 1, 2048), jnp.bool_)}, None),
        ({"mask": jnp.ones((1, 4, 2048, 2048), jnp.bool_)}, None),  # one for each head
        ({"mask": jnp.ones((1, 1, 2048, 1), jnp.bool_)}, None),
        ({"shape": (1, 2049, 4, 64), "mask": jnp.ones((1, 1, 1, 2049), jnp.bool_)}, None),
        ({"backend": "cpu"}, None),
        ({"keywords": {"is_causal": True}}, "cudnn"),
        ({"keywords": {"is_causal": True, "scale": 0.5}}, None),
    ],
)
def test_exact_attention_is_that_of_cudnn_where_scores_are_many(
    monkeypatch, changes, implementation
):
    options = {"shape": (1, 2048, 4, 64), "dtype": jnp.bfloat16, "mask": None, "backend": "gpu"}
    options |= {"keywords": {}} | changes
    called = []
    monkeypatch.setattr(jax, "default_backend", lambda: options["backend"])
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, **keywords: called.append(keywords)
    )
    x = jnp.zeros(options["shape"], options["dtype"])
    exact_attention(x, x, x, mask=options["mask"], **options["keywords"])
    chosen = {"implementation": implementation} if implementation else {}
    assert called == [options["keywords"] | chosen]


def test_exact_attention_takes_what_that_of_jax_takes():
    query, key, value = (_random(2, 6, 4, 8, seed=i) for i in range(3))
    bias, mask = _random(1, 4, 6, 6, seed=3), _random(1, 1, 6, 6, seed=4) > -1
    wanted = jax.nn.dot_product_attention(query, key, value, bias, mask, is_causal=True)
    found = exact_attention(query, key, value, bias, mask, is_causal=True)
    np.testing.assert_array_equal(found, wanted)
    grouped = exact_attention(query, key[:, :, :2], value[:, :, :2], scale=0.5)
    wanted = jax.nn.dot_product_attention(query, key[:, :, :2], value[:, :, :2], scale=0.5)
    np.testing.assert_array_equal(grouped, wanted)
    np.testing.assert_allclose(
        exact_attention(query[0], key[0], value[0]),
        exact_attention(query, key, value)[0],
        atol=1e-6,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_float16_is_computed_in_float32_on_the_cpu(masked):
    query, key, value = (_random(2, 6, 4, 8, seed=i).astype(jnp.float16) for i in range(3))
    bias, mask = _random(1, 4, 6, 6, seed=3).astype(jnp.float16), jnp.tri(6, dtype=bool)[None, None]
    options = {"bias": bias, "mask": mask} if masked else {"is_causal": True}

    def run(*arrays):
        attend = lambda *arrays: exact_attention(*arrays, **options)
        found, pull = jax.vjp(attend, *arrays)
        return found, *pull(found)

    wide = [array.astype(jnp.float32) for array in (query, key[:, :, :2], value[:, :, :2])]
    found = jax.jit(run)(query, key[:, :, :2], value[:, :, :2])
    for got, wanted in zip(found, jax.jit(run)(*wide), strict=True):
        assert got.dtype == jnp.float16
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-3)


def test_only_float16_on_the_cpu_is_widened(monkeypatch):
    called = []

    def attend(query, *_, **__):
        called.append(query.dtype)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    for dtype, backend in (("float16", "cpu"), ("bfloat16", "cpu"), ("float16", "gpu")):
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        x = jnp.zeros((1, 2, 1, 8), dtype)
        assert exact_attention(x, x, x).dtype == dtype
    assert called == [jnp.float32, jnp.bfloat16, jnp.float16]


def test_a_cache_of_float16_is_attended_to_under_jit():
    layer = SelfAttention(8, 2, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    x = _random(2, 5, 8).astype(jnp.float16)
    whole, keys = jax.jit(layer.cached)(x)
    rows = jnp.broadcast_to(jnp.arange(3), (2, 3))
    part, again = jax.jit(lambda x, cache: layer.cached(x, cache))(x[:, 3:], keys.taken(rows, 2))
    assert part.dtype == again.key.dtype == jnp.float16
    np.testing.assert_allclose(part, whole[:, 3:], atol=2e-3)


def test_unknown_attention_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="must be one of 'exact', 'int8', got 'flash'"):
        attention_function("flash")
    with pytest.raises(ValueError, match="must be one of 'exact', 'int8', got 'fp4'"):
        JointAttention(8, 2, attention="fp4", rngs=nnx.Rngs(0))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide dim, got num_heads=3 and dim=8"):
        HeadProjections(8, 3, rngs=nnx.Rngs(0))


def test_qk_norm_makes_queries_and_keys_independent_of_the_input_scale():
    heads = HeadProjections(16, 2, qk_norm=True, rngs=nnx.Rngs(0))
    x = _random(2, 5, 16)
    query, key, value = heads.split(x)
    large_query, large_key, large_value = heads.split(100.0 * x)
    np.testing.assert_allclose(query, large_query, atol=1e-3)
    np.testing.assert_allclose(key, large_key, atol=1e-3)
    np.testing.assert_allclose(100.0 * value, large_value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jnp.square(query).mean(-1), 1.0, atol=1e-3)


def test_self_attention_by_hand():
    layer = SelfAttention(8, 2, rngs=nnx.Rngs(0))
    x = np.asarray(_random(1, 3, 8)[0], np.float64)
    parts = [layer.heads.query, layer.heads.key, layer.heads.value]
    query, key, value = (x @ np.asarray(part.kernel[...], np.float64) for part in parts)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = np.exp(query[:, head] @ key[:, head].T / np.sqrt(4))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, head])
    expected = np.concatenate(heads, -1) @ np.asarray(layer.heads.output.kernel[...], np.float64)
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)[None])[0], expected, atol=1e-5)


def test_mask_hides_keys():
    layer = SelfAttention(8, 2, rngs=nnx.Rngs(0))
    x = _random(1, 4, 8)
    mask = jnp.array([True, True, True, False])[None, None, None, :]
    np.testing.assert_allclose(
        layer(x, mask)[:, :3], layer(x.at[:, 3].set(7.0), mask)[:, :3], atol=1e-6
    )


def test_joint_attention_is_self_attention_over_both_streams():
    joint = JointAttention(8, 2, qk_norm=True, rngs=nnx.Rngs(0))
    alone = SelfAttention(8, 2, qk_norm=True, rngs=nnx.Rngs(1))
    for stream in (joint.image, joint.text):
        nnx.update(stream, nnx.state(alone.heads))
    image, text = _random(2, 5, 8), _random(2, 3, 8, seed=1)
    together = alone(jnp.concatenate([image, text], axis=1))
    image_out, text_out = joint(image, text)
    np.testing.assert_allclose(image_out, together[:, :5], atol=1e-6)
    np.testing.assert_allclose(text_out, together[:, 5:], atol=1e-6)


def test_last_block_returns_no_text():
    joint = JointAttention(8, 2, text_output=False, rngs=nnx.Rngs(0))
    image, text = joint(_random(1, 4, 8), _random(1, 2, 8))
    assert image.shape == (1, 4, 8)
    assert text is None


def test_int8_attention_is_close_to_exact_in_value_and_gradient():
    def run(attention):
        layer = JointAttention(64, 2, qk_norm=True, attention=attention, rngs=nnx.Rngs(0))

        def loss(image, text):
            outputs = layer(image, text)
            return sum(jnp.sum(out * jnp.cos(out)) for out in outputs), outputs

        inputs = (_random(2, 70, 64), _random(2, 9, 64, seed=1))
        gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(*inputs)
        return outputs, gradients

    for bar, exact, quantized in zip((0.03, 0.07), run("exact"), run("int8"), strict=True):
        for expected, got in zip(exact, quantized, strict=True):
            error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
            assert 0.0 < error < bar


def test_layer_in_a_linen_tree():
    linen = nnx.bridge.ToLinen(JointAttention, args=(8, 2), kwargs={"qk_norm": True})
    image, text = _random(2, 5, 8), _random(2, 3, 8, seed=1)
    variables = linen.init(jax.random.key(0), image, text)

    def loss(variables):
        outputs = linen.apply(variables, image, text)
        return sum(jnp.sum(jnp.square(out)) for out in outputs)

    gradients = jax.tree.leaves(jax.grad(loss, allow_int=True)(variables)["params"])
    assert len(gradients) == 20  # four linears and two norms in each stream
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert sum(float(jnp.abs(g).sum()) for g in gradients) > 0.0


@pytest.mark.parametrize("mask", [None, "causal"])
def test_sage_attention_inside_flax_multi_head_attention(mask):
    x = _random(2, 9, 32)
    mask = None if mask is None else nnx.make_causal_mask(jnp.ones((2, 9)))

    def run(**options):
        layer = nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0), **options)
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.square(layer(x, mask=mask))))(x)
        return value, gradient

    (exact, exact_gradient), (value, gradient) = (
        run(),
        run(attention_fn=kernels_pallas.sage_attention),
    )
    np.testing.assert_allclose(value, exact, rtol=0.05)
    error = jnp.linalg.norm(gradient - exact_gradient) / jnp.linalg.norm(exact_gradient)
    assert 0.0 < error < 0.07


def test_cudnn_gets_no_mask_under_which_a_query_sees_nothing(monkeypatch):
    given = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *given_, **_: given.append(given_))
    x = jnp.zeros((2, 2048, 4, 64), jnp.bfloat16)
    few = jnp.zeros((2, 1, 1, 2048), jnp.bool_).at[0, ..., :3].set(True)
    exact_attention(x, x, x, mask=few)
    *_, mask = given[0]
    assert mask.shape == (2, 1, 2048, 2048)
    assert (mask[0].sum(axis=-1) == 3).all()
    assert mask[1].all()  # its gradients are wrong for rows that see nothing
    # Of a causal mask, the first queries see none of the keys that this one shows.
    late = jnp.zeros((1, 1, 1, 2048), jnp.bool_).at[..., 5:].set(True)
    exact_attention(x, x, x, mask=late, is_causal=True)
    *_, mask = given[1]
    assert mask[0, 0, :5].all()
    assert (mask[0, 0, 5:] == late[0, 0]).all()


def _masks(kind, rows, tokens):
    """Returns a mask of (rows, 1, tokens, tokens)."""
    place = np.arange(tokens)
    if kind == "documents":
        document = np.sort(np.random.default_rng(0).integers(0, 5, (rows, tokens)), axis=1)
        return (document[:, :, None] == document[:, None])[:, None]
    if kind == "block diffusion":
        both = np.asarray(block_diffusion_mask(tokens, 64))
        return np.broadcast_to(both, (rows, 1, tokens, tokens))
    seen = np.broadcast_to(place < tokens // 3, (rows, 1, tokens, tokens)).copy()
    seen[0, :, : tokens // 2] = False  # "blind": these queries see nothing
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["documents", "block diffusion", "blind"])
def test_masked_attention_of_cudnn_agrees_with_float32(kind, is_causal):
    rows, tokens, heads = 2, 2048, 4
    mask = jnp.asarray(_masks(kind, rows, tokens))
    parts = [_random(rows, tokens, heads, 64, seed=seed).astype(jnp.bfloat16) for seed in range(4)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, mask, query, key, value, cotangent):
        call = lambda *parts: attend(*parts, mask=mask, is_causal=is_causal)
        found, pull = jax.vjp(call, query, key, value)
        return found, *pull(cotangent)

    # What a query gets that sees nothing is not defined, but its cotangent must do no harm.
    sees = mask & jnp.tri(tokens, dtype=jnp.bool_)[None, None] if is_causal else mask
    allowed = mask | ~sees.any(axis=-1, keepdims=True)
    wide = [part.astype(jnp.float32) for part in parts]
    with jax.numpy_dtype_promotion("standard"):  # XLA's gradients in 16 bits rely on it
        assert "cudnn" in str(run.lower(exact_attention, mask, *parts).compile().as_text())
        found = run(exact_attention, mask, *parts)
        expected = run(jax.nn.dot_product_attention, allowed, *wide)
    for one, other in zip(found, expected, strict=True):
        error = jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other)
        assert error < 1e-2  # cuDNN's and XLA's in bfloat16 are at 0.002 to 0.003
