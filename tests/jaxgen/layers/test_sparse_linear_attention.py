import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import export_flat, export_wan, load_flat, load_wan
from jaxgen.layers import (
    ALL_SPARSE,
    BasisParam,
    MixingParam,
    RouterParam,
    SLA1Attention,
    SparseLinearAttention,
    mixing_of_sums,
    sla1_from_turbodiffusion,
    sla1_to_turbodiffusion,
)
from jaxgen.models import Wan, WanConfig
from kernels_pallas import sparse_linear_attention

HEADS, HEAD_DIM, TOKENS = 2, 8, 44
CUT = {"kept_fraction": 0.3, "block_q": 12, "block_k": 8}  # 4 x 6 blocks, the last ones shorter
WAN = WanConfig(
    num_layers=2, num_heads=2, ffn_dim=16, patch_size=(1, 1, 1), in_channels=3, head_dim=8,
    text_dim=6, freq_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _operands(tokens=TOKENS, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shape = (2, tokens, HEADS, HEAD_DIM)
    query, key, value = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(3))
    return 2 * query, key + 0.5, value


def _layer(**options):
    return SparseLinearAttention(HEADS, HEAD_DIM, TOKENS, **(CUT | {"quantize": False} | options))


def _distance(first, second):
    return float(jnp.linalg.norm(first - second) / jnp.linalg.norm(second))


def test_a_new_layer_is_the_function_with_the_router_of_sla():
    layer, operands = _layer(quantize=True), _operands()
    assert layer.mixing_logits.shape == (HEADS, 4)
    expected = sparse_linear_attention(*operands, jnp.full((HEADS, 4), 2.0), **CUT)
    assert _distance(layer(*operands), expected) < 1e-6
    assert layer(*_operands(dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def test_every_parameter_has_a_kind_of_its_own():
    layer = _layer(per_head_routers=True)
    kinds = {name: type(getattr(layer, name)) for name in ("query_router", "mixing_logits")}
    assert kinds == {"query_router": RouterParam, "mixing_logits": MixingParam}
    assert layer.key_router.shape == (HEADS, HEAD_DIM, HEAD_DIM)
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 3
    assert len(jax.tree.leaves(nnx.state(layer))) == 4


@pytest.mark.parametrize("per_head", [False, True])
def test_the_soft_choice_trains_routers_and_the_hard_one_does_not(per_head):
    layer, operands = _layer(per_head_routers=per_head, per_head_ratio=per_head), _operands()

    def gradients(layer):
        loss = lambda layer: jnp.mean(jnp.square(layer(*operands)))
        return nnx.grad(loss)(layer)

    hard, soft = gradients(layer), gradients(layer.with_options(selection="soft"))
    assert not jnp.any(hard.query_router[...])
    for name in ("query_router", "key_router", "mixing_logits"):
        assert jnp.all(jnp.isfinite(soft[name][...]))
        assert float(jnp.linalg.norm(soft[name][...])) > 1e-5
    assert float(jnp.linalg.norm(hard.mixing_logits[...])) > 1e-5


def _turned():
    """A layer whose heads have a basis, well away from the identity."""
    layer = _layer(learn_basis=True)
    noise = jax.random.normal(jax.random.key(3), layer.head_basis.shape)
    layer.head_basis[...] += 0.3 / HEAD_DIM**0.5 * noise
    return layer


def test_a_basis_changes_the_linear_branch_alone():
    operands, plain, turned = _operands(), _layer(), _turned()
    np.testing.assert_allclose(_layer(learn_basis=True)(*operands), plain(*operands), atol=1e-6)
    np.testing.assert_array_equal(turned.route(*operands[:2]), plain.route(*operands[:2]))
    for logit, least, most in ((ALL_SPARSE, 0.0, 1e-5), (-ALL_SPARSE, 1e-3, 1.0)):
        for layer in (plain, turned):
            layer.mixing_logits[...] = jnp.full_like(layer.mixing_logits[...], logit)
        assert least <= _distance(turned(*operands), plain(*operands)) <= most
    bfloat16 = turned(*_operands(dtype=jnp.bfloat16))
    assert bfloat16.dtype == jnp.bfloat16
    assert _distance(bfloat16.astype(jnp.float32), turned(*operands)) < 0.03


def test_a_basis_is_learnt_that_comes_closer_to_full_attention():
    layer, operands = _layer(learn_basis=True, selection="soft"), _operands()
    layer.mixing_logits[...] = jnp.zeros_like(layer.mixing_logits[...])
    full = jax.nn.dot_product_attention(*operands)

    def loss(layer):
        return jnp.mean(jnp.square(layer(*operands) - full))

    first, gradients = nnx.value_and_grad(loss)(layer)
    basis, gradient = layer.head_basis[...], gradients.head_basis[...]
    step = 0.1 * gradient / jnp.linalg.norm(gradient)

    def moved(step):
        layer.head_basis[...] = basis + step
        return float(loss(layer))

    assert moved(-step) < float(first) < moved(step)
    assert isinstance(layer.head_basis, BasisParam)


def test_other_lengths_are_refused_by_name_and_a_ratio_a_head_allows_them():
    operands = _operands(tokens=50)
    with pytest.raises(ValueError, match=r"mixing_logits must have shape .* resize_mixing_logits"):
        _layer()(*operands)
    layer = SparseLinearAttention(HEADS, HEAD_DIM, None, per_head_ratio=True, **CUT)
    assert layer(*operands).shape == operands[0].shape


def test_calibrated_mixing_is_the_best_there_is():
    operands = _operands()
    full = jax.nn.dot_product_attention(*operands)

    def error(layer, logits):
        layer.mixing_logits[...] = logits
        return float(jnp.sum(jnp.square(layer(*operands) - full)))

    for per_head in (False, True):
        layer = _layer(per_head_ratio=per_head)
        best = layer.calibrate_mixing(*operands)
        assert best.shape == layer.mixing_logits.shape
        least = error(layer, best)
        assert least < error(layer, jnp.full_like(best, 2.0))
        alpha = jax.nn.sigmoid(best)
        inside = (alpha > 0.03) & (alpha < 0.97)
        assert inside.any()
        for step in (-0.1, 0.1):
            assert error(layer, best + jnp.where(inside, step, 0.0)) > least


def test_sums_of_batches_add_up():
    layer, operands = _layer(), _operands()
    arrays = (*operands, jax.nn.dot_product_attention(*operands))
    assert len(operands[0]) == 2
    halves = [layer.mixing_sums(*(x[i : i + 1] for x in arrays)) for i in range(2)]
    sums = jax.tree.map(jnp.add, *halves)
    np.testing.assert_allclose(
        mixing_of_sums(*sums), layer.calibrate_mixing(*operands), rtol=1e-4, atol=1e-4
    )


def test_calibration_where_every_block_is_chosen():
    logits = _layer(kept_fraction=1.0).calibrate_mixing(*_operands())
    np.testing.assert_allclose(jax.nn.sigmoid(logits), 0.98, rtol=1e-5)


def test_routes_follow_the_router():
    layer, (query, key, _) = _layer(), _operands()
    mask = layer.route(query, key)
    assert mask.shape == (2, HEADS, 4, 6)
    np.testing.assert_array_equal(mask.sum(axis=-1), 1)
    layer.query_router[...] = -layer.query_router[...]
    assert jnp.any(layer.route(query, key) != mask)
    assert layer.with_options(kept_fraction=0.5).route(query, key).sum() == 3 * mask.sum()


def test_changed_options_leave_the_layer_alone():
    layer, operands = _layer(), _operands()
    before = layer(*operands)
    changed = layer.with_options(quantize=True, kept_fraction=1.0)
    assert not layer.quantize
    np.testing.assert_array_equal(layer(*operands), before)
    assert _distance(changed(*operands), jax.nn.dot_product_attention(*operands)) < 0.03
    changed.mixing_logits[...] = changed.mixing_logits[...] - 5.0
    np.testing.assert_array_equal(layer(*operands), before)
    with pytest.raises(ValueError, match=r"with_options changes kept_fraction, .*; got block_q"):
        layer.with_options(block_q=64)


def _plugged(tokens, **options):
    return SparseLinearAttention(2, 8, tokens, **({"block_q": 8, "block_k": 4} | options))


def test_plugged_into_wan_and_saved_with_its_settings():
    model = Wan(WAN, attend=lambda number: _plugged(16), rngs=nnx.Rngs(0))
    for number, block in enumerate(model.blocks):
        block.self_attention.attend.mixing_logits[...] += number
    saved = export_wan(model)
    names = {name.split(".attend.")[1] for name in saved if ".attend." in name}
    assert names == {"query_router", "key_router", "mixing_logits", "settings"}
    again = load_wan(WAN, saved, attend=lambda number: _plugged(16))
    logits = [block.self_attention.attend.mixing_logits[...] for block in again.blocks]
    assert [float(value[0, 0]) for value in logits] == [2.0, 3.0]
    inputs = jnp.ones((1, 4, 2, 2, 3)), jnp.full((1,), 500.0), jnp.ones((1, 3, 6))
    assert nnx.jit(lambda model, *inputs: model(*inputs))(again, *inputs).shape == (1, 4, 2, 2, 3)
    with pytest.raises(
        ValueError,
        match=r"file: blocks\.0\.attn1\.attend\.settings: trained with other settings; "
        r"kept_fraction is 0\.05 there and 0\.1 here, block_k is 4 there and 2 here$",
    ):
        load_wan(WAN, saved, "file", attend=lambda _: _plugged(16, kept_fraction=0.1, block_k=2))


def test_flat_files_compare_settings_too():
    arrays = export_flat(_layer())
    assert load_flat(_layer, arrays).mixing_logits.shape == (HEADS, 4)
    with pytest.raises(ValueError, match=r"kept_fraction is 0\.3 there and 0\.4 here"):
        load_flat(lambda: _layer(kept_fraction=0.4), arrays)


def _sla1(layer, query, key, value, features, left):
    """SLA with arrays of queries x keys, in NumPy."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / HEAD_DIM**0.5
    kept = np.repeat(np.repeat(left, 12, axis=2), 8, axis=3)[:, :, :TOKENS, :TOKENS]
    sparse = np.exp(scores) * kept
    linear = np.einsum("bqhd,bkhd->bhqk", features(query), features(key))
    linear *= ~kept if layer.complement else 1
    rows = lambda p: np.where(p.any(axis=-1), p.sum(axis=-1), 1)[
        ..., None
    ]  # relu may leave nothing
    sparse, linear = (np.einsum("bhqk,bkhd->bqhd", p / rows(p), value) for p in (sparse, linear))
    weight, bias = (np.asarray(p[...]) for p in (layer.proj_l.weight, layer.proj_l.bias))
    return sparse + linear @ weight.T + bias


FEATURES = {
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1,
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("name", FEATURES)
def test_sla_adds_projected_linear_attention(name, complement):
    layer = SLA1Attention(HEAD_DIM, **CUT, feature_map=name, complement=complement)
    operands = _operands()
    random = np.random.default_rng(1)
    layer.proj_l.weight[...] = jnp.asarray(random.normal(size=(HEAD_DIM,) * 2), jnp.float32)
    layer.proj_l.bias[...] = jnp.asarray(random.normal(size=HEAD_DIM), jnp.float32)
    left = np.asarray(_layer().route(*operands[:2]))
    expected = _sla1(layer, *operands, FEATURES[name], left)
    assert _distance(layer(*operands), expected) < 1e-5


def test_a_new_sla_layer_is_sparse_attention_and_can_learn():
    layer, operands = SLA1Attention(HEAD_DIM, **CUT), _operands()
    only_sparse = _layer(initial_logit=40.0)
    assert _distance(layer(*operands), only_sparse(*operands)) < 1e-6
    target = jax.nn.dot_product_attention(*operands)
    loss = lambda layer: jnp.mean(jnp.square(layer(*operands) - target))
    gradient = nnx.grad(loss)(layer)
    assert all(jnp.linalg.norm(leaf) > 1e-4 for leaf in jax.tree.leaves(gradient))


def test_sla_with_all_blocks_chosen_has_no_linear_part():
    layer, operands = SLA1Attention(HEAD_DIM, **(CUT | {"kept_fraction": 1.0})), _operands()
    layer.proj_l.weight[...] = jnp.eye(HEAD_DIM)
    full = jax.nn.dot_product_attention(*operands)
    assert _distance(layer(*operands), full) < 1e-5


def test_released_projections_come_in_and_go_out():
    layer = lambda: SLA1Attention(8, block_q=8, block_k=4)
    random = np.random.default_rng(0)
    released = {"head.bias": np.zeros(3)}
    for number in (0, 1):
        prefix = f"blocks.{number}.self_attn.attn_op.local_attn.proj_l."
        released[prefix + "weight"] = random.normal(size=(8, 8)).astype(np.float32)
        released[prefix + "bias"] = random.normal(size=8).astype(np.float32)
    plain = export_wan(Wan(WAN, rngs=nnx.Rngs(0)))
    arrays = plain | sla1_from_turbodiffusion(released, layer())
    model = load_wan(WAN, arrays, attend=lambda number: layer())
    projection = model.blocks[1].self_attention.attend.proj_l
    weight = released["blocks.1.self_attn.attn_op.local_attn.proj_l.weight"]
    x = random.normal(size=(5, 8)).astype(np.float32)
    bias = released["blocks.1.self_attn.attn_op.local_attn.proj_l.bias"]
    np.testing.assert_allclose(projection(jnp.asarray(x)), x @ weight.T + bias[None], rtol=1e-4)
    back = sla1_to_turbodiffusion(export_wan(model))
    del released["head.bias"]
    assert back.keys() == released.keys()
    for name, array in released.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLinearAttention(0, 8, 16), "num_heads must be at least 1, got 0"),
        (lambda: SparseLinearAttention(2, 8, 0), "query_tokens must be at least 1, got 0"),
        (lambda: SparseLinearAttention(2, 8, None), "may be None with per_head_ratio only"),
        (lambda: SLA1Attention(8, block_k=0), "block_k must be at least 1, got 0"),
        (
            lambda: SLA1Attention(8, kept_fraction=0.0),
            "kept_fraction must be more than 0 and at most 1, got 0.0",
        ),
        (
            lambda: SparseLinearAttention(2, 8, 16, kept_fraction=1.5),
            "kept_fraction must be more than 0 and at most 1, got 1.5",
        ),
        (
            lambda: SLA1Attention(8, feature_map="hedgehog"),
            "feature_map must be one of softmax, elu, relu, got 'hedgehog'",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
