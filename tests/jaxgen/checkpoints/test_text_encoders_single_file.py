from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.checkpoints import (
    export_flat,
    load_clip_text_folder,
    load_safetensors,
    load_t5_folder,
    text_encoders_from_single_file,
)

FILES = Path(__file__).parents[2] / "goldens/text_encoders"
NAMES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5"}


@pytest.fixture(scope="module")
def folders():
    """The golden encoders, loaded from their folders."""
    clip = {name: load_clip_text_folder(FILES / name) for name in ("clip_l", "clip_g")}
    return clip | {"t5": load_t5_folder(FILES / "t5")}


def _arrays():
    """All in the layout of a single file, with keys of other parts."""
    arrays = {
        f"text_encoders.{name}.transformer.{key}": array
        for name, folder in NAMES.items()
        for key, array in load_safetensors(FILES / folder / "model.safetensors").items()
    }
    for name in ("clip_l", "clip_g"):
        arrays[f"text_encoders.{name}.logit_scale"] = np.float32(4.6)
    return arrays | {"first_stage_model.decoder.conv_in.bias": np.zeros(3)}


def _load(arrays, folders):
    configs = {name: model.config for name, model in folders.items()}
    return text_encoders_from_single_file(arrays, "here", **configs)


def test_encoders_are_those_of_the_folders(folders):
    encoders = _load(_arrays(), folders)._asdict()
    for name, model in folders.items():
        weights = export_flat(encoders[name])
        for key, array in export_flat(model).items():
            if (name, key) == ("clip_l", "projection.kernel"):
                array = np.eye(*array.shape, dtype=array.dtype)
            np.testing.assert_array_equal(weights[key], array, err_msg=f"{name} {key}")


def test_encoders_may_be_absent_and_so_may_the_projection_of_clip_l(folders):
    arrays = {key: array for key, array in _arrays().items() if ".t5xxl." not in key}
    encoders = _load(arrays, folders)
    assert encoders.t5 is None
    assert encoders.clip_g is not None
    del arrays["text_encoders.clip_l.transformer.text_projection.weight"]
    projection = _load(arrays, folders).clip_l.projection.kernel[...]
    np.testing.assert_array_equal(projection, jnp.eye(*projection.shape))
    assert _load({"first_stage_model.decoder.conv_in.bias": 0}, folders) == (None, None, None)


def test_unknown_and_missing_keys_are_refused(folders):
    arrays = _arrays()
    stranger = "text_encoders.clip_h.transformer.text_projection.weight"
    with pytest.raises(ValueError, match=rf"^here: keys of no text encoder .* \(1\): {stranger}$"):
        _load(arrays | {stranger: np.zeros(3)}, folders)
    with pytest.raises(ValueError, match=r"\(1\): text_encoders\.t5xxl\.logit_scale$"):
        _load(arrays | {"text_encoders.t5xxl.logit_scale": np.zeros(3)}, folders)
    for key in (
        "text_encoders.clip_g.transformer.text_projection.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias",
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight",
    ):
        start, end = key.split(".transformer.")
        rest = {other: array for other, array in arrays.items() if other != key}
        with pytest.raises(ValueError, match=rf"^here: {start}\.transformer: .*\(1\): {end}$"):
            _load(rest, folders)
        renamed = rest | {key + "_": arrays[key]}
        with pytest.raises(ValueError, match=rf"missing \(1\): {end}; unused \(1\): {end}_$"):
            _load(renamed, folders)
