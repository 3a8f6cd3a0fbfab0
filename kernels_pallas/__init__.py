"""Attention for training and sampling: arrays in, arrays out.

Importable on its own: it needs JAX and nothing else of jaxgen.
"""

from kernels_pallas.sage_attention import explain as explain
from kernels_pallas.sage_attention import sage_attention as sage_attention

__all__ = ["explain", "sage_attention"]
