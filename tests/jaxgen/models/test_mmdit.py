import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import PositionTable, patchify
from jaxgen.models import MMDIT_PRESETS, MMDiT, MMDiTConfig

TINY = MMDiTConfig(
    sample_size=8,
    patch_size=2,
    in_channels=3,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    pos_embed_max_size=6,
    qk_norm=True,
    dual_attention_layers=(0,),
)


def _perturbed(config=TINY):
    """A model in which no parameter has its initial zero or one; nothing is compiled for it."""
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= variable.shape[0] ** -0.5 if path[-1] == "kernel" else 0.3
        values += 1.0 if path[-1] == "scale" else 0.0
        return variable.replace(jnp.asarray(values.astype(np.float32)))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _inputs(config=TINY, height=8, width=6, batch=2, tokens=5):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, height, width, config.in_channels)),
        jnp.linspace(3.25, 900.5, batch),
        jax.random.normal(keys[1], (batch, tokens, config.joint_attention_dim)),
        jax.random.normal(keys[2], (batch, config.pooled_projection_dim)),
    )


@nnx.jit
def _run(model, *inputs):
    return model(*inputs)


@pytest.mark.parametrize(
    ("name", "parameters", "table", "keys"),
    [
        ("sd3-medium", 2_028_328_000, 192**2 * 1536, 683),
        ("sd3.5-medium", 2_243_171_520, 384**2 * 1536, 909),
        ("sd3.5-large", 8_056_627_520, 192**2 * 2432, 1227),
    ],
)
def test_released_models_have_their_parameter_counts(name, parameters, table, keys):
    model = nnx.eval_shape(lambda: MMDiT(MMDIT_PRESETS[name], rngs=nnx.Rngs(0)))
    trained = jax.tree.leaves(nnx.state(model, nnx.Param))
    (stored,) = jax.tree.leaves(nnx.state(model, PositionTable))
    assert sum(leaf.size for leaf in trained) == parameters
    assert stored.size == table
    assert len(trained) + 1 == keys


def test_our_presets_share_one_text_encoder_and_picture_size():
    large, small = MMDIT_PRESETS["openmoji-large"], MMDIT_PRESETS["openmoji-small"]
    assert (large.width, small.width) == (256, 128)
    for field in ("sample_size", "in_channels", "joint_attention_dim", "pooled_projection_dim"):
        assert getattr(large, field) == getattr(small, field)


def test_new_model_predicts_zero():
    model = MMDiT(TINY, rngs=nnx.Rngs(0))
    velocity = _run(model, *_inputs())
    assert velocity.shape == (2, 8, 6, 3)
    assert not velocity.any()


def test_out_channels():
    config = dataclasses.replace(TINY, out_channels=5)
    velocity = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))(*_inputs()))
    assert velocity.shape == (2, 8, 6, 5)


def test_every_input_and_every_row_matters_to_itself_only():
    model, inputs = _perturbed(), _inputs()
    base = _run(model, *inputs)
    for position, value in enumerate(inputs):
        changed = list(inputs)
        changed[position] = value.at[0].multiply(1.5)
        difference = jnp.abs(_run(model, *changed) - base).max(axis=(1, 2, 3))
        assert difference[0] > 1e-5
        assert difference[1] < 1e-6


@pytest.mark.parametrize("dual_layers", [(), (0, 1)])
def test_gradients_are_finite_and_reach_every_parameter(dual_layers):
    model = _perturbed(dataclasses.replace(TINY, dual_attention_layers=dual_layers))
    inputs = _inputs()
    graph, parameters, table = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(parameters):
        return jnp.mean(jnp.square(nnx.merge(graph, parameters, table)(*inputs) - 1.0))

    for path, leaf in nnx.to_flat_state(gradient(parameters)):
        values = leaf[...]
        assert jnp.isfinite(values).all(), path
        # The last block reads keys and values of the text; its queries are in SD3's files, unused.
        unused = path[:2] == ("blocks", 1) and path[3:5] in (
            ("text", "query"),
            ("text", "query_norm"),
        )
        assert (jnp.abs(values).max() > 1e-7) != unused, path


def test_remat_changes_nothing_but_memory():
    inputs = _inputs()

    def value_and_gradient(remat):
        model = _perturbed(dataclasses.replace(TINY, remat=remat, dual_attention_layers=()))
        graph, parameters, table = nnx.split(model, nnx.Param, ...)
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p, table)(*inputs) - 1.0))
        assert ("remat" in str(jax.make_jaxpr(loss)(parameters))) == remat
        return jax.jit(jax.value_and_grad(loss))(parameters)

    jax.tree.map(
        lambda plain, remat: np.testing.assert_allclose(plain, remat, rtol=1e-4, atol=1e-6),
        value_and_gradient(False),
        value_and_gradient(True),
    )


DEEP = dataclasses.replace(TINY, num_layers=5, dual_attention_layers=(0, 1))
"""Two dual blocks, two plain ones and the last."""


def test_scan_changes_nothing_but_compilation():
    inputs = _inputs()

    def value_and_gradient(scan):
        model = _perturbed(dataclasses.replace(DEEP, remat=scan, scan=scan))
        graph, parameters, table = nnx.split(model, nnx.Param, ...)
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p, table)(*inputs) - 1.0))
        program = str(jax.make_jaxpr(loss)(parameters))
        assert (program.count("scan["), "remat" in program) == (3 * scan, scan)
        return jax.jit(jax.value_and_grad(loss))(parameters)

    jax.tree.map(
        lambda plain, scan: np.testing.assert_allclose(plain, scan, rtol=1e-4, atol=1e-6),
        value_and_gradient(False),
        value_and_gradient(True),
    )


@pytest.mark.parametrize("skipped", [(0,), (1, 3), (4,)])
def test_scan_leaves_out_the_same_blocks(skipped):
    inputs, run = _inputs(), nnx.jit(MMDiT.__call__, static_argnames="skipped")
    plain, scan = (_perturbed(dataclasses.replace(DEEP, scan=scan)) for scan in (False, True))
    found = run(scan, *inputs, skipped=skipped)
    np.testing.assert_allclose(found, run(plain, *inputs, skipped=skipped), atol=1e-5)
    assert jnp.abs(found - _run(scan, *inputs)).max() > 1e-3


def test_scan_remembers_the_same_keys_and_values():
    rows, passes = jnp.array([[0, 3, 7], [1, 2, 10]], jnp.int32), []
    for scan in (False, True):
        model, inputs = _perturbed(dataclasses.replace(DEEP, scan=scan)), _inputs()
        velocity, cache = nnx.jit(MMDiT.with_cache)(model, *inputs)
        later = (inputs[0] + 1.0, *inputs[1:])
        part, _, after = _masked_of(model, later, rows, cache)
        passes.append((velocity, cache, part, after))
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, atol=2e-5), *passes)


def test_bfloat16_is_close_to_float32():
    inputs = _inputs()
    exact = _run(_perturbed(), *inputs)
    # JAX's own attention cannot run in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        half = _run(_perturbed(dataclasses.replace(TINY, dtype=jnp.bfloat16)), *inputs)
    assert half.dtype == jnp.bfloat16
    error = jnp.linalg.norm(half.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0.0 < error < 0.02


def test_param_dtype_is_that_of_every_variable():
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}


def test_int8_attention_is_close_to_exact():
    inputs = _inputs()
    exact = _run(_perturbed(), *inputs)
    quantized = _run(_perturbed(dataclasses.replace(TINY, attention="int8")), *inputs)
    error = jnp.linalg.norm(quantized - exact) / jnp.linalg.norm(exact)
    assert 0.0 < error < 0.03


def test_linen_bridge():
    config = dataclasses.replace(TINY, num_layers=1, dual_attention_layers=())
    linen = nnx.bridge.ToLinen(MMDiT, args=(config,))
    inputs = _inputs()
    variables = jax.jit(linen.init)(jax.random.key(0), *inputs)

    def loss(params):
        return jnp.mean(jnp.square(linen.apply(variables | {"params": params}, *inputs) - 1.0))

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert float(value) == 1.0
    final = gradient["final_projection"]["bias"]
    assert jnp.abs(final).min() > 0.0
    assert "PositionTable" in variables


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 8, 8), r"latents must have shape \(2, height, width, 3\), got \(2, 8, 8\)"),
        (0, (2, 8, 8, 4), r"latents must have shape \(2, height, width, 3\), got \(2, 8, 8, 4\)"),
        (0, (2, 7, 8, 3), "patch_size=2 must divide height and width, got 7x8"),
        (0, (2, 14, 8, 3), r"7x4 patches, at most 6x6 are allowed \(pos_embed_max_size\)"),
        (1, (), r"timestep must have shape \(2\), got \(\)"),
        (1, (3,), r"timestep must have shape \(2\), got \(3,\)"),
        (2, (2, 5, 13), r"context must have shape \(2, tokens, 12\), got \(2, 5, 13\)"),
        (2, (1, 5, 12), r"context must have shape \(2, tokens, 12\), got \(1, 5, 12\)"),
        (3, (2, 12), r"pooled must have shape \(2, 10\), got \(2, 12\)"),
    ],
)
def test_wrong_inputs_are_refused(position, shape, message):
    inputs = list(_inputs())
    inputs[position] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: MMDiT(TINY, rngs=nnx.Rngs(0))(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide sample_size, got patch_size=3 and"),
        ({"num_layers": 0}, "num_layers must be a positive int, got num_layers=0"),
        ({"num_heads": 2.0}, "num_heads must be a positive int, got num_heads=2.0"),
        ({"in_channels": True}, "in_channels must be a positive int, got in_channels=True"),
        ({"out_channels": -1}, "out_channels must be a positive int, got out_channels=-1"),
        ({"sample_size": 16}, "is 8 patches a side, more than pos_embed_max_size=6"),
        ({"num_heads": 1, "head_dim": 6}, "must be a multiple of 4, got 6"),
        ({"dual_attention_layers": (2,)}, r"below num_layers=2, got \(2,\)"),
        ({"dual_attention_layers": (1, 0)}, r"increasing block numbers .*, got \(1, 0\)"),
        ({"attention": "flash"}, "attention must be one of 'exact', 'int8', got 'flash'"),
        ({"qk_norm": "no"}, "qk_norm must be True or False, got 'no'"),
        ({"remat": 1}, "remat must be True or False, got 1"),
        ({"scan": None}, "scan must be True or False, got None"),
        ({"dtype": "int8"}, "dtype must be a float dtype such as bfloat16, got 'int8'"),
        ({"param_dtype": "float99"}, "param_dtype must be a float dtype .*, got 'float99'"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_equal_configurations_compare_and_hash_equal():
    named = dataclasses.replace(TINY, dtype="bfloat16", dual_attention_layers=[0])
    typed = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    assert named == typed
    assert hash(named) == hash(typed)


VARIANTS = {
    "plain": {"qk_norm": False, "dual_attention_layers": ()},
    "qk_norm": {"dual_attention_layers": ()},
    "dual": {"num_layers": 3, "dual_attention_layers": (0, 1)},
    "scan": {"num_layers": 5, "dual_attention_layers": (0, 1), "scan": True},
}


def _cached(name):
    """A model, inputs, and everything that a full pass gives."""
    config = dataclasses.replace(TINY, **VARIANTS[name])
    model, inputs = _perturbed(config), _inputs(config)
    velocity, cache = nnx.jit(type(model).with_cache)(model, *inputs)
    return model, inputs, patchify(velocity, config.patch_size), cache


_region = nnx.jit(MMDiT.region, static_argnames="keep_text")
_masked = nnx.jit(MMDiT.masked)


def _masked_of(model, inputs, rows, cache, keep_text=False):
    """A masked pass over patches of a cache, and the region before and after it."""
    before = _region(model, rows, cache, keep_text=keep_text)
    found, after = _masked(model, *inputs, before)
    np.testing.assert_array_equal(after.rows, rows)
    return found, before, after


def _ordered(region, text_tokens):
    """Keys and values of the image in every block of a region, patches in their order."""
    rows, tokens = np.asarray(region.rows), 12
    order = np.argsort([[*(set(range(tokens)) - set(row)), *row] for row in rows.tolist()])
    first = text_tokens if region.keep_text else 0
    joint = [x[:, first : first + tokens] for block in region.cache for x in block.image]
    second = [x for block in region.cache if block.second for x in block.second]
    take = lambda x: np.take_along_axis(np.asarray(x), order[..., None, None], axis=1)
    return [take(x) for x in joint + second]


def _image(cache):
    """The same of a cache."""
    second = [x for block in cache if block.second for x in block.second]
    return [x for block in cache for x in block.image] + second


@pytest.mark.parametrize("keep_text", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_masked_pass_with_a_fresh_cache_is_the_full_pass(name, keep_text):
    model, inputs, wanted, cache = _cached(name)
    plain = patchify(_run(model, *inputs), model.config.patch_size)
    np.testing.assert_allclose(wanted, plain, atol=1e-6)
    rows = jnp.array([[0, 3, 7, 8], [1, 2, 10, 11]], jnp.int32)
    found, _, after = _masked_of(model, inputs, rows, cache, keep_text)
    np.testing.assert_allclose(
        found, jnp.take_along_axis(wanted, rows[..., None], axis=1), atol=1e-5
    )
    for old, new in zip(_image(cache), _ordered(after, inputs[2].shape[1]), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_full_mask_needs_no_cache_and_an_old_one_matters_otherwise(name):
    model, inputs, wanted, cache = _cached(name)
    latents, timestep, *text = inputs
    other, tokens = (latents + 1.0, 0.5 * timestep, *text), inputs[2].shape[1]
    everything = jnp.tile(jnp.arange(wanted.shape[1], dtype=jnp.int32), (len(wanted), 1))
    moved = patchify(_run(model, *other), model.config.patch_size)
    found, _, fresh = _masked_of(model, other, everything, cache)
    np.testing.assert_allclose(found, moved, atol=1e-5)
    _, full = nnx.jit(MMDiT.with_cache)(model, *other)
    for one, two in zip(_ordered(fresh, tokens), _image(full), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    part, _, after = _masked_of(model, other, everything[:, 2:6], cache)
    assert jnp.abs(part - moved[:, 2:6]).max() > 1e-3
    others = [0, 1, *range(6, 12)]
    for old, new in zip(_image(cache), _ordered(after, tokens), strict=True):
        np.testing.assert_array_equal(old[:, others], new[:, others])
        assert jnp.abs(old[:, 2:6] - new[:, 2:6]).max() > 1e-3


def test_a_region_may_keep_the_text():
    model, inputs, _, cache = _cached("qk_norm")
    latents, timestep, *text = inputs
    other = (latents, 0.5 * timestep, *text)
    rows = jnp.array([[0, 3], [1, 2]], jnp.int32)
    fresh, *_ = _masked_of(model, other, rows, cache)
    kept, before, after = _masked_of(model, other, rows, cache, keep_text=True)
    assert 1e-4 < jnp.abs(fresh - kept).max() < jnp.abs(fresh).max()
    tokens = text[0].shape[1]
    for of_block, *found in zip(cache, before.cache, after.cache, strict=True):
        for region in found:
            np.testing.assert_array_equal(of_block.text.key, region.image.key[:, :tokens])
            np.testing.assert_array_equal(of_block.text.value, region.image.value[:, :tokens])


def test_a_masked_pass_of_two_is_two_of_one():
    model, inputs, _, cache = _cached("dual")
    rows = jnp.array([[0, 3, 7], [1, 2, 10]], jnp.int32)
    both, *_ = _masked_of(model, inputs, rows, cache)
    for i in range(2):
        one = jax.tree.map(lambda array, i=i: array[i : i + 1], (inputs, rows, cache))
        np.testing.assert_allclose(_masked_of(model, *one)[0], both[i : i + 1], atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (np.zeros((2, 0)), None, r"rows must have shape \(2, 1 to 12 patches\), got \(2, 0\)"),
        (np.zeros((1, 3)), None, r"rows must have shape \(2, 1 to 12 patches\), got \(1, 3\)"),
        (np.zeros((2, 13)), None, r"rows must have shape .*, got \(2, 13\)"),
        (np.zeros(4), None, r"rows must have shape .*, got \(4,\)"),
        (None, lambda cache: cache[1:], r"2 heads of 8 in 2 blocks, got arrays .* in 1 blocks"),
        (None, lambda cache: (), r"2 heads of 8 in 2 blocks, got arrays of shapes \[\] in 0"),
        (
            None,
            lambda cache: (cache[0], jax.tree.map(lambda array: array[:, 1:], cache[1])),
            r"must be that of a pass over everything, .*\(2, 11, 2, 8\), \(2, 12, 2, 8\)",
        ),
        (
            None,
            lambda cache: tuple(block._replace(text=None) for block in cache),
            r"must be that of a pass over everything",
        ),
        (None, lambda cache: jax.tree.map(lambda x: x[..., 1:], cache), "2 heads of 8"),
    ],
)
def test_wrong_rows_and_caches_are_refused(rows, change, message):
    model, _, _, cache = _cached("plain")
    rows = np.array([[0, 1], [2, 3]]) if rows is None else rows
    with pytest.raises(ValueError, match=message):
        model.region(jnp.asarray(rows, jnp.int32), change(cache) if change else cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda region: dataclasses.replace(region, cache=region.cache[1:]),
            r"2 blocks, got .* in 1 blocks",
        ),
        (lambda region: dataclasses.replace(region, rows=region.rows[1:]), r"got rows \(1, 2\)"),
        (
            lambda region: jax.tree.map(lambda array: array[:, :-1], region),
            r"2 x 12 patches and \d+ text tokens in 2 blocks, got rows \(2, 1\)",
        ),
        (
            lambda region: dataclasses.replace(region, patches=16),
            r"must be of 2 x 12 patches .* of 16 patches",
        ),
    ],
)
def test_regions_of_other_inputs_are_refused(change, message):
    model, inputs, _, cache = _cached("plain")
    rows = jnp.array([[0, 1], [2, 3]], jnp.int32)
    region = model.region(rows, cache)
    with pytest.raises(ValueError, match=message):
        model.masked(*inputs, change(region))
