"""Attention for training and sampling: arrays in, arrays out.

Importable on its own: it needs JAX and nothing else of jaxgen.
"""

from kernels_pallas.sage_attention import sage_attention as sage_attention

__all__ = ["sage_attention"]
