import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.models.mmdit import MMDIT_PRESETS, MMDiT
from jaxgen.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxgen.pipelines import TextToImage
from jaxgen.pipelines import text_to_image as module
from jaxgen.pipelines.arguments import seeds_and_indices
from jaxgen.pipelines.noise import draw_normal
from jaxgen.text import WordTokenizer

TOKENIZER = WordTokenizer.from_captions(
    ["red heart", "blue car", "woman firefighter"], max_tokens=4
)
SETTINGS = {"steps": 2}


CONFIG = dataclasses.replace(MMDIT_PRESETS["tiny"], num_layers=1)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def encoder_config(**changes):
    sizes = {"vocabulary_size": TOKENIZER.size, "max_tokens": 4, "width": 32, "num_layers": 1}
    return TextEncoderConfig(**(sizes | changes))


def perturb(model, seed):
    """Give zero-initialized weights a value, without which captions would not matter."""
    state = nnx.state(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        leaf + 0.05 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(treedef, noisy))
    return model


@pytest.fixture(scope="module")
def pipeline():
    transformer = perturb(MMDiT(CONFIG, rngs=nnx.Rngs(0)), 1)
    text_encoder = perturb(TextEncoder(encoder_config(), rngs=nnx.Rngs(0)), 2)
    return TextToImage(transformer, text_encoder, TOKENIZER, {"name": "test", "steps": 3})


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(path, dtype=jnp.float32)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, to be damaged."""
    for source in folder.rglob("*"):
        if source.is_file():
            target = tmp_path / "model" / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return tmp_path / "model"


def test_draws_bytes(pipeline):
    pictures = pipeline(["red heart", "blue car"], **SETTINGS)
    assert pictures.shape == (2, 16, 16, 3)
    assert pictures.dtype == np.uint8
    assert pictures.std() > 1


def test_a_string_is_one_prompt(pipeline):
    alone = pipeline("red heart", **SETTINGS)
    assert alone.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(alone, pipeline(["red heart"], **SETTINGS))


def test_same_call_same_pictures(pipeline):
    prompts = ["red heart", "blue car"]
    first = pipeline(prompts, **SETTINGS)
    np.testing.assert_array_equal(first, pipeline(prompts, **SETTINGS))
    for change in ({"seed": 1}, {"guidance_scale": 9.0}):
        assert not np.array_equal(first, pipeline(prompts, **SETTINGS, **change))
    assert not np.array_equal(first, pipeline(["blue car", "blue car"], **SETTINGS))


def test_guidance_zero_ignores_the_caption(pipeline):
    draw = lambda prompt: pipeline([prompt, ""], guidance_scale=0.0, seed=[3, 3], **SETTINGS)
    np.testing.assert_array_equal(draw("red heart"), draw("blue car"))
    pictures = draw("red heart").astype(int)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_nothing_but_shapes_recompiles(pipeline, monkeypatch):
    traces = []
    sample = module.euler_sample
    monkeypatch.setattr(module, "euler_sample", lambda *args: traces.append(args) or sample(*args))
    jax.clear_caches()
    pipeline(["red heart", "blue car"], steps=3)
    assert len(traces) == 1
    pipeline(["woman", "red car"], steps=3, guidance_scale=7.5)
    pipeline(["woman", "red car"], steps=3, guidance_scale=2, seed=123)
    pipeline(["woman", "red car"], steps=3, seed=[5, np.uint32(6)])
    again = TextToImage(pipeline.transformer, pipeline.text_encoder, TOKENIZER)
    again(["woman", "red car"], steps=3)
    assert len(traces) == 1
    pipeline(["woman", "red car"], steps=4)
    assert len(traces) == 2


def test_noise_depends_on_seed_and_position_only():
    noise = lambda seed, count: draw_normal(*seeds_and_indices(seed, count), shape=(4, 4, 3))
    three, two = noise(7, 3), noise(7, 2)
    np.testing.assert_array_equal(three[:2], two)
    assert not np.array_equal(three[0], three[1])
    own = noise([7, 8, 7], 3)
    np.testing.assert_array_equal(own[0], three[0])
    np.testing.assert_array_equal(own[2], three[0])
    np.testing.assert_array_equal(own[1], noise(8, 1)[0])


def test_pixels_round_and_saturate():
    values = jnp.array([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 5, 1)
    pixels = module.to_pixels(jnp.broadcast_to(values, (1, 1, 5, 3)))
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_round_trip_through_a_folder(pipeline, folder):
    loaded = TextToImage.from_pretrained(folder)
    prompts = ["red heart", "woman firefighter"]
    np.testing.assert_array_equal(loaded(prompts, **SETTINGS), pipeline(prompts, **SETTINGS))
    assert loaded.card == {"name": "test", "steps": 3}
    assert loaded.tokenizer == TOKENIZER


def test_card_is_a_copy(pipeline):
    pipeline.card["name"] = "other"
    assert pipeline.card["name"] == "test"


def test_bfloat16_on_disk_is_half_the_size_and_close(pipeline, folder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    name = "transformer/model.safetensors"
    assert (tmp_path / name).stat().st_size < 0.55 * (folder / name).stat().st_size
    drawn = TextToImage.from_pretrained(tmp_path)("red heart", **SETTINGS).astype(float)
    assert np.abs(drawn - pipeline("red heart", **SETTINGS)).mean() < 4


@pytest.mark.parametrize(
    "options", [{"attention": "int8"}, {"dtype": jnp.bfloat16}, {"dtype": "bfloat16"}]
)
def test_other_arithmetic_draws_nearly_the_same(pipeline, folder, options):
    loaded = TextToImage.from_pretrained(folder, **options)
    assert loaded.transformer.config.attention == options.get("attention", "exact")
    assert loaded.transformer.config.dtype == jnp.dtype(options.get("dtype", jnp.float32))
    # jax.nn.dot_product_attention itself promotes bfloat16 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        drawn = loaded("red heart", **SETTINGS).astype(float)
    assert np.abs(drawn - pipeline("red heart", **SETTINGS)).mean() < 4


def test_saved_configuration_says_nothing_about_arithmetic(folder, tmp_path):
    TextToImage.from_pretrained(folder, attention="int8", dtype=jnp.bfloat16).save_pretrained(
        tmp_path
    )
    for name in ("transformer/config.json", "text_encoder/config.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
    assert TextToImage.from_pretrained(tmp_path).transformer.config.attention == "exact"


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "prompts must hold at least one caption, got none"),
        (3, {}, TypeError, "prompts must be a string or a list of strings, got <class 'int'>"),
        (["red", None], {}, TypeError, "prompts must be strings, got NoneType"),
        ("red", {"steps": 0}, ValueError, "steps must be an int of at least 1, got steps=0"),
        ("red", {"steps": 1.5}, ValueError, "steps must be an int of at least 1, got steps=1.5"),
        ("red", {"guidance_scale": np.nan}, ValueError, "must be a finite number, got nan"),
        ("red", {"guidance_scale": "4"}, ValueError, "must be a finite number, got '4'"),
        ("red", {"guidance_scale": None}, ValueError, "must be a finite number, got None"),
        ("red", {"seed": -1}, ValueError, r"seed must be an int from 0 to 2\*\*32 - 1, got -1"),
        ("red", {"seed": 2**32}, ValueError, "seed must be an int .* got 4294967296"),
        ("red", {"seed": 0.5}, ValueError, "seed must be an int .* got 0.5"),
        ("red", {"seed": None}, ValueError, "seed must be an int .* got None"),
        (["red", "car"], {"seed": [1]}, ValueError, "got 1 seeds and 2 prompts"),
    ],
)
def test_refuses_arguments(pipeline, prompts, options, error, message):
    with pytest.raises(error, match=message):
        pipeline(prompts, **options)


def test_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        TextToImage.from_pretrained(tmp_path / "nowhere")


def test_names_all_missing_files(copy):
    (copy / "card.json").unlink()
    (copy / "transformer" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks: card\.json, transformer/model\.safetensors$"
    ):
        TextToImage.from_pretrained(copy)


def test_refuses_truncated_weights(copy):
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"text_encoder/model\.safetensors: truncated"):
        TextToImage.from_pretrained(copy)


def test_refuses_weights_of_another_model(copy):
    path = copy / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"num_layers": 2}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing .*transformer_blocks\."):
        TextToImage.from_pretrained(copy)


def test_refuses_a_damaged_card(copy):
    (copy / "card.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"card\.json: expected a JSON object, got list"):
        TextToImage.from_pretrained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 64}, "joint_attention_dim and hidden_dim: 256 and 64"),
        ({"vocabulary_size": 99}, f"vocabulary_size and tokenizer.size: 99 and {TOKENIZER.size}"),
        ({"max_tokens": 5}, "max_tokens of encoder and tokenizer: 5 and 4"),
    ],
)
def test_refuses_parts_that_do_not_fit(pipeline, changes, message):
    other = TextEncoder(encoder_config(**changes), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        TextToImage(pipeline.transformer, other, TOKENIZER)
