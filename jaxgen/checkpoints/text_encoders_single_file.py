"""The text encoders of Stable Diffusion 3 in its original single files.

Each has the keys of the transformers library below `text_encoders.NAME.transformer.`. CLIP-L's
pooled vector is used as it is, without a projection: here that of an identity matrix, as in the
folders of diffusers, whatever projection the file has.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgen.checkpoints.text_encoders import load_clip_text, load_t5
from jaxgen.models.clip_text import CLIP_TEXT_PRESETS, CLIPText, CLIPTextConfig
from jaxgen.models.t5_encoder import T5_PRESETS, T5Encoder, T5EncoderConfig

_PREFIX = "text_encoders."
_NAMES = ("clip_l", "clip_g", "t5xxl")
_PROJECTION = "text_projection.weight"


class SingleFileTextEncoders(NamedTuple):
    """The text encoders that a single file holds, None where it has none.

    Attributes:
        clip_l: CLIP ViT-L/14, whose pooled vector is not projected.
        clip_g: OpenCLIP ViT-bigG/14.
        t5: the encoder of T5 XXL.
    """

    clip_l: CLIPText | None
    clip_g: CLIPText | None
    t5: T5Encoder | None


def text_encoders_from_single_file(
    arrays: Mapping[str, Any],
    source: str = "arrays",
    *,
    clip_l: CLIPTextConfig = CLIP_TEXT_PRESETS["clip-l"],
    clip_g: CLIPTextConfig = CLIP_TEXT_PRESETS["clip-g"],
    t5: T5EncoderConfig = T5_PRESETS["t5-xxl"],
) -> SingleFileTextEncoders:
    """Makes the text encoders from weights in the layout of the original single files.

    Args:
        arrays: the weights by original key; those that do not start with `text_encoders.` are
            other parts and are passed over, and so are the scales of CLIP's logits.
        source: what to call the arrays in an error, for example the path of their file.
        clip_l: configuration of CLIP-L, which such files do not tell; floats are converted to its
            `param_dtype`.
        clip_g: likewise, of CLIP-G.
        t5: likewise, of T5.

    Returns:
        The encoders that are there: some files have no T5, or none at all.

    Raises:
        ValueError: keys below `text_encoders.` of no encoder; missing, unused or misshapen arrays
            of an encoder that is there, all listed.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in _NAMES}
    strangers = []
    for key in sorted(arrays):
        if not key.startswith(_PREFIX):
            continue
        name, _, rest = key.removeprefix(_PREFIX).partition(".")
        if name in found and rest.startswith("transformer."):
            found[name][rest.removeprefix("transformer.")] = arrays[key]
        elif name not in ("clip_l", "clip_g") or rest != "logit_scale":
            strangers.append(key)
    if strangers:
        shown = ", ".join(strangers[:20]) + (" and more" if len(strangers) > 20 else "")
        raise ValueError(
            f"{source}: keys of no text encoder of Stable Diffusion 3 ({len(strangers)}): {shown}"
        )
    if found["clip_l"]:
        found["clip_l"][_PROJECTION] = np.eye(clip_l.projection_dim, clip_l.width, dtype=np.float32)
    where = {name: f"{source}: {_PREFIX}{name}.transformer" for name in _NAMES}
    of_l, of_g, of_t5 = (found[name] for name in _NAMES)
    return SingleFileTextEncoders(
        load_clip_text(clip_l, of_l, where["clip_l"]) if of_l else None,
        load_clip_text(clip_g, of_g, where["clip_g"]) if of_g else None,
        load_t5(t5, of_t5, where["t5xxl"]) if of_t5 else None,
    )
