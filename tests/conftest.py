"""Strict settings for every test: four fake devices, no implicit promotion, warnings are errors."""

import gc
import os
from pathlib import Path

# The kernels' interpreter calls Python from every simulated thread; with as many threads as two
# cores give, XLA's pool can run out of them. XLA reads this when it is loaded.
os.environ.setdefault("NPROC", "16")

import jax

# Rasterized emoji stay between test runs, and the home folder is left alone.
os.environ.setdefault("JAXGEN_CACHE", str(Path(__file__).parent.parent / ".jaxgen_cache"))


def pytest_configure(config):
    """Run on the CPU, unless GPU tests were asked for (`pytest -m gpu`)."""
    if config.option.markexpr != "gpu":
        # Tests spend their time in the compiler, not in what it makes. Read with the first use.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_runtest_teardown(item, nextitem):
    """Forget compiled programs after each file.

    XLA maps memory for every one. Linux allows a process 65,530 mappings, of which a worker that
    keeps all programs of this suite uses more than 60,000; beyond them XLA crashes.
    """
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
