"""Which tests need a CUDA device, how many processes run them, and how many examples Hypothesis tries.

Environment variables
---------------------
SBNET_CUPY_REQUIRE_GPU
    ``1``: without a usable CUDA device the run fails, instead of skipping the tests that need one.
SBNET_CUPY_TEST_ALL
    ``1``: every mutant, and every block size for every generation of GPUs, of which there are samples by default.
HYPOTHESIS_PROFILE
    ``default``, ``ci`` (the same examples in every run; the default where ``CI`` is set) or ``thorough``.
"""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several processes that wait for each other make NumPy's products several times as slow, and PyTorch's
    # ops more than that. The two read this when they are imported, which is later.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# JAX would take three quarters of a device's memory when it first uses it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# No deadlines: the first call on a device compiles a kernel.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


@functools.cache
def no_device() -> str:
    """Return why there is no usable CUDA device: empty where there is one."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy is missing or broken, or the driver is missing or too old
        return f"no CUDA device: {type(error).__name__}: {' '.join(str(error).split())}"
    return "" if count else "no CUDA device: none is visible"


def pytest_configure() -> None:
    """Refuse to run without a device where one is required."""
    if os.environ.get("SBNET_CUPY_REQUIRE_GPU") == "1" and no_device():
        raise pytest.UsageError(f"SBNET_CUPY_REQUIRE_GPU=1, but {no_device()}")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes ``-n auto`` starts: none where there is a device, which tests time and fill."""
    return min(4, os.cpu_count() or 1) if no_device() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no device."""
    for item in items:
        if item.get_closest_marker("gpu") and no_device():
            item.add_marker(pytest.mark.skip(reason=no_device()))
