"""Sparse-linear attention with a learnable router (SLA2)."""

from kernels_pallas.sparse_linear_attention.api import (
    explain_sparse_linear_attention as explain_sparse_linear_attention,
)
from kernels_pallas.sparse_linear_attention.api import (
    resize_mixing_logits as resize_mixing_logits,
)
from kernels_pallas.sparse_linear_attention.api import (
    sparse_linear_attention as sparse_linear_attention,
)
from kernels_pallas.sparse_linear_attention.soft_topk import soft_topk_logits as soft_topk_logits
