"""One file for each architecture: its configuration, its module and its named presets."""

from jaxgen.models.attribute_classifier import AttributeClassifier as AttributeClassifier
from jaxgen.models.attribute_classifier import (
    AttributeClassifierConfig as AttributeClassifierConfig,
)
from jaxgen.models.mmdit import MMDIT_PRESETS as MMDIT_PRESETS
from jaxgen.models.mmdit import MMDiT as MMDiT
from jaxgen.models.mmdit import MMDiTBlock as MMDiTBlock
from jaxgen.models.mmdit import MMDiTConfig as MMDiTConfig
from jaxgen.models.text_encoder import TextEncoder as TextEncoder
from jaxgen.models.text_encoder import TextEncoderConfig as TextEncoderConfig
from jaxgen.models.wan import WAN_PRESETS as WAN_PRESETS
from jaxgen.models.wan import Wan as Wan
from jaxgen.models.wan import WanBlock as WanBlock
from jaxgen.models.wan import WanConfig as WanConfig
