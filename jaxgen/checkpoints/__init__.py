"""Weights in safetensors files and configurations in JSON; nothing is ever unpickled."""

from jaxgen.checkpoints.autoencoder import (
    autoencoder_config_from_json as autoencoder_config_from_json,
)
from jaxgen.checkpoints.autoencoder import autoencoder_config_to_json as autoencoder_config_to_json
from jaxgen.checkpoints.autoencoder import (
    autoencoder_from_single_file as autoencoder_from_single_file,
)
from jaxgen.checkpoints.autoencoder import autoencoder_shapes as autoencoder_shapes
from jaxgen.checkpoints.autoencoder import export_autoencoder as export_autoencoder
from jaxgen.checkpoints.autoencoder import load_autoencoder as load_autoencoder
from jaxgen.checkpoints.autoencoder import load_autoencoder_folder as load_autoencoder_folder
from jaxgen.checkpoints.autoencoder import save_autoencoder_folder as save_autoencoder_folder
from jaxgen.checkpoints.configs import config_from_json as config_from_json
from jaxgen.checkpoints.configs import config_to_json as config_to_json
from jaxgen.checkpoints.decoder_sharding import decoder_sharding as decoder_sharding
from jaxgen.checkpoints.diffusion_lm import diffusion_lm_shapes as diffusion_lm_shapes
from jaxgen.checkpoints.diffusion_lm import export_diffusion_lm as export_diffusion_lm
from jaxgen.checkpoints.diffusion_lm import load_diffusion_lm as load_diffusion_lm
from jaxgen.checkpoints.diffusion_lm import load_diffusion_lm_folder as load_diffusion_lm_folder
from jaxgen.checkpoints.diffusion_lm import save_diffusion_lm_folder as save_diffusion_lm_folder
from jaxgen.checkpoints.diffusion_lm_configs import (
    diffusion_lm_config_from_json as diffusion_lm_config_from_json,
)
from jaxgen.checkpoints.diffusion_lm_configs import (
    diffusion_lm_config_to_json as diffusion_lm_config_to_json,
)
from jaxgen.checkpoints.files import parse_json_object as parse_json_object
from jaxgen.checkpoints.files import write_atomically as write_atomically
from jaxgen.checkpoints.files import write_json as write_json
from jaxgen.checkpoints.flat import export_flat as export_flat
from jaxgen.checkpoints.flat import flat_shapes as flat_shapes
from jaxgen.checkpoints.flat import load_flat as load_flat
from jaxgen.checkpoints.mmdit import export_mmdit as export_mmdit
from jaxgen.checkpoints.mmdit import load_mmdit as load_mmdit
from jaxgen.checkpoints.mmdit import mmdit_shapes as mmdit_shapes
from jaxgen.checkpoints.mmdit_folder import load_mmdit_folder as load_mmdit_folder
from jaxgen.checkpoints.mmdit_folder import mmdit_config_from_json as mmdit_config_from_json
from jaxgen.checkpoints.mmdit_folder import mmdit_config_to_json as mmdit_config_to_json
from jaxgen.checkpoints.mmdit_folder import save_mmdit_folder as save_mmdit_folder
from jaxgen.checkpoints.mmdit_single_file import load_mmdit_single_file as load_mmdit_single_file
from jaxgen.checkpoints.mmdit_single_file import mmdit_from_single_file as mmdit_from_single_file
from jaxgen.checkpoints.placement import Placement as Placement
from jaxgen.checkpoints.placement import Progress as Progress
from jaxgen.checkpoints.safetensors_files import check_arrays as check_arrays
from jaxgen.checkpoints.safetensors_files import load_safetensors as load_safetensors
from jaxgen.checkpoints.safetensors_files import read_safetensors_header as read_safetensors_header
from jaxgen.checkpoints.safetensors_files import save_safetensors as save_safetensors
from jaxgen.checkpoints.safetensors_format import Header as Header
from jaxgen.checkpoints.text_encoder_configs import (
    clip_text_config_from_json as clip_text_config_from_json,
)
from jaxgen.checkpoints.text_encoder_configs import (
    clip_text_config_to_json as clip_text_config_to_json,
)
from jaxgen.checkpoints.text_encoder_configs import t5_config_from_json as t5_config_from_json
from jaxgen.checkpoints.text_encoder_configs import t5_config_to_json as t5_config_to_json
from jaxgen.checkpoints.text_encoders import clip_text_shapes as clip_text_shapes
from jaxgen.checkpoints.text_encoders import export_clip_text as export_clip_text
from jaxgen.checkpoints.text_encoders import export_t5 as export_t5
from jaxgen.checkpoints.text_encoders import load_clip_text as load_clip_text
from jaxgen.checkpoints.text_encoders import load_clip_text_folder as load_clip_text_folder
from jaxgen.checkpoints.text_encoders import load_t5 as load_t5
from jaxgen.checkpoints.text_encoders import load_t5_folder as load_t5_folder
from jaxgen.checkpoints.text_encoders import save_clip_text_folder as save_clip_text_folder
from jaxgen.checkpoints.text_encoders import save_t5_folder as save_t5_folder
from jaxgen.checkpoints.text_encoders import t5_shapes as t5_shapes
from jaxgen.checkpoints.text_encoders_single_file import (
    SingleFileTextEncoders as SingleFileTextEncoders,
)
from jaxgen.checkpoints.text_encoders_single_file import (
    text_encoders_from_single_file as text_encoders_from_single_file,
)
from jaxgen.checkpoints.wan import export_wan as export_wan
from jaxgen.checkpoints.wan import load_wan as load_wan
from jaxgen.checkpoints.wan import load_wan_folder as load_wan_folder
from jaxgen.checkpoints.wan import save_wan_folder as save_wan_folder
from jaxgen.checkpoints.wan import wan_config_from_json as wan_config_from_json
from jaxgen.checkpoints.wan import wan_config_to_json as wan_config_to_json
from jaxgen.checkpoints.wan import wan_shapes as wan_shapes
