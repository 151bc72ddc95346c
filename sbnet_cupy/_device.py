"""The modules that need CuPy, imported when a call with its arrays first asks for them."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import numpy as np


@functools.cache
def transfer() -> ModuleType:
    """The host side of gather and scatter."""
    from . import _transfer

    return _transfer


@functools.cache
def memory(xp: ModuleType) -> ModuleType:
    """New arrays and copies of whole ones, of CuPy; or of NumPy, in a module that does not need CuPy."""
    return importlib.import_module(f"{__package__}.{'_host_memory' if xp is np else '_memory'}")


@functools.cache
def pooling() -> ModuleType:
    """The host side of ``reduce_mask``."""
    from . import _pooling

    return _pooling


@functools.cache
def activation() -> ModuleType:
    """The host side of the element-wise step on stacks."""
    from . import _activate

    return _activate


@functools.cache
def stack_conv(engine: str) -> ModuleType:
    """The convolution of stacks by an engine: "cublas" or "cudnn"."""
    return importlib.import_module(f"{__package__}._stack_conv_{engine}")


@functools.cache
def fused() -> ModuleType:
    """The host side of the fused convolution and bottleneck."""
    from . import _fused

    return _fused
