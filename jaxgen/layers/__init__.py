"""Small `flax.nnx` modules of which the models are made; each works on its own."""

from jaxgen.layers.attention import AttentionName as AttentionName
from jaxgen.layers.attention import HeadProjections as HeadProjections
from jaxgen.layers.attention import JointAttention as JointAttention
from jaxgen.layers.attention import KeyValues as KeyValues
from jaxgen.layers.attention import SelfAttention as SelfAttention
from jaxgen.layers.attention import attention_function as attention_function
from jaxgen.layers.attention import exact_attention as exact_attention
from jaxgen.layers.block_diffusion_attention import (
    block_diffusion_attention as block_diffusion_attention,
)
from jaxgen.layers.block_diffusion_attention import block_diffusion_mask as block_diffusion_mask
from jaxgen.layers.decoder_block import Attend as Attend
from jaxgen.layers.decoder_block import DecoderBlock as DecoderBlock
from jaxgen.layers.decoder_block import DecoderShape as DecoderShape
from jaxgen.layers.decoder_block import GroupedQueryAttention as GroupedQueryAttention
from jaxgen.layers.decoder_block import SwiGLU as SwiGLU
from jaxgen.layers.decoder_block import linear_of as linear_of
from jaxgen.layers.decoder_block import norm_of as norm_of
from jaxgen.layers.embeddings import PatchEmbedding as PatchEmbedding
from jaxgen.layers.embeddings import PositionTable as PositionTable
from jaxgen.layers.embeddings import TimestepTextEmbedding as TimestepTextEmbedding
from jaxgen.layers.embeddings import patchify as patchify
from jaxgen.layers.embeddings import position_table as position_table
from jaxgen.layers.embeddings import sinusoid as sinusoid
from jaxgen.layers.embeddings import unpatchify as unpatchify
from jaxgen.layers.mlp import ConditionEmbedding as ConditionEmbedding
from jaxgen.layers.mlp import FeedForward as FeedForward
from jaxgen.layers.modulation import AdaLNScaleShift as AdaLNScaleShift
from jaxgen.layers.modulation import AdaLNZero as AdaLNZero
from jaxgen.layers.modulation import Modulation as Modulation
from jaxgen.layers.modulation import add_gated as add_gated
from jaxgen.layers.modulation import modulate as modulate
from jaxgen.layers.norms import GroupNorm as GroupNorm
from jaxgen.layers.norms import LayerNorm as LayerNorm
from jaxgen.layers.norms import RMSNorm as RMSNorm
from jaxgen.layers.norms import layer_norm as layer_norm
from jaxgen.layers.rotary import Rotary as Rotary
from jaxgen.layers.rotary import rotate as rotate
from jaxgen.layers.rotary import rotate_halves as rotate_halves
from jaxgen.layers.rotary import text_rotary as text_rotary
from jaxgen.layers.rotary import video_axis_dims as video_axis_dims
from jaxgen.layers.rotary import video_rotary as video_rotary
from jaxgen.layers.scan import scan_blocks as scan_blocks
from jaxgen.layers.sla1_attention import ProjectionParam as ProjectionParam
from jaxgen.layers.sla1_attention import SLA1Attention as SLA1Attention
from jaxgen.layers.sla1_attention import sla1_from_turbodiffusion as sla1_from_turbodiffusion
from jaxgen.layers.sla1_attention import sla1_to_turbodiffusion as sla1_to_turbodiffusion
from jaxgen.layers.sparse_linear_attention import ALL_SPARSE as ALL_SPARSE
from jaxgen.layers.sparse_linear_attention import MixingParam as MixingParam
from jaxgen.layers.sparse_linear_attention import RouterParam as RouterParam
from jaxgen.layers.sparse_linear_attention import Settings as Settings
from jaxgen.layers.sparse_linear_attention import SparseLinearAttention as SparseLinearAttention
from jaxgen.layers.sparse_linear_attention import mixing_of_sums as mixing_of_sums
