"""Attention for training and sampling: arrays in, arrays out.

Importable on its own: it needs JAX and nothing else of jaxgen.
"""

from kernels_pallas.sage_attention import explain as explain
from kernels_pallas.sage_attention import sage_attention as sage_attention
from kernels_pallas.sparse_linear_attention import (
    explain_sparse_linear_attention as explain_sparse_linear_attention,
)
from kernels_pallas.sparse_linear_attention import resize_mixing_logits as resize_mixing_logits
from kernels_pallas.sparse_linear_attention import soft_topk_logits as soft_topk_logits
from kernels_pallas.sparse_linear_attention import (
    sparse_linear_attention as sparse_linear_attention,
)

__all__ = [
    "explain",
    "explain_sparse_linear_attention",
    "resize_mixing_logits",
    "sage_attention",
    "soft_topk_logits",
    "sparse_linear_attention",
]
