"""What `import jaxgen` costs and offers."""

import subprocess
import sys

import jaxgen

PROGRAM = """
import time
import jax, flax.nnx
start = time.process_time()
import jaxgen
print(time.process_time() - start)
"""


def test_import_costs_little_beyond_jax_and_flax():
    seconds = float(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True))
    assert seconds <= 0.7


def test_the_notebook_names():
    assert jaxgen.__all__ == ["MMDiT", "MMDiTConfig", "TextToImage", "image_grid", "sage_attention"]
    assert all(hasattr(jaxgen, name) for name in jaxgen.__all__)
