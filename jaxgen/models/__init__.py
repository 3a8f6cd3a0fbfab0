"""One file for each architecture: its configuration, its module and its named presets."""

from jaxgen.models.attribute_classifier import AttributeClassifier as AttributeClassifier
from jaxgen.models.attribute_classifier import (
    AttributeClassifierConfig as AttributeClassifierConfig,
)
from jaxgen.models.autoencoder import Autoencoder as Autoencoder
from jaxgen.models.autoencoder_config import AUTOENCODER_PRESETS as AUTOENCODER_PRESETS
from jaxgen.models.autoencoder_config import AutoencoderConfig as AutoencoderConfig
from jaxgen.models.clip_text import CLIP_TEXT_PRESETS as CLIP_TEXT_PRESETS
from jaxgen.models.clip_text import CLIPText as CLIPText
from jaxgen.models.clip_text import CLIPTextConfig as CLIPTextConfig
from jaxgen.models.clip_text import CLIPTextOutput as CLIPTextOutput
from jaxgen.models.diffusion_lm import DIFFUSION_LM_PRESETS as DIFFUSION_LM_PRESETS
from jaxgen.models.diffusion_lm import DiffusionLM as DiffusionLM
from jaxgen.models.diffusion_lm import DiffusionLMConfig as DiffusionLMConfig
from jaxgen.models.language_model import LANGUAGE_MODEL_PRESETS as LANGUAGE_MODEL_PRESETS
from jaxgen.models.language_model import LanguageModel as LanguageModel
from jaxgen.models.language_model import LanguageModelConfig as LanguageModelConfig
from jaxgen.models.mmdit import MMDIT_PRESETS as MMDIT_PRESETS
from jaxgen.models.mmdit import MMDiT as MMDiT
from jaxgen.models.mmdit import MMDiTBlock as MMDiTBlock
from jaxgen.models.mmdit import MMDiTConfig as MMDiTConfig
from jaxgen.models.sd3_text import SD3Text as SD3Text
from jaxgen.models.sd3_text import SD3TextOutput as SD3TextOutput
from jaxgen.models.sd3_text import join_sd3_text as join_sd3_text
from jaxgen.models.t5_encoder import T5_PRESETS as T5_PRESETS
from jaxgen.models.t5_encoder import T5Encoder as T5Encoder
from jaxgen.models.t5_encoder import T5EncoderConfig as T5EncoderConfig
from jaxgen.models.text_encoder import TextEncoder as TextEncoder
from jaxgen.models.text_encoder import TextEncoderConfig as TextEncoderConfig
from jaxgen.models.wan import WAN_PRESETS as WAN_PRESETS
from jaxgen.models.wan import Wan as Wan
from jaxgen.models.wan import WanBlock as WanBlock
from jaxgen.models.wan import WanConfig as WanConfig
