"""Block-sparse image operations on CuPy and NumPy arrays.

A mask is reduced to the list of its active blocks, those blocks are gathered into a dense stack, any dense operation
runs on the stack, and the results are scattered back.
"""

from ._gather import sparse_gather
from ._jit import KernelCompileError, build_at_import, precompile
from ._reduce_mask import BlockIndices, reduce_mask
from ._scatter import sparse_scatter, sparse_scatter_var

__version__ = "0.1.0"

__all__ = [
    "BlockIndices",
    "KernelCompileError",
    "precompile",
    "reduce_mask",
    "sparse_gather",
    "sparse_scatter",
    "sparse_scatter_var",
]

build_at_import()
del build_at_import
