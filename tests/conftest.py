"""Four CPU devices and strict numerics, set before any test or doctest runs.

Most of a test's time is compilation: it does without most optimizations, which
``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` brings back, and programs that took long to compile
are kept beside pytest's own cache. Processes that tests start inherit both.
"""

import gc
import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

gc.set_threshold(50_000)  # JAX makes many objects, and little garbage

import jax  # noqa: E402 (reads the environment)
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget():
    """What a module compiled, the next hardly needs; all of it would fill 4 GB."""
    yield
    jax.clear_caches()
