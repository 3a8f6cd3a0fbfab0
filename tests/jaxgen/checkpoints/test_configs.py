import dataclasses
import json

import jax.numpy as jnp
import pytest

from jaxgen.checkpoints import config_from_json, config_to_json
from jaxgen.models import (
    MMDIT_PRESETS,
    AttributeClassifierConfig,
    MMDiTConfig,
    TextEncoderConfig,
)


@pytest.mark.parametrize(
    "config",
    [
        *MMDIT_PRESETS.values(),
        dataclasses.replace(MMDIT_PRESETS["tiny"], dtype=jnp.bfloat16, attention="int8"),
        TextEncoderConfig(vocabulary_size=30),
        AttributeClassifierConfig(5, 3, 4),
    ],
)
def test_round_trip(config):
    text = config_to_json(config)
    assert config_from_json(type(config), text) == config
    assert text.endswith("}\n")


def test_dtypes_are_strings():
    config = dataclasses.replace(MMDIT_PRESETS["tiny"], dtype=jnp.bfloat16)
    assert json.loads(config_to_json(config))["dtype"] == "bfloat16"


def test_fields_with_a_default_may_be_left_out():
    assert config_from_json(TextEncoderConfig, '{"vocabulary_size": 9}') == TextEncoderConfig(9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"widht": 3}', "^here: .* TextEncoderConfig; unknown: widht; missing: vocabulary_size$"),
        ("[]", "^here: expected a JSON object, got list$"),
        ("{", "^here: not valid JSON"),
        ('{"vocabulary_size": 3, "vocabulary_size": 4}', "'vocabulary_size' occurs twice"),
        ('{"vocabulary_size": "3"}', "^here: vocabulary_size must be a positive int, got .*'3'$"),
        ('{"vocabulary_size": 3, "dtype": "int4"}', "^here: dtype must be a float dtype"),
    ],
)
def test_wrong_documents_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(TextEncoderConfig, text, source="here")


def test_a_wrong_type_that_breaks_the_class_is_named():
    text = json.loads(config_to_json(MMDIT_PRESETS["tiny"])) | {"dual_attention_layers": 3}
    with pytest.raises(ValueError, match=r"^here: 'int' object is not iterable"):
        config_from_json(MMDiTConfig, json.dumps(text), source="here")


@pytest.mark.parametrize("config", [{"a": 1}, TextEncoderConfig])
def test_only_instances_of_dataclasses_are_written(config):
    with pytest.raises(TypeError, match="config must be an instance of a dataclass"):
        config_to_json(config)
