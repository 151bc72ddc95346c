"""Block-sparse image operations on PyTorch tensors.

The ops are those of :mod:`sbnet_cupy` with PyTorch's conventions: images and stacks are ``[N, C, H, W]``, in any memory
format, and never copied on their way; work runs on PyTorch's current stream; memory comes from its allocator; autograd,
``torch.compile``, CUDA graphs and autocast take them as they take PyTorch's own.
"""

from .._reduce_mask import BlockIndices
from ._block_sparse import BlockSparse
from ._bottleneck import SparseBottleneck
from ._conv import SparseConv2d
from ._gather import sparse_gather
from ._grid import SparseBlockGrid
from ._reduce_mask import reduce_mask
from ._scatter import sparse_scatter, sparse_scatter_

__all__ = [
    "BlockIndices",
    "BlockSparse",
    "SparseBlockGrid",
    "SparseBottleneck",
    "SparseConv2d",
    "reduce_mask",
    "sparse_gather",
    "sparse_scatter",
    "sparse_scatter_",
]
