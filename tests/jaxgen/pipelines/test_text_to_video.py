"""Generation with a Wan folder that diffusers wrote, and with a model that has our text encoder."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoints import load_safetensors, save_wan_folder
from jaxgen.layers import SparseLinearAttention
from jaxgen.models import TextEncoder, TextEncoderConfig, Wan, WanConfig
from jaxgen.pipelines import TextToVideo
from jaxgen.pipelines import text_to_video as module
from jaxgen.pipelines.arguments import seeds_and_indices
from jaxgen.pipelines.noise import draw_normal
from jaxgen.sampling import FlowMatchingSchedule
from jaxgen.text import WordTokenizer

GOLDENS = Path(__file__).parents[2] / "goldens/wan_folder"
SAMPLING = {"steps": 4, "guidance_scale": 3.5}  # as in goldens/write_wan.py
SIZES = {"frames": 2, "height": 8, "width": 4}
TOKENIZER = WordTokenizer.from_captions(["red square moves down", "blue"], max_tokens=5)
CARD = {"name": "test", "config": {"frames": 2, "size": 8}}
CONFIG = WanConfig(
    num_layers=1,
    num_heads=2,
    ffn_dim=16,
    patch_size=(1, 4, 4),
    in_channels=3,
    head_dim=8,
    text_dim=16,
    freq_dim=16,
)
PROMPTS = ["red square", "blue square"]
PARTS = ("text_encoder", "tokenizer", "vae")


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def golden():
    """Latents, channels last, and text features that diffusers sampled with."""
    arrays = load_safetensors(GOLDENS / "sampling.safetensors")
    return arrays | {name: np.moveaxis(arrays[name], 1, -1) for name in ("noise", "output")}


@pytest.fixture(scope="module")
def features(golden):
    return {name: golden[name] for name in ("context", "negative_context")}


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory):
    """A folder as diffusers' WanPipeline writes it; of what is not read, there are but traces."""
    folder = tmp_path_factory.mktemp("released")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("transformer", "scheduler"):
        shutil.copytree(GOLDENS / name, folder / name)
    for name in PARTS:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def released(released_folder):
    return TextToVideo.from_pretrained(released_folder)


def perturbed(model, seed):
    """Give zero-initialized weights a value, without which captions would not matter."""
    rng = np.random.default_rng(seed)
    noisy = lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    return model


def encoder_config(**changes):
    sizes = {"vocabulary_size": TOKENIZER.size, "max_tokens": 5, "width": 16, "num_layers": 1}
    sizes |= {"hidden_dim": 16, "pooled_dim": 1}
    return TextEncoderConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def captioned():
    transformer = perturbed(Wan(CONFIG, rngs=nnx.Rngs(0)), 1)
    text_encoder = perturbed(TextEncoder(encoder_config(), rngs=nnx.Rngs(0)), 2)
    return TextToVideo(transformer, text_encoder, TOKENIZER, CARD)


@pytest.fixture(scope="module")
def captioned_folder(captioned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    captioned.save_pretrained(folder, dtype=jnp.float32)
    return folder


@pytest.fixture
def copied(captioned_folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(captioned_folder, tmp_path / "model"))


@pytest.fixture
def copied_released(released_folder, tmp_path):
    return Path(shutil.copytree(released_folder, tmp_path / "released"))


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def by_hand(transformer, noise, context, negative, sigmas, scale):
    """Follow the velocity in a loop; without `negative`, there is no guidance at all."""
    run = nnx.jit(lambda model, *inputs: model(*inputs))

    def velocity(latents, sigma, text):
        time = np.full(len(latents), 1000 * sigma, np.float32)
        return np.asarray(run(transformer, latents.astype(np.float32), time, text), np.float64)

    latents = np.asarray(noise, np.float64)
    for sigma, following in np.lib.stride_tricks.sliding_window_view(np.asarray(sigmas), 2):
        predicted = velocity(latents, sigma, context)
        if negative is not None:
            away = velocity(latents, sigma, negative)
            predicted = away + scale * (predicted - away)
        latents = latents + (float(following) - float(sigma)) * predicted
    return latents


@dataclasses.dataclass(frozen=True)
class OneStep(FlowMatchingSchedule):
    """From one noise level to the level 1 below: what comes out is noise - velocity."""

    level: float = 1.0

    def sigmas(self, steps):
        return jnp.asarray([self.level, self.level - 1], jnp.float32)


# --- a released model ---


@pytest.mark.parametrize("row", [0, 1])
def test_the_transformer_inside_is_that_of_diffusers(released, row):
    example = load_safetensors(GOLDENS / "example.safetensors")
    noise, output = (np.moveaxis(example[name], 1, -1)[[row]] for name in ("latents", "output"))
    schedule = OneStep(level=float(example["timestep"][row]) / 1000)
    pipeline = TextToVideo(released.transformer, schedule=schedule)
    latents = pipeline(context=example["context"][[row]], guidance_scale=1, noise=noise, steps=1)
    np.testing.assert_allclose(noise - latents, output, atol=1e-5)


def test_agrees_with_the_loop_of_diffusers(released, golden, features):
    np.testing.assert_allclose(released.schedule.sigmas(4), golden["sigmas"], rtol=1e-6)
    latents = released(**features, noise=golden["noise"], **SAMPLING)
    assert (latents.shape, latents.dtype) == ((2, 2, 8, 4, 4), np.float32)
    np.testing.assert_allclose(latents, golden["output"], atol=1e-4)
    assert np.linalg.norm(latents - golden["output"]) < 1e-5 * np.linalg.norm(latents)
    assert np.linalg.norm(latents - golden["noise"]) > 0.1 * np.linalg.norm(latents)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scale", [None, 4.0, 0.0])
def test_is_eulers_method(released, golden, features, steps, scale):
    noise, context = golden["noise"], golden["context"]
    negative = None if scale is None else golden["negative_context"]
    text = {"context": context, "negative_context": negative}
    guidance = 1.0 if scale is None else scale
    latents = released(**text, noise=noise, steps=steps, guidance_scale=guidance)
    sigmas = FlowMatchingSchedule(5.0).sigmas(steps)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    wanted = by_hand(released.transformer, noise, context, negative, sigmas, scale)
    np.testing.assert_allclose(latents, wanted, atol=1e-5 * np.abs(wanted).max())


def test_scale_one_is_the_text_alone(released, features):
    both = released(**features, **SIZES, steps=2, guidance_scale=1)
    alone = released(context=features["context"], **SIZES, steps=2, guidance_scale=1)
    np.testing.assert_allclose(both, alone, atol=1e-5)


def test_one_negative_serves_all_clips(released, features):
    one = features["negative_context"][:1]
    rows = {"context": features["context"], "negative_context": np.repeat(one, 2, axis=0)}
    single = rows | {"negative_context": one}
    draws = [released(**text, **SIZES, steps=2) for text in (single, rows)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("kind", [np.float16, jnp.bfloat16])
def test_features_may_be_narrow(released, features, kind):
    narrow = {name: array.astype(kind) for name, array in features.items()}
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    draws = [released(**text, **SIZES, steps=1) for text in (narrow, wide)]
    np.testing.assert_array_equal(*draws)


def test_a_transformer_alone_and_shards_are_the_same_model(
    released, released_folder, features, copied_released
):
    alone = TextToVideo.from_pretrained(released_folder / "transformer")
    assert alone.schedule == FlowMatchingSchedule(3.0)
    path = copied_released / "transformer"
    save_wan_folder(path, released.transformer, max_shard_bytes=30_000)
    assert not (path / "diffusion_pytorch_model.safetensors").exists()
    sharded = TextToVideo.from_pretrained(copied_released)
    assert sharded.schedule == released.schedule == FlowMatchingSchedule(5.0)
    for pipeline in (alone, sharded):
        assert (pipeline.text_encoder, pipeline.tokenizer, pipeline.card) == (None, None, {})
        pipeline.schedule = released.schedule
        latents = pipeline(**features, **SIZES, steps=2)
        np.testing.assert_array_equal(latents, released(**features, **SIZES, steps=2))


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.5}, 3.5),
        ({"shift": 7}, 7.0),
        ({}, 3.0),
        (None, 3.0),
    ],
)
def test_the_shift_is_that_of_the_scheduler(copied_released, config, shift):
    path = copied_released / "scheduler/scheduler_config.json"
    path.unlink() if config is None else path.write_text(json.dumps(config))
    schedule = TextToVideo.from_pretrained(copied_released).schedule
    assert schedule == FlowMatchingSchedule(shift)


def test_released_round_trip(released, features, tmp_path):
    released.save_pretrained(tmp_path, dtype=jnp.float32)
    assert files_of(tmp_path) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        **{name: [None, None] for name in PARTS},
    }
    again = TextToVideo.from_pretrained(tmp_path)
    assert again.schedule == released.schedule
    draws = [pipeline(**features, **SIZES, steps=2) for pipeline in (again, released)]
    np.testing.assert_array_equal(*draws)


# --- a model with a text encoder ---


def test_draws_bytes_of_the_size_that_it_was_trained_on(captioned):
    clips = captioned(PROMPTS, steps=2)
    assert (clips.shape, clips.dtype) == ((2, 2, 8, 8, 3), np.uint8)
    assert clips.std() > 1
    assert captioned("red", steps=1, frames=3, width=12).shape == (1, 3, 8, 12, 3)


def test_pixels_are_those_of_the_loop(captioned):
    noise = np.random.default_rng(0).standard_normal((2, 2, 8, 8, 3)).astype(np.float32)
    context, _ = captioned.text_encoder(jnp.asarray(TOKENIZER.encode([*PROMPTS, ""])))
    context, empty = context[:2], jnp.repeat(context[2:], 2, axis=0)
    sigmas = FlowMatchingSchedule(3.0).sigmas(3)
    wanted = by_hand(captioned.transformer, noise, context, empty, sigmas, 4.0)
    pixels = np.clip(127.5 * (wanted + 1), 0, 255)
    clips = captioned(PROMPTS, noise=noise, steps=3)
    assert np.abs(clips - pixels).max() < 0.501


def test_captioned_round_trip(captioned, captioned_folder):
    assert files_of(captioned_folder) == [
        "card.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    loaded = TextToVideo.from_pretrained(captioned_folder)
    draws = [pipeline(PROMPTS, steps=2) for pipeline in (loaded, captioned)]
    np.testing.assert_array_equal(*draws)
    assert loaded.card == CARD
    assert loaded.tokenizer == TOKENIZER


class Scaled(nnx.Module):
    """Exact attention with a trained factor in front of the logits."""

    def __init__(self, factor):
        self.factor = nnx.Param(jnp.full((1, 1, 1, 1), factor))

    def __call__(self, query, key, value):
        return jax.nn.dot_product_attention(query * self.factor[...], key, value)


def test_parameters_of_plugged_in_attention_stay_wide(released_folder, features, tmp_path):
    draw = lambda pipeline: pipeline(**features, **SIZES, steps=2)
    factor = 2.001  # none of bfloat16's
    made = TextToVideo.from_pretrained(released_folder, attention=lambda number: Scaled(factor))
    assert not np.allclose(draw(made), draw(TextToVideo.from_pretrained(released_folder)))
    made.save_pretrained(tmp_path)
    stored = load_safetensors(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    wide = [name for name, array in stored.items() if array.dtype == np.float32]
    assert wide == [f"blocks.{number}.attn1.attend.factor" for number in range(3)]
    again = TextToVideo.from_pretrained(tmp_path, attention=lambda number: Scaled(0.0))
    assert again.transformer.blocks[2].self_attention.attend.factor[0, 0, 0, 0] == factor
    with pytest.raises(ValueError, match="self-attention of block 0 has the parameters factor"):
        TextToVideo.from_pretrained(tmp_path)
    full = TextToVideo.from_pretrained(tmp_path, attention="exact")
    wanted = draw(TextToVideo.from_pretrained(released_folder))
    np.testing.assert_allclose(draw(full), wanted, atol=0.1)  # weights are bfloat16 on disk


def test_sparse_attention_is_found_in_the_weights(captioned, captioned_folder, tmp_path):
    sizes = {"frames": 4, "height": 8, "width": 8}
    config = captioned.transformer.config
    tokens = 4 * 8 * 8 // config.patch_pixels
    cut = {"kept_fraction": 0.3, "block_q": 4, "block_k": 2}
    make = lambda number: SparseLinearAttention(config.num_heads, config.head_dim, tokens, **cut)
    made = TextToVideo.from_pretrained(captioned_folder, attention=make)
    made.save_pretrained(tmp_path, "float32")
    found, full = TextToVideo.from_pretrained(tmp_path), captioned
    draws = [pipeline(PROMPTS, steps=2, **sizes) for pipeline in (found, made, full)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


# --- both ---


def test_how_to_compute_is_an_argument(captioned_folder):
    options = {"dtype": jnp.bfloat16, "param_dtype": "float32", "attention": "int8", "remat": True}
    loaded = TextToVideo.from_pretrained(captioned_folder, **options)
    for config in (loaded.transformer.config, loaded.text_encoder.config):
        assert (config.dtype, config.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert loaded.transformer.config.attention == "int8"
    assert loaded.transformer.config.remat
    narrow = TextToVideo.from_pretrained(captioned_folder, dtype="bfloat16")
    assert narrow.text_encoder.config.param_dtype == jnp.bfloat16
    assert narrow.transformer.blocks[0].mlp.up.kernel.dtype == jnp.bfloat16


def test_blocks_may_be_compiled_as_one(released, released_folder, features):
    loop = TextToVideo.from_pretrained(released_folder, scan=True)
    assert loop.transformer.config.scan
    draws = [pipeline(**features, **SIZES, steps=2) for pipeline in (loop, released)]
    np.testing.assert_allclose(*draws, atol=1e-5)


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"attention": "int8"}])
def test_other_arithmetic_draws_nearly_the_same(captioned, captioned_folder, options):
    loaded = TextToVideo.from_pretrained(captioned_folder, **options)
    # jax.nn.dot_product_attention itself promotes bfloat16 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        clips = loaded(PROMPTS, steps=2).astype(float)
    assert np.abs(clips - captioned(PROMPTS, steps=2)).mean() < 2


def test_saved_configuration_says_nothing_about_arithmetic(captioned_folder, tmp_path):
    options = {"attention": "int8", "dtype": jnp.bfloat16, "remat": True}
    TextToVideo.from_pretrained(captioned_folder, **options).save_pretrained(tmp_path)
    for name in ("transformer/config.json", "text_encoder/config.json"):
        assert (tmp_path / name).read_text() == (captioned_folder / name).read_text()


def test_same_call_same_result(captioned, released, features):
    for pipeline, text in ((captioned, {"prompts": PROMPTS}), (released, features | SIZES)):
        first = pipeline(**text, steps=2)
        np.testing.assert_array_equal(first, pipeline(**text, steps=2))
        for change in ({"seed": 1}, {"guidance_scale": 9.0}):
            assert not np.array_equal(first, pipeline(**text, steps=2, **change))
    swapped = captioned(PROMPTS[::-1], steps=2)
    assert not np.array_equal(captioned(PROMPTS, steps=2), swapped)


def test_a_batch_is_its_clips(captioned, released, features):
    both = released(**features, **SIZES, steps=2, seed=[4, 5])
    for row, seed in enumerate([4, 5]):
        one = {name: array[[row]] for name, array in features.items()}
        alone = released(**one, **SIZES, steps=2, seed=seed)
        np.testing.assert_allclose(both[[row]], alone, atol=1e-5)
        clip = captioned(PROMPTS[row], steps=2, seed=seed).astype(int)
        assert np.abs(captioned(PROMPTS, steps=2, seed=[4, 5])[[row]] - clip).max() <= 1
    np.testing.assert_array_equal(captioned("red", steps=1), captioned(["red"], steps=1))


def test_noise_is_that_of_pictures_and_may_be_given(captioned, released, features):
    rows = [
        jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (4, 4, 2)) for i in range(3)
    ]
    places = seeds_and_indices(7, 3)
    np.testing.assert_array_equal(draw_normal(*places, shape=(4, 4, 2)), rows)
    noise = draw_normal(*seeds_and_indices(7, 2), shape=(2, 8, 4, 4))
    drawn = released(**features, **SIZES, steps=2, seed=7)
    for sizes in ({}, {"height": 8}, SIZES):
        given = released(**features, **sizes, steps=2, noise=noise)
        np.testing.assert_array_equal(given, drawn)
    noise = draw_normal(*seeds_and_indices([3, 3], 2), shape=(2, 8, 8, 3))
    given, drawn = (
        captioned(PROMPTS, steps=2, **start) for start in ({"noise": noise}, {"seed": [3, 3]})
    )
    np.testing.assert_array_equal(given, drawn)


def test_nothing_but_shapes_recompiles(captioned, released, features, monkeypatch):
    traces = []
    sample = module.euler_sample
    monkeypatch.setattr(module, "euler_sample", lambda *args: traces.append(args) or sample(*args))
    jax.clear_caches()
    captioned(PROMPTS, steps=3)
    assert len(traces) == 1
    captioned(["blue", "red"], steps=3, guidance_scale=1, seed=123)
    captioned(["blue", "red"], steps=3, seed=[5, np.uint32(6)])
    captioned(PROMPTS, steps=3, noise=np.zeros((2, 2, 8, 8, 3), np.float16))
    again = TextToVideo(captioned.transformer, captioned.text_encoder, TOKENIZER, CARD)
    again(PROMPTS, steps=3)
    assert len(traces) == 1
    captioned(PROMPTS, steps=2)
    assert len(traces) == 2
    text, context = features | SIZES, features["context"].astype(jnp.bfloat16)
    released(**text, steps=3)
    assert len(traces) == 3
    released(**text | {"context": 2 * text["context"]}, steps=3, guidance_scale=7, seed=[8, 9])
    released(context=jnp.asarray(context), **SIZES, steps=3, guidance_scale=1)
    released(**text | {"negative_context": text["negative_context"][:1]}, steps=3)
    TextToVideo(released.transformer)(**text, steps=3)  # with another shift
    assert len(traces) == 3
    released(**text | {"frames": 1}, steps=3)
    assert len(traces) == 4


# --- refusals ---

FEATURES = np.zeros((2, 5, 12), np.float32)
NOISE = np.zeros((2, 2, 8, 4, 4), np.float32)
UNGUIDED = {"context": FEATURES, "guidance_scale": 1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "prompts must be given, and no features, got prompts=None and no feat"),
        (
            {"prompts": "red", "context": FEATURES},
            ValueError,
            "this model has a text encoder: .* got prompts='red' and context$",
        ),
        ({"context": FEATURES}, ValueError, "got prompts=None and context$"),
        ({"prompts": "red", "negative_context": FEATURES}, ValueError, "and negative_context$"),
        ({"prompts": []}, ValueError, "prompts must hold at least one caption, got none"),
        ({"prompts": 3}, TypeError, "prompts must be a string or a list of strings, got .*int"),
        ({"prompts": "red", "steps": 0}, ValueError, "steps must be an int of at least 1"),
        ({"prompts": "red", "guidance_scale": np.inf}, ValueError, "finite number, got inf"),
        ({"prompts": "red", "seed": -1}, ValueError, "seed must be an int .*, got -1"),
        ({"prompts": ["red"] * 2, "seed": [1]}, ValueError, "got 1 seeds and 2 prompts"),
        ({"prompts": "red", "frames": 0}, ValueError, "frames must be a positive int, got 0"),
        ({"prompts": "red", "width": 8.0}, ValueError, "width must be a positive int, got 8.0"),
        ({"prompts": "red", "height": True}, ValueError, "height must be a positive int, got Tr"),
        (
            {"prompts": "red", "height": 6},
            ValueError,
            r"patch_size=\(1, 4, 4\) must divide frames, height and width, got \(2, 6, 8\)",
        ),
        (
            {"prompts": "red", "noise": NOISE},
            ValueError,
            r"noise must have shape \(1, frames, height, width, 3\), got \(2, 2, 8, 4, 4\)",
        ),
    ],
)
def test_refuses_arguments_with_captions(captioned, options, error, message):
    with pytest.raises(error, match=message):
        captioned(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prompts": "red"},
            ValueError,
            r"no text encoder: context must be given, float features of shape \(batch, tokens, 12"
            r"\), and no prompts, got prompts='red' and no features",
        ),
        ({}, ValueError, "got prompts=None and no features"),
        ({"negative_context": FEATURES}, ValueError, "got prompts=None and negative_context"),
        ({"prompts": "red", **UNGUIDED}, ValueError, "got prompts='red' and context"),
        (
            {"context": FEATURES},
            ValueError,
            "negative_context must be given, .* unless guidance_scale is 1, got guidance_scale=4.0",
        ),
        ({**UNGUIDED, "guidance_scale": None}, ValueError, "a finite number, got None"),
        (
            {"context": FEATURES, "negative_context": FEATURES[:, :4]},
            ValueError,
            r"shape of context, \(2, 5, 12\), or \(1, 5, 12\) for all clips, got \(2, 4, 12\)",
        ),
        (
            {"context": FEATURES[0], "guidance_scale": 1},
            ValueError,
            r"context must have shape \(batch, tokens, 12\), got \(5, 12\)",
        ),
        (
            {"context": FEATURES, "negative_context": FEATURES[..., :3]},
            ValueError,
            r"negative_context must have shape \(batch, tokens, 12\), got \(2, 5, 3\)",
        ),
        ({**UNGUIDED, "context": FEATURES[:, :0]}, ValueError, r"got \(2, 0, 12\)"),
        (
            {**UNGUIDED, "context": FEATURES.astype(int)},
            TypeError,
            "context must be a NumPy or JAX array of floats, got int64",
        ),
        ({**UNGUIDED, "context": [[1.0]]}, TypeError, "array of floats, got <class 'list'>"),
        (UNGUIDED, ValueError, "must be given, .*, got frames=None, height=None, width=None"),
        (
            {**UNGUIDED, "frames": 2, "height": 8},
            ValueError,
            "frames, height and width must be given, this model does not say what it was trained "
            "on, got frames=2, height=8, width=None",
        ),
        ({**UNGUIDED, **SIZES, "width": 3}, ValueError, r"must divide .*, got \(2, 8, 3\)"),
        ({**UNGUIDED, **SIZES, "frames": 1025}, ValueError, "at most rope_max_seq_len=1024"),
        ({**UNGUIDED, "noise": NOISE[:1]}, ValueError, r"shape \(2, frames, height, width, 4\), g"),
        ({**UNGUIDED, "noise": NOISE[:, :0]}, ValueError, r"got \(2, 0, 8, 4, 4\)"),
        ({**UNGUIDED, "noise": 0.5}, TypeError, "noise must be .*, got <class 'float'>"),
        (
            {**UNGUIDED, "noise": NOISE, "frames": 2, "width": 5},
            ValueError,
            "left out or be those of noise, frames=2, height=8, width=4, got frames=2, height=None,"
            " width=5",
        ),
    ],
)
def test_refuses_arguments_with_features(released, options, error, message):
    with pytest.raises(error, match=message):
        released(**options)


def test_refuses_parts_that_do_not_fit(captioned, released):
    def refused(message, *parts):
        with pytest.raises(ValueError, match=message):
            TextToVideo(*parts)

    def encoder(**changes):
        config = encoder_config(**changes)
        return nnx.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))

    transformer = captioned.transformer
    refused("must both be given or none, got text_encoder only", transformer, encoder())
    refused("must both be given or none, got tokenizer only", transformer, None, TOKENIZER)
    for changes, message in (
        ({"hidden_dim": 8}, "text_dim and hidden_dim: 16 and 8"),
        ({"vocabulary_size": 99}, f"vocabulary_size and tokenizer.size: 99 and {TOKENIZER.size}"),
        ({"max_tokens": 6}, "max_tokens of encoder and tokenizer: 6 and 5"),
    ):
        refused(message, transformer, encoder(**changes), TOKENIZER)
    latents = released.transformer
    refused("in_channels and RGB: 4 and 3", latents, encoder(hidden_dim=12), TOKENIZER)
    other = nnx.eval_shape(
        lambda: Wan(dataclasses.replace(CONFIG, out_channels=6), rngs=nnx.Rngs(0))
    )
    refused("in_channels and out_channels: 3 and 6", other)


def test_refuses_incomplete_folders(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        TextToVideo.from_pretrained(tmp_path / "nowhere")
    (copied / "card.json").unlink()
    (copied / "transformer/diffusion_pytorch_model.safetensors").unlink()
    missing = r"lacks: card\.json, transformer/diffusion_pytorch_model\.safetensors; nor is it a "
    with pytest.raises(FileNotFoundError, match=missing + r".* with model_index\.json"):
        TextToVideo.from_pretrained(copied)


def test_refuses_damaged_files(copied):
    path = copied / "text_encoder/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"text_encoder/model\.safetensors: truncated"):
        TextToVideo.from_pretrained(copied)
    path.write_bytes(content)
    (copied / "card.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"card\.json: expected a JSON object, got list"):
        TextToVideo.from_pretrained(copied)
    with pytest.raises(ValueError, match="attention must be one of 'exact', 'int8', got 'fast'"):
        TextToVideo.from_pretrained(copied, attention="fast")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model_index", {"_class_name": "WanVACEPipeline"}, "must be 'WanPipeline', got 'WanVACE"),
        ("model_index", {"transformer_2": ["diffusers", "X"]}, r"null, got \['diffusers', 'X'\]"),
        ("scheduler/scheduler_config", {"shift": "3"}, "shift must be a number, got '3'"),
        ("scheduler/scheduler_config", {"shift": 0}, "json: shift must be a positive finite"),
        (
            "scheduler/scheduler_config",
            {"use_karras_sigmas": True},
            "use_karras_sigmas must be false or null, got True: noise levels can be shifted only",
        ),
        ("transformer/config", {"image_dim": 8}, r"image_dim must be None \(Wan text-to-video\)"),
    ],
)
def test_refuses_other_pipelines(copied_released, name, changes, message):
    path = copied_released / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        TextToVideo.from_pretrained(copied_released)


def test_refuses_to_mix_models_in_a_folder(captioned, released, copied, copied_released):
    for pipeline, folder, name in (
        (captioned, copied_released, "model_index"),
        (released, copied, "card"),
    ):
        before = files_of(folder)
        with pytest.raises(FileExistsError, match=rf"{name}\.json belongs to a model with"):
            pipeline.save_pretrained(folder)
        assert files_of(folder) == before


def test_refuses_to_save_in_a_dtype_that_is_no_float(captioned, tmp_path):
    with pytest.raises(
        ValueError, match="dtype must be a float dtype such as bfloat16, got 'int8'"
    ):
        captioned.save_pretrained(tmp_path / "new", dtype="int8")
    assert not (tmp_path / "new").exists()


def test_the_card_is_a_copy(captioned):
    captioned.card["name"] = "other"
    assert captioned.card["name"] == "test"
