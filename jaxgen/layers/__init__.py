"""Small `flax.nnx` modules of which the models are made; each works on its own."""

from jaxgen.layers.attention import AttentionName as AttentionName
from jaxgen.layers.attention import HeadProjections as HeadProjections
from jaxgen.layers.attention import JointAttention as JointAttention
from jaxgen.layers.attention import SelfAttention as SelfAttention
from jaxgen.layers.attention import attention_function as attention_function
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
