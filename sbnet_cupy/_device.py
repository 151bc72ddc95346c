"""The modules that need CuPy, imported when a call with its arrays first asks for them."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def transfer() -> ModuleType:
    """The host side of gather and scatter."""
    from . import _transfer

    return _transfer


@functools.cache
def pooling() -> ModuleType:
    """The host side of ``reduce_mask``."""
    from . import _pooling

    return _pooling
