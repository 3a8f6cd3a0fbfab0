"""What the Mosaic GPU kernels share: INT8 products on tensor cores, and the interpreter."""

from kernels_pallas.mosaic.interpreter import interpreted as interpreted
from kernels_pallas.mosaic.interpreter import interpreting as interpreting
