"""Block-sparse image operations on CuPy and NumPy arrays.

A mask is reduced to the list of its active blocks, those blocks are gathered into a dense stack, any dense operation
runs on the stack, and the results are scattered back.
"""

from ._bottleneck import res_block_bottleneck, sparse_res_block_bottleneck
from ._bottleneck_weights import BottleneckWeights, fold_batch_norm
from ._conv import conv2d, sparse_conv2d
from ._conv_geometry import BlockParams, calc_block_params, calc_block_params_res_block
from ._gather import sparse_gather
from ._grad import ScatterGrad, sparse_gather_grad, sparse_scatter_grad
from ._jit import KernelCompileError, build_at_import
from ._pack_weights import PackedBottleneck, pack_weights
from ._packing import PackedWeights
from ._precompile import SparseCall, precompile
from ._reduce_mask import BlockIndices, block_indices, reduce_mask
from ._scatter import sparse_scatter, sparse_scatter_var
from ._tune import BlockCandidate, BlockTuning, tune_block_size

__version__ = "0.1.0"

__all__ = [
    "BlockCandidate",
    "BlockIndices",
    "BlockParams",
    "BlockTuning",
    "BottleneckWeights",
    "KernelCompileError",
    "PackedBottleneck",
    "PackedWeights",
    "ScatterGrad",
    "SparseCall",
    "block_indices",
    "calc_block_params",
    "calc_block_params_res_block",
    "conv2d",
    "fold_batch_norm",
    "pack_weights",
    "precompile",
    "reduce_mask",
    "res_block_bottleneck",
    "sparse_conv2d",
    "sparse_gather",
    "sparse_gather_grad",
    "sparse_res_block_bottleneck",
    "sparse_scatter",
    "sparse_scatter_grad",
    "sparse_scatter_var",
    "tune_block_size",
]

build_at_import()
del build_at_import
