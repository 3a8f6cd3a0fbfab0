"""A whole Stable Diffusion 3 pipeline against what diffusers draws with it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from safetensors import safe_open

from jaxgen.pipelines import StableDiffusion3
from jaxgen.sampling import Alone, HybridStitch, SkipLayers, TStitch

FOLDER = Path(__file__).parents[2] / "goldens" / "sd3_pipeline"
with safe_open(FOLDER / "example.safetensors", "numpy") as file:
    ABOUT = json.loads(file.metadata()["about"])
    EXAMPLE = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
OPTIONS = {
    "negative_prompts": ABOUT["negative"],
    "height": 32,
    "width": 32,
    "steps": ABOUT["steps"],
    "guidance_scale": ABOUT["guidance"],
}


def channels_last(name):
    return EXAMPLE[name].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusion3.from_pretrained(
        FOLDER, small=FOLDER, dtype=jnp.float32, t5_tokens=ABOUT["t5_tokens"]
    )


def draw(pipeline, **changes):
    return pipeline(ABOUT["prompts"], **(OPTIONS | changes))


@pytest.mark.parametrize("end", ["", "_skipped"])
def test_draws_what_diffusers_draws(pipeline, end):
    """Eight guided steps from the same latents: text, transformer, sampler, autoencoder."""
    skip = None
    if end:
        skip = SkipLayers.of(
            ABOUT["steps"],
            blocks=tuple(ABOUT["skip_guidance_layers"]),
            scale=ABOUT["skip_layer_guidance_scale"],
            start=ABOUT["skip_layer_guidance_start"],
            stop=ABOUT["skip_layer_guidance_stop"],
        )
    found = draw(pipeline, policy=Alone(), latents=channels_last("start"), skip_layers=skip)
    wanted = channels_last(f"picture{end}")
    assert found.shape == wanted.shape
    # Pictures are bytes here: half a level of rounding, and 0.01 allowed.
    assert np.abs(found / 255 - wanted).max() < 0.01
    assert np.abs(wanted - channels_last("picture" if end else "picture_skipped")).max() > 0.02


def test_the_small_model_is_one_too_and_all_policies_draw(pipeline):
    start = channels_last("start")
    plain = draw(pipeline, policy=Alone(), latents=start).astype(int)
    for policy in (Alone("small"), TStitch(), HybridStitch(2, 6, refresh=1)):
        assert np.abs(draw(pipeline, policy=policy, latents=start) - plain).max() <= 1, policy
    previews = list(
        pipeline.stream(
            ABOUT["prompts"], **OPTIONS, policy=HybridStitch(2, 6), latents=start, every=2
        )
    )
    assert [preview.step for preview in previews] == [1, 2, 4, 6, 8]
    assert previews[2].mask.shape == (2, 2, 2)


def test_the_small_model_may_be_on_another_device(pipeline):
    places = [SingleDeviceSharding(device) for device in jax.devices()[1:3]]
    apart = StableDiffusion3.from_pretrained(
        FOLDER, small=FOLDER, dtype=jnp.float32, t5_tokens=ABOUT["t5_tokens"],
        sharding=places[0], small_sharding=places[1],
    )  # fmt: skip
    assert {leaf.sharding for leaf in jax.tree.leaves(nnx.state(apart.small))} == {places[1]}
    start = channels_last("start")
    for policy in (Alone(), Alone("small"), HybridStitch(2, 6)):
        one, two = (draw(p, policy=policy, latents=start).astype(int) for p in (pipeline, apart))
        assert np.abs(one - two).max() <= 1, policy
    together = StableDiffusion3.from_pretrained(
        FOLDER, small=FOLDER, dtype=jnp.float32, t5_tokens=ABOUT["t5_tokens"], sharding=places[1]
    )
    assert {leaf.sharding for leaf in jax.tree.leaves(nnx.state(together.small))} == {places[1]}


@pytest.mark.parametrize("device", [None, 1])
def test_everything_is_compiled_once(device, caplog):
    """No program writes weights back: they would belong to a device then, and compile anew."""
    place = device and SingleDeviceSharding(jax.devices()[device])
    pipeline = StableDiffusion3.from_pretrained(
        FOLDER, small=FOLDER, dtype=jnp.float32, t5_tokens=ABOUT["t5_tokens"], small_sharding=place
    )
    parts = pipeline.text, pipeline.transformer, pipeline.small, pipeline.autoencoder
    before = jax.tree.leaves(nnx.state(parts))
    compiled = []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            draw(pipeline, policy=HybridStitch(2, 6), width=48 if device else 64)
        compiled.append([m for m in caplog.messages if m.startswith("Finished XLA compilation")])
    assert sum("decode" in message for message in compiled[0]) == 1, compiled[0]
    assert compiled[1] == []
    after = jax.tree.leaves(nnx.state(parts))
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_scanned_transformers_draw_the_same(pipeline):
    scanned = StableDiffusion3.from_pretrained(
        FOLDER, small=FOLDER, dtype=jnp.float32, t5_tokens=ABOUT["t5_tokens"], scan=True
    )
    assert scanned.transformer.config.scan
    assert scanned.small.config.scan
    start = channels_last("start")
    for policy in (Alone(), HybridStitch(2, 6, refresh=2)):
        one, two = (draw(p, policy=policy, latents=start).astype(int) for p in (pipeline, scanned))
        assert np.abs(one - two).max() <= 1, policy


def test_seeds_prompts_and_sizes(pipeline):
    one = draw(pipeline, policy=Alone(), seed=5)
    np.testing.assert_array_equal(one, draw(pipeline, policy=Alone(), seed=5))
    assert (one != draw(pipeline, policy=Alone(), seed=6)).any()
    negative = draw(pipeline, policy=Alone(), seed=5, negative_prompts=[ABOUT["negative"]] * 2)
    np.testing.assert_array_equal(one, negative)
    assert (one != draw(pipeline, policy=Alone(), seed=5, negative_prompts="")).any()
    wide = pipeline("a red cat", height=32, width=64, steps=2, policy=Alone())
    assert wide.shape == (1, 32, 64, 3)
    tiled = draw(pipeline, policy=Alone(), seed=5, tiled=True)
    np.testing.assert_array_equal(one, tiled)  # one tile holds it


def test_without_t5():
    pipeline = StableDiffusion3.from_pretrained(FOLDER, dtype=jnp.float32, with_t5=False)
    assert pipeline.text.t5 is None
    pictures = pipeline(ABOUT["prompts"], **(OPTIONS | {"steps": 1}))
    assert pictures.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("with_t5", [True, False])
def test_a_saved_pipeline_draws_the_same(tmp_path, with_t5):
    options = {"dtype": jnp.float32, "t5_tokens": ABOUT["t5_tokens"]}
    pipeline = StableDiffusion3.from_pretrained(FOLDER, with_t5=with_t5, **options)
    pipeline.save_pretrained(tmp_path, max_shard_bytes=50_000)
    again = StableDiffusion3.from_pretrained(tmp_path, **options)
    assert (again.text.t5 is not None) == with_t5
    assert again.schedule == pipeline.schedule
    changes = {"steps": 2, "seed": 3}
    np.testing.assert_array_equal(draw(pipeline, **changes), draw(again, **changes))
    assert (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()


def test_parts_are_released_when_they_are_needed_no_more():
    pipeline = StableDiffusion3.from_pretrained(FOLDER, small=FOLDER, dtype=jnp.float32)
    seen = []
    for preview in pipeline.stream(
        "a cat", height=32, width=32, steps=4, policy=HybridStitch(2, 3), every=1, release=True
    ):
        there = [name for name in ("text", "transformer", "small") if getattr(pipeline, name)]
        seen.append((preview.step, there))
    assert seen == [
        (1, ["transformer", "small"]),
        (2, ["transformer", "small"]),
        (3, ["transformer", "small"]),
        (4, ["small"]),
    ]
    assert pipeline.small is None
    with pytest.raises(ValueError, match="the transformer was released; load the pipeline again"):
        pipeline("a cat")
    with pytest.raises(ValueError, match="were released; load it again to save it"):
        pipeline.save_pretrained("nowhere")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 40}, ValueError, "height must be a multiple of 16 and at most 128, got 40"),
        ({"width": 144}, ValueError, "width must be a multiple of 16 and at most 128, got 144"),
        ({"width": 32.0}, TypeError, "width must be an int, got 32.0"),
        ({"negative_prompts": ["a"] * 3}, ValueError, "one for each prompt, got 3 and 2 prompts"),
        (
            {"latents": np.zeros((2, 4, 4, 3))},
            ValueError,
            r"latents must have shape \(2, 4, 4, 4\)",
        ),
        ({"guidance_scale": (1.0,)}, ValueError, r"must be one number or two, got \(1.0,\)"),
        ({"scores": np.zeros((2, 3, 2))}, ValueError, r"scores must have shape \(2, 2, 2\), got"),
        ({"skip_layers": SkipLayers.of(8)}, ValueError, r"blocks below 3, got \(7, 8, 9\)"),
    ],
)
def test_refuses_arguments(pipeline, changes, error, message):
    with pytest.raises(error, match=message):
        draw(pipeline, **changes)


def test_refuses_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        StableDiffusion3.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"lacks model_index.json"):
        StableDiffusion3.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="must be 'StableDiffusion3Pipeline', got 'WanPipeline'"):
        StableDiffusion3.from_pretrained(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(FOLDER, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(FileNotFoundError, match="vae"):
        StableDiffusion3.from_pretrained(broken)
