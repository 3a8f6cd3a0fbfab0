import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.layers import GroupNorm
from jaxgen.models import AUTOENCODER_PRESETS, Autoencoder, AutoencoderConfig
from jaxgen.models.autoencoder_blocks import attend_in_chunks

TINY = AutoencoderConfig(
    in_channels=2,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(4, 6),
    layers_per_block=1,
    norm_num_groups=2,
    use_quant_conv=True,
    use_post_quant_conv=True,
)
LARGE = 128 * 128  # latent pixels of a picture of 1024x1024


def _perturbed(config=TINY):
    """A model in which no parameter has its initial zero or one; nothing is compiled for it."""
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))

    def draw(path, variable):
        values = random.normal(size=variable.shape)
        values *= math.prod(variable.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.3
        values += 1.0 if path[-1] == "scale" else 0.0
        return variable.replace(jnp.asarray(values, variable.dtype))

    flat = [(path, draw(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _images(*shape):
    return jax.random.uniform(jax.random.key(0), shape, minval=-1.0)


def _latents(*shape):
    return jax.random.normal(jax.random.key(1), shape)


@nnx.jit
def _encode(model, images):
    return model.encode(images)


def _mean(model, images):
    return _encode(model, images)[0]


@nnx.jit
def _decode(model, latents):
    return model.decode(latents)


def _distance(first, second):
    return jnp.linalg.norm((first - second).ravel()) / jnp.linalg.norm(second.ravel())


def test_parameter_count_is_that_of_diffusers():
    config = AUTOENCODER_PRESETS["stable-diffusion-3"]
    model = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 83_819_683
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model))) == 244


def test_the_preset_makes_an_eighth_of_the_side_with_16_channels():
    create = lambda: Autoencoder(AUTOENCODER_PRESETS["stable-diffusion-3"], rngs=nnx.Rngs(0))
    mean, logvar = nnx.eval_shape(lambda: create().encode(jnp.zeros((2, 64, 128, 3))))
    assert mean.shape == logvar.shape == (2, 8, 16, 16)
    images = nnx.eval_shape(lambda: create().decode(jnp.zeros((2, 8, 16, 16))))
    assert images.shape == (2, 64, 128, 3)


def test_latents_are_drawn_then_shifted_and_scaled():
    model, images = _perturbed(), _images(2, 8, 4, 2)
    mean, logvar = _encode(model, images)
    assert mean.shape == logvar.shape == (2, 4, 2, 4)
    draw = nnx.jit(lambda model, images, key: model.sample_latents(images, key))
    first, second = (draw(model, images, jax.random.key(seed)) for seed in (3, 4))
    noise = jax.random.normal(jax.random.key(3), mean.shape)
    expected = (mean + jnp.exp(0.5 * logvar) * noise - 0.0609) * 1.5305
    np.testing.assert_allclose(first, expected, atol=1e-5)
    assert _distance(first, second) > 0.1
    np.testing.assert_allclose(model.to_latents(mean), (mean - 0.0609) * 1.5305, atol=1e-6)


@pytest.mark.parametrize(("bias", "limit"), [(1e3, 20.0), (-1e3, -30.0)])
def test_log_variance_is_limited(bias, limit):
    model = _perturbed(dataclasses.replace(TINY, use_quant_conv=False))
    values = model.encoder.conv_out.bias
    model.encoder.conv_out.bias.set_value(values[...] + bias)
    mean, logvar = _encode(model, _images(1, 8, 8, 2))
    assert (logvar == limit).all()
    assert (jnp.abs(mean) > 500.0).all()


def test_pictures_of_a_batch_do_not_see_each_other():
    model, images, latents = _perturbed(), _images(2, 8, 4, 2), _latents(2, 4, 2, 4)
    changed = images.at[0].multiply(0.5), latents.at[0].multiply(0.5)
    for run, x, other in zip((_mean, _decode), (images, latents), changed, strict=True):
        difference = jnp.abs(run(model, x) - run(model, other)).max(axis=(1, 2, 3))
        assert difference[0] > 1e-3
        assert difference[1] < 1e-6


def test_bfloat16_is_close_to_float32():
    half = _perturbed(dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16"))
    images = _images(2, 8, 4, 2)
    for ours, wanted in zip(_encode(half, images), _encode(_perturbed(), images), strict=True):
        assert ours.dtype == jnp.float32
        assert 0.0 < _distance(ours, wanted) < 0.04


def test_float16_is_float32_where_the_weights_would_overflow():
    latents = _latents(2, 4, 2, 4)
    exact = _decode(_perturbed(), latents)
    upcast = _perturbed(dataclasses.replace(TINY, dtype="float16"))
    assert upcast.config.compute_dtype == upcast.decoder.conv_in.dtype == jnp.float32
    half = _perturbed(dataclasses.replace(TINY, dtype="float16", force_upcast=False))
    assert 0.0 < _distance(_decode(half, latents), exact) < 0.01


def test_gradients_are_finite_and_reach_every_parameter():
    graph, parameters = nnx.split(_perturbed())
    images, latents = _images(1, 8, 4, 2), _latents(1, 4, 2, 4)

    @jax.jit
    @jax.grad
    def gradient(parameters):
        model = nnx.merge(graph, parameters)
        drawn = model.sample_latents(images, jax.random.key(2))
        return jnp.mean(jnp.square(drawn)) + jnp.mean(jnp.square(model.decode(latents) - 1.0))

    for path, leaf in nnx.to_flat_state(gradient(parameters)):
        values = leaf[...]
        assert jnp.isfinite(values).all(), path
        # A bias of the keys adds the same to all logits of a query, nothing more.
        unused = path[-3:] == ("attention", "key", "bias")
        assert (jnp.abs(values).max() > 1e-6) != unused, path


@pytest.mark.parametrize("tokens", [8, 23])
def test_attention_in_chunks_is_exact(tokens):
    arrays, weight = _latents(3, 2, tokens, 6), _images(2, tokens, 6)

    def whole(query, key, value):
        query, key, value = (array[:, :, None] for array in (query, key, value))
        return jax.nn.dot_product_attention(query, key, value)[:, :, 0]

    def check(attend):
        loss = lambda arrays: jnp.sum(attend(*arrays) * weight)
        return jax.jit(lambda arrays: (attend(*arrays), jax.grad(loss)(arrays)))(arrays)

    parts = check(lambda *arrays: attend_in_chunks(*arrays, chunk=8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), parts, check(whole))


def _shapes(jaxpr):
    """The shapes of all that a program computes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_large_pictures_need_no_square_of_their_pixels(method):
    config = dataclasses.replace(
        AUTOENCODER_PRESETS["stable-diffusion-3"], block_out_channels=(32,) * 4, layers_per_block=1
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
    side, channels = (1024, 3) if method == "encode" else (128, 16)
    program = jax.make_jaxpr(lambda state, x: getattr(nnx.merge(graph, state), method)(x))(
        state, jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    )
    shapes = list(_shapes(program.jaxpr))
    assert (1, 1024, LARGE) in shapes  # the logits of one chunk of queries
    assert not any(shape.count(LARGE) > 1 for shape in shapes)


@pytest.mark.parametrize(
    ("method", "shape"), [("encode_tiled", (2, 8, 4, 2)), ("decode_tiled", (2, 4, 2, 4))]
)
def test_one_tile_is_no_tile(method, shape):
    model, x = _perturbed(), _latents(*shape)
    whole = (_encode if method == "encode_tiled" else _decode)(model, x)
    tiled = nnx.jit(lambda model, x: getattr(model, method)(x, tile=4, overlap=3))(model, x)
    jax.tree.map(np.testing.assert_array_equal, tiled, whole)


@pytest.mark.parametrize(("overlap", "seam"), [(20, (20, 40)), (4, (27, 33))])
def test_decoding_in_tiles_is_the_same_away_from_the_seams(overlap, seam, monkeypatch):
    # Normalization over the picture and attention see everything; here they are left out.
    monkeypatch.setattr(GroupNorm, "__call__", lambda self, x: 0.5 * x)
    model = _perturbed(dataclasses.replace(TINY, mid_block_add_attention=False))
    latents = _latents(1, 6, 60, 4)
    whole = _decode(model, latents)
    tiled = nnx.jit(lambda model, x: model.decode_tiled(x, tile=40, overlap=overlap))(
        model, latents
    )
    # Tiles hold columns 0..40 and 20..60, and are blended over `overlap` columns around 30. A
    # pixel depends on 13 columns to either side, 9 3x3 convolutions at the resolution of the
    # latents and 6 at twice that: the first tile is wrong from 27 on, the second up to 33.
    error = jnp.abs(tiled - whole).max(axis=(0, 1, 3)).reshape(60, 2).max(axis=1)
    first, last = seam
    assert error[:first].max() < 1e-5
    assert error[last:].max() < 1e-5
    # What a tile computes at its very edge is used with little weight or none.
    assert error.max() < 0.1 * jnp.abs(whole).max()
    assert overlap == 4 or error.max() > 1e-4


@pytest.mark.parametrize("overlap", [20, 4])
def test_encoding_in_tiles_is_the_same_away_from_the_seams(overlap, monkeypatch):
    monkeypatch.setattr(GroupNorm, "__call__", lambda self, x: 0.5 * x)
    model = _perturbed(dataclasses.replace(TINY, mid_block_add_attention=False))
    images = _images(1, 120, 8, 2)
    whole = _encode(model, images)
    tiled = nnx.jit(lambda model, x: model.encode_tiled(x, tile=40, overlap=overlap))(model, images)
    for ours, wanted in zip(tiled, whole, strict=True):
        error = jnp.abs(ours - wanted).max(axis=(0, 2, 3))
        assert error[:20].max() < 1e-5
        assert error[40:].max() < 1e-5
        assert overlap == 4 or error[20:40].max() > 1e-4


def test_tiles_differ_from_the_whole_by_their_own_statistics():
    """Where values are alike everywhere, those of a tile are nearly those of the whole."""
    model, latents = _perturbed(), _latents(1, 48, 48, 4)
    run = nnx.jit(lambda model, x: model.decode_tiled(x, tile=32, overlap=8))
    tiled, whole = run(model, latents), _decode(model, latents)
    assert 0.0 < _distance(tiled[:, :40, :40], whole[:, :40, :40]) < 0.15
    assert _distance(tiled, whole) < 0.15
    # The corner is what its tile computes alone, without seams.
    alone = _decode(model, latents[:, :32, :32])
    np.testing.assert_allclose(tiled[:, :40, :40], alone[:, :40, :40], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "unit", "channels"), [("encode_tiled", 2, 2), ("decode_tiled", 1, 4)]
)
def test_the_program_does_not_grow_with_the_number_of_tiles(method, unit, channels):
    graph, state = nnx.split(_perturbed())

    def program(height, width):
        run = lambda state, x: getattr(nnx.merge(graph, state), method)(x, tile=8, overlap=2)
        x = jax.ShapeDtypeStruct((1, height * unit, width * unit, channels), jnp.float32)
        return str(jax.make_jaxpr(run)(state, x))

    few, many = program(8, 9), program(100, 70)
    assert few.count("conv_general_dilated") == many.count("conv_general_dilated")
    assert few.count("scan[") == many.count("scan[") == 1


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (16, 16, 2), r"images must have shape \(batch, height, width, 2\).*\(16, 16, 2"),
        ("encode", (1, 16, 16, 3), r"width, 2\), height and width multiples of 2, got \(1, 16, 16"),
        ("encode", (1, 16, 17, 2), r"multiples of 2, got \(1, 16, 17, 2\)"),
        ("encode_tiled", (1, 0, 16, 2), r"multiples of 2, got \(1, 0, 16, 2\)"),
        ("decode", (4, 4, 4), r"latents must have shape \(batch, height, width, 4\)"),
        ("decode", (1, 4, 4, 16), r"width, 4\), height and width positive, got \(1, 4, 4, 16\)"),
        ("decode_tiled", (1, 4, 0, 4), r"positive, got \(1, 4, 0, 4\)"),
    ],
)
def test_wrong_inputs_are_refused(method, shape, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(
            lambda: getattr(Autoencoder(TINY, rngs=nnx.Rngs(0)), method)(jnp.zeros(shape))
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a positive int, got in_channels=0"),
        ({"out_channels": 3.0}, "out_channels must be a positive int, got out_channels=3.0"),
        ({"latent_channels": True}, "latent_channels must be a positive int"),
        ({"layers_per_block": -1}, "layers_per_block must be a positive int"),
        ({"norm_num_groups": "32"}, "norm_num_groups must be a positive int"),
        ({"sample_size": None}, "sample_size must be a positive int, got sample_size=None"),
        ({"block_out_channels": ()}, r"block_out_channels must be one or more .*, got \(\)"),
        ({"block_out_channels": 8}, "multiples of norm_num_groups=2, got 8"),
        ({"block_out_channels": (4, 7)}, r"multiples of norm_num_groups=2, got \(4, 7\)"),
        ({"block_out_channels": (4, 0)}, r"multiples of norm_num_groups=2, got \(4, 0\)"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive, got scaling_factor=0.0"),
        ({"scaling_factor": math.inf}, "scaling_factor must be a finite number"),
        ({"scaling_factor": True}, "scaling_factor must be a finite number"),
        ({"shift_factor": None}, "shift_factor must be a finite number, got shift_factor=None"),
        ({"use_quant_conv": 1}, "use_quant_conv must be True or False, got 1"),
        ({"use_post_quant_conv": None}, "use_post_quant_conv must be True or False, got None"),
        ({"mid_block_add_attention": 0}, "mid_block_add_attention must be True or False, got 0"),
        ({"force_upcast": "no"}, "force_upcast must be True or False, got 'no'"),
        ({"dtype": "int8"}, "dtype must be a float dtype such as bfloat16, got 'int8'"),
        ({"param_dtype": "half4"}, "param_dtype must be a float dtype"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_equal_configurations_compare_and_hash_equal():
    named = dataclasses.replace(TINY, dtype="bfloat16", block_out_channels=[4, 6])
    typed = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    assert named == typed
    assert hash(named) == hash(typed)
