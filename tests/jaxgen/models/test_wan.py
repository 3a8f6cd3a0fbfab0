import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import rotate, video_rotary
from jaxgen.models import WAN_PRESETS, Wan, WanBlock, WanConfig
from jaxgen.models.wan import cube_order

TINY = WanConfig(
    num_layers=2,
    num_heads=2,
    ffn_dim=40,
    in_channels=3,
    head_dim=8,
    text_dim=12,
    freq_dim=16,
    rope_max_seq_len=6,
)


def _perturbed(config=TINY, attend=None):
    """A model in which no parameter has its initial zero or one; nothing is compiled for it."""
    random = np.random.default_rng(0)
    create = lambda: Wan(config, attend=attend, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(create))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= variable.shape[0] ** -0.5 if path[-1] == "kernel" else 0.3
        values += 1.0 if path[-1] == "scale" else 0.0
        return variable.replace(jnp.asarray(values, variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _inputs(config=TINY, frames=3, height=4, width=6, batch=2, tokens=5):
    keys = jax.random.split(jax.random.key(0), 2)
    return (
        jax.random.normal(keys[0], (batch, frames, height, width, config.in_channels)),
        jnp.linspace(3.25, 900.5, batch),
        jax.random.normal(keys[1], (batch, tokens, config.text_dim)),
    )


@nnx.jit
def _run(model, *inputs):
    return model(*inputs)


def _distance(first, second):
    return jnp.linalg.norm(first - second) / jnp.linalg.norm(second)


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("wan2.1-t2v-1.3b", 1_418_996_800, 825),
        ("wan2.1-t2v-14b", 14_288_491_584, 1095),
        ("moving-emoji", 5_158_896, 231),
    ],
)
def test_parameter_counts_are_those_of_diffusers(name, parameters, keys):
    model = nnx.eval_shape(lambda: Wan(WAN_PRESETS[name], rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model))) == keys


def test_new_model_predicts_zero():
    velocity = _run(Wan(TINY, rngs=nnx.Rngs(0)), *_inputs())
    assert velocity.shape == (2, 3, 4, 6, 3)
    assert not velocity.any()


def test_patches_of_several_frames_and_other_output_channels():
    config = dataclasses.replace(TINY, patch_size=(3, 1, 2), out_channels=5)
    velocity = nnx.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0))(*_inputs()))
    assert velocity.shape == (2, 3, 4, 6, 5)


def test_every_input_and_every_row_matters_to_itself_only():
    model, inputs = _perturbed(), _inputs()
    base = _run(model, *inputs)
    for position, value in enumerate(inputs):
        changed = list(inputs)
        changed[position] = value.at[0].multiply(1.5)
        difference = jnp.abs(_run(model, *changed) - base).max(axis=(1, 2, 3, 4))
        assert difference[0] > 1e-4
        assert difference[1] < 1e-6


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_the_order_along_each_axis_matters(axis):
    latents, timestep, context = _inputs()
    # Patches of one pixel, so that reversing the latents reverses tokens and nothing within them.
    model = _perturbed(dataclasses.replace(TINY, patch_size=(1, 1, 1)))
    base = _run(model, latents, timestep, context)
    reversed_twice = jnp.flip(_run(model, jnp.flip(latents, axis), timestep, context), axis)
    # Rotation is relative: a reversed video has other differences of positions.
    assert _distance(reversed_twice, base) > 1e-3


@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "cross_attn_norm": False}])
def test_gradients_are_finite_and_reach_every_parameter(options):
    model, inputs = _perturbed(dataclasses.replace(TINY, **options)), _inputs()
    graph, parameters = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(parameters):
        return jnp.mean(jnp.square(nnx.merge(graph, parameters)(*inputs) - 1.0))

    for path, leaf in nnx.to_flat_state(gradient(parameters)):
        values = leaf[...]
        assert jnp.isfinite(values).all(), path
        # Without QK-norm a bias of the keys adds the same to all logits of a query, nothing more;
        # rotation ends that for self-attention.
        unused = options and path[-3:] == ("cross_attention", "key", "bias")
        assert (jnp.abs(values).max() > 1e-7) != bool(unused), path


@pytest.mark.parametrize(("remat", "scan"), [(True, False), (False, True), (True, True)])
def test_remat_and_scan_change_nothing_but_memory_and_compilation(remat, scan):
    inputs = _inputs()

    def value_and_gradient(remat, scan):
        config = dataclasses.replace(TINY, remat=remat, scan=scan)
        graph, parameters = nnx.split(_perturbed(config))
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(*inputs) - 1.0))
        program = str(jax.make_jaxpr(loss)(parameters))
        assert ("remat" in program, "scan" in program) == (remat, scan)
        return jax.jit(jax.value_and_grad(loss))(parameters)

    jax.tree.map(
        lambda plain, other: np.testing.assert_allclose(plain, other, rtol=1e-4, atol=1e-6),
        value_and_gradient(False, False),
        value_and_gradient(remat, scan),
    )


@pytest.mark.parametrize("cube", [(2, 1, 2), (2, 2, 2), (9, 9, 9)])
def test_the_order_of_tokens_changes_nothing_but_what_blocks_are(cube):
    seen = []

    def attend(query, key, value):
        seen.append(query)
        return jax.nn.dot_product_attention(query, key, value)

    inputs = _inputs()
    plain = _perturbed(attend=lambda number: attend)
    cubes = _perturbed(dataclasses.replace(TINY, token_cube=cube), attend=lambda number: attend)
    np.testing.assert_allclose(plain(*inputs), cubes(*inputs), atol=2e-5)
    order = cube_order((3, 2, 3), cube)
    np.testing.assert_allclose(seen[2], seen[0][:, order], atol=1e-5)


def test_cubes_follow_each_other_along_time():
    frame, row, column = np.unravel_index(cube_order((4, 2, 3), (2, 2, 2)), (4, 2, 3))
    assert list(zip(frame[:8], row[:8], column[:8], strict=True)) == list(np.ndindex(2, 2, 2))
    assert (frame[8:16].min(), column[8:16].max()) == (2, 1)  # the same place, later
    assert set(column[16:]) == {2}  # what is left of the last column


def test_scan_keeps_intermediates_and_refuses_blocks_that_differ():
    class Recorder(nnx.Module):
        def __call__(self, query, key, value):
            self.size = nnx.Intermediate(jnp.mean(jnp.square(query * value)))
            return jax.nn.dot_product_attention(query, key, value)

    def sizes(scan):
        config = dataclasses.replace(TINY, scan=scan)
        model = Wan(config, attend=lambda number: Recorder(), rngs=nnx.Rngs(0))
        model(*_inputs())
        return [float(block.self_attention.attend.size[...]) for block in model.blocks]

    plain = sizes(scan=False)
    assert plain[0] != plain[1]
    np.testing.assert_allclose(plain, sizes(scan=True), rtol=1e-5)
    functions = [jax.nn.dot_product_attention, lambda query, key, value: value]
    config = dataclasses.replace(TINY, scan=True)
    model = Wan(config, attend=functions.__getitem__, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="scan needs blocks that are alike"):
        model(*_inputs())


def test_bfloat16_is_close_to_float32():
    inputs = _inputs()
    exact = _run(_perturbed(), *inputs)
    # JAX's own attention cannot run in bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        half = _run(_perturbed(dataclasses.replace(TINY, dtype=jnp.bfloat16)), *inputs)
    assert half.dtype == jnp.bfloat16
    assert 0.0 < _distance(half.astype(jnp.float32), exact) < 0.02


def test_modulation_is_float32_in_16_bit_models():
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model, (_, timestep, context) = _perturbed(config), _inputs()
    embedded, modulation, text = model.conditioning(timestep, context)
    assert embedded.dtype == modulation.dtype == jnp.float32
    assert text.dtype == jnp.bfloat16


def test_param_dtype_leaves_conditioning_and_norms_wide():
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    model = nnx.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))
    wide = {
        ".".join(map(str, path[:-1] if path[-1] != "table" else path))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        if leaf.dtype != jnp.bfloat16
    }
    assert wide == {
        "table",
        *(f"blocks.{number}.{name}" for number in (0, 1) for name in ("table", "cross_norm")),
        *(f"conditioning.timestep.{name}" for name in ("hidden", "output")),
    }


def test_int8_attention_is_close_to_exact():
    inputs = _inputs()
    exact = _run(_perturbed(), *inputs)
    quantized = _run(_perturbed(dataclasses.replace(TINY, attention="int8")), *inputs)
    assert 0.0 < _distance(quantized, exact) < 0.03


class _Scaled(nnx.Module):
    """Exact attention with a trained factor in front of the logits."""

    def __init__(self, factor=1.0):
        self.factor = nnx.Param(jnp.full((1, 1, 1, 1), factor))

    def __call__(self, query, key, value):
        return jax.nn.dot_product_attention(query * self.factor[...], key, value)


def test_attend_gets_normalized_and_rotated_queries_and_keys():
    seen = []

    def attend(query, key, value):
        seen.append((query, key, value))
        return value

    block = WanBlock(dataclasses.replace(TINY, eps=1e-12), attend, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    rotary = video_rotary(2, 2, 3, 8)
    block.self_attention(x, x, rotary)
    ((query, key, value),) = seen
    layer = block.self_attention
    for got, projection in ((query, layer.query), (key, layer.key)):
        projected = projection(x)
        norm = jnp.sqrt(jnp.mean(jnp.square(projected), axis=-1, keepdims=True))
        expected = rotate((projected / norm).reshape(2, 12, 2, 8), rotary)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(value, layer.value(x).reshape(2, 12, 2, 8), atol=1e-6)


def test_attend_is_made_for_each_block_by_number():
    numbers = []

    def make(number):
        numbers.append(number)
        return jax.nn.dot_product_attention

    model, inputs = _perturbed(attend=make), _inputs()
    assert numbers == [0, 1]
    np.testing.assert_array_equal(_run(model, *inputs), _run(_perturbed(), *inputs))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_attend_modules_are_part_of_the_model(remat, scan):
    config, inputs = dataclasses.replace(TINY, remat=remat, scan=scan), _inputs()
    base = _run(_perturbed(), *inputs)
    model = _perturbed(config)
    for number, block in enumerate(model.blocks):
        block.self_attention.attend = nnx.data(_Scaled(1.0 + number))
    made = Wan(config, attend=lambda number: _Scaled(1.0 + number), rngs=nnx.Rngs(0))
    nnx.update(made, nnx.state(model))
    velocity = _run(made, *inputs)
    assert _distance(velocity, base) > 1e-3
    np.testing.assert_array_equal(velocity, _run(model, *inputs))
    gradient = nnx.jit(nnx.grad(lambda model: jnp.mean(jnp.square(model(*inputs)))))(made)
    for number in (0, 1):
        assert jnp.abs(gradient.blocks[number].self_attention.attend.factor[...]).max() > 1e-6


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 3, 4, 6), r"latents must have shape \(2, frames, height, width, 3\), got \(2, 3,"),
        (0, (2, 3, 4, 6, 4), r"latents must have shape \(2, frames, height, width, 3\), got"),
        (0, (2, 3, 4, 5, 3), r"patch_size=\(1, 2, 2\) must divide .*, got \(3, 4, 5\)"),
        (0, (2, 0, 4, 6, 3), r"patch_size=\(1, 2, 2\) must divide .*, got \(0, 4, 6\)"),
        (0, (2, 7, 4, 6, 3), r"are \(7, 2, 3\) patches, at most rope_max_seq_len=6 are allowed"),
        (1, (), r"timestep must have shape \(2\), got \(\)"),
        (1, (3,), r"timestep must have shape \(2\), got \(3,\)"),
        (2, (2, 5, 13), r"context must have shape \(2, tokens, 12\), got \(2, 5, 13\)"),
        (2, (1, 5, 12), r"context must have shape \(2, tokens, 12\), got \(1, 5, 12\)"),
    ],
)
def test_wrong_inputs_are_refused(position, shape, message):
    inputs = list(_inputs())
    inputs[position] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Wan(TINY, rngs=nnx.Rngs(0))(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive int, got num_layers=0"),
        ({"ffn_dim": 2.0}, "ffn_dim must be a positive int, got ffn_dim=2.0"),
        ({"out_channels": -1}, "out_channels must be a positive int, got out_channels=-1"),
        ({"patch_size": 2}, r"patch_size must be three positive ints .*, got 2"),
        ({"patch_size": (2, 2)}, r"patch_size must be three positive ints .*, got \(2, 2\)"),
        ({"patch_size": (1, 0, 2)}, r"patch_size must be three positive ints .*, got \(1, 0, 2\)"),
        ({"patch_size": (1, True, 2)}, r"patch_size must be three positive ints"),
        ({"head_dim": 7}, "head_dim must be an even number, at least 6, got 7"),
        ({"freq_dim": 5}, "freq_dim must be even, got freq_dim=5"),
        ({"eps": 0.0}, "eps must be a float between 0 and 1, got eps=0.0"),
        ({"eps": "1e-6"}, "eps must be a float between 0 and 1, got eps='1e-6'"),
        ({"attention": "flash"}, "attention must be one of 'exact', 'int8', got 'flash'"),
        ({"qk_norm": "rms"}, "qk_norm must be True or False, got 'rms'"),
        ({"cross_attn_norm": 1}, "cross_attn_norm must be True or False, got 1"),
        ({"remat": 1}, "remat must be True or False, got 1"),
        ({"dtype": "int8"}, "dtype must be a float dtype such as bfloat16, got 'int8'"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_equal_configurations_compare_and_hash_equal():
    named = dataclasses.replace(TINY, dtype="bfloat16", patch_size=[1, 2, 2])
    typed = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    assert named == typed
    assert hash(named) == hash(typed)
