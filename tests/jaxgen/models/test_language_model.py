import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models import (
    LANGUAGE_MODEL_PRESETS,
    DiffusionLM,
    DiffusionLMConfig,
    LanguageModel,
    LanguageModelConfig,
)

TINY = LanguageModelConfig(
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=48,
    vocabulary_size=40,
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 40)


def _model(**changes):
    """A model whose weights are large enough for predictions to differ."""
    model = LanguageModel(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda a: 6 * a if a.ndim == 2 else a, state))
    return model


@nnx.jit
def _run(model, tokens, positions=None, segment_ids=None):
    return model(tokens, positions, segment_ids)


def test_it_is_the_diffusion_model_behind_a_causal_mask():
    model = _model()
    fields = {f.name for f in dataclasses.fields(DiffusionLMConfig)}
    shared = {name: v for name, v in vars(TINY).items() if name in fields - {"remat"}}
    other = DiffusionLM(DiffusionLMConfig(**shared, mask_id=0), rngs=nnx.Rngs(1))
    nnx.update(other, nnx.state(model))
    mask = jnp.tril(jnp.ones((12, 12), bool))[None]
    np.testing.assert_allclose(_run(model, TOKENS), other(TOKENS, mask=mask), atol=2e-5)


@pytest.mark.parametrize("attention", ["exact", "int8"])
def test_no_token_sees_a_later_one(attention):
    model = _model(attention=attention)
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 40)
    before, after = _run(model, TOKENS), _run(model, changed)
    # The scales of 8-bit keys are shared by blocks of tokens, so they do see each other's size.
    tolerance = 1e-6 if attention == "exact" else 0.1
    np.testing.assert_allclose(after[:, :7], before[:, :7], atol=tolerance)
    assert np.abs(after[:, 7:] - before[:, 7:]).max() > 0.2


@pytest.mark.parametrize(("attention", "tolerance"), [("exact", 1e-5), ("int8", 0.1)])
def test_documents_of_a_row_are_as_if_alone(attention, tolerance):
    model = _model(attention=attention)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    positions = jnp.array([[*range(5), *range(4), *range(3)], [*range(12)]])
    packed = _run(model, TOKENS, positions, segments)
    for row, part in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 12))):
        alone = _run(model, TOKENS[row : row + 1, part])
        np.testing.assert_allclose(packed[row, part], alone[0], atol=tolerance)
    assert np.abs(packed[0, 5:9] - _run(model, TOKENS)[0, 5:9]).max() > 0.2


def test_int8_attention_is_close_to_exact_attention():
    exact, int8 = _run(_model(), TOKENS), _run(_model(attention="int8"), TOKENS)
    error = np.linalg.norm(int8 - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03


def _gradients(model):
    loss = lambda model: jnp.sum(jnp.sin(model(TOKENS)))
    return nnx.jit(nnx.value_and_grad(loss))(model)


@pytest.mark.parametrize(
    "changes",
    [{"remat": "block"}, {"remat": "keep_attention"}, {"remat": "keep_products"}, {"scan": True}],
)
def test_recomputing_and_scanning_change_nothing(changes):
    options = {"attention": "int8", "num_layers": 1} if "remat" in changes else {}
    value, gradients = _gradients(_model(**options, **changes))
    expected, wanted = _gradients(_model(**options))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), gradients, wanted
    )


def test_keeping_what_attention_needs_saves_its_forward_pass():
    def products(remat):
        model = _model(attention="int8", num_layers=1, remat=remat)
        graph, state = nnx.split(model)
        loss = lambda state: jnp.sum(nnx.merge(graph, state)(TOKENS))
        return str(jax.make_jaxpr(jax.grad(loss))(state)).count("preferred_element_type=int32")

    assert products("none") == products("keep_attention") < products("block")
    assert products("none") == products("keep_products")


def test_keeping_products_computes_none_of_them_again():
    def products(remat):
        model = _model(num_layers=1, remat=remat)
        graph, state = nnx.split(model)
        loss = lambda state: jnp.sum(nnx.merge(graph, state)(TOKENS))
        return str(jax.make_jaxpr(jax.grad(loss))(state)).count("dot_general")

    # Exact attention outside cuDNN names nothing: its two products are computed again.
    assert products("none") + 2 == products("keep_products") < products("keep_attention")


def test_keeping_products_keeps_what_cudnn_attention_needs(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr("jaxgen.layers.attention._many_scores", lambda *_: True)

    def forward_passes(remat):
        model = _model(num_layers=1, remat=remat, dtype=jnp.bfloat16)
        graph, state = nnx.split(model)
        loss = lambda state: jnp.sum(nnx.merge(graph, state)(TOKENS))
        text = str(jax.make_jaxpr(jax.grad(loss))(state))
        return len(re.findall(r"= dot_product_attention_fwd\w*\[", text))

    assert forward_passes("none") == forward_passes("keep_products") == 1
    assert forward_passes("keep_attention") == 1
    assert forward_passes("block") == 2


def test_operations_are_those_that_xla_counts():
    config = dataclasses.replace(TINY, vocabulary_size=64)
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    counted = run.lower(state, tokens).compile().cost_analysis()["flops"]
    heads = config.num_heads * config.head_dim
    # XLA computes both halves of the scores, and counts what is no product, too.
    upper_half = 2 * config.num_layers * heads * 64 * 63
    assert (
        config.operations(64) + upper_half < counted < 1.15 * (config.operations(64) + upper_half)
    )


@pytest.mark.parametrize(
    ("name", "millions"), [("10m", 10.8), ("125m", 114.2), ("325m", 324.2), ("8b", 8030.3)]
)
def test_presets_have_the_sizes_of_their_names(name, millions):
    config = LANGUAGE_MODEL_PRESETS[name]
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"remat": True},
            "remat must be one of .*, keep_products, got True",
        ),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"attention": "sparse"}, "attention must be one of 'exact', 'int8', got 'sparse'"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive finite number, got inf"),
    ],
)
def test_refuses_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_refuses_tokens_and_segments_that_do_not_fit():
    model = LanguageModel(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"tokens must be ids \(batch, tokens\), got float32"):
        model(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"segment_ids must have shape \(2, 12\), got \(2, 11\)"):
        model(TOKENS, segment_ids=TOKENS[:, 1:])
