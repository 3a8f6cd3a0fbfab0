"""INT8 attention that trains (SageBwd)."""

from kernels_pallas.sage_attention.api import explain as explain
from kernels_pallas.sage_attention.api import sage_attention as sage_attention
