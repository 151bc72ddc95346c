"""``BlockSparse``: runs an ordinary network on the active tiles."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._grid import NO_MARGIN, Margin, SparseBlockGrid, crop
from ._trace import FUNCTIONS, Step, Value, read_chain, replace_values


class BlockSparse(torch.nn.Module):
    """Runs an ordinary chain of layers on active tiles only, exactly as the whole images there.

    It takes ``torch.nn.Conv2d`` of stride 1 with ``'same'`` padding and any dilation and groups, ``BatchNorm2d`` in
    eval mode, activations, and residual additions and concatenations of channels; it reads them with ``torch.fx``, and
    works out how many pixels around a tile the chain sees. Tiles are gathered with that margin. Before each convolution
    that reads beyond the image, what lies there becomes 0, as where a dense network pads.

    Parameters
    ----------
    module : torch.nn.Module
        The chain: one tensor ``[N, C, H, W]`` in, one ``[N, K, H, W]`` out. It stays the owner of its parameters, and
        is the submodule ``module``.
    bsize : int or (int, int)
        Pixels of a tile, without margin, where a mask is given instead of a grid.
    capacity : int, optional
        Number of tiles that there is room for, where a mask is given. With it, nothing waits for the device.

    Raises
    ------
    ValueError
        For a layer that needs more than some pixels around a tile (pooling, attention, a stride, a norm over the
        image): the message names it.

    Notes
    -----
    In active tiles the result equals that of `module`, borders of the image included, up to the rounding of sums in
    another order. Gradients flow. Work runs on PyTorch's current stream, in PyTorch's own layers between one gather and
    one scatter.

    The margin costs: tiles of t pixels with a margin of m on each side take ``((t + 2*m)/t)**2`` as much work in
    the first layer. Wrap a few layers at a time, and take larger tiles for deeper chains.

    Examples
    --------
    >>> import torch
    >>> from sbnet_cupy.torch import BlockSparse
    >>> stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> sparse = BlockSparse(stem.eval(), bsize=16)
    >>> sparse.margin
    Margin(top=1, bottom=1, left=1, right=1)
    >>> x, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64)
    >>> mask[0, 20, 30] = 1
    >>> y = sparse(x, mask)
    >>> torch.allclose(y[:, :, 16:32, 16:32], stem(x)[:, :, 16:32, 16:32], atol=1e-5)
    True
    """

    def __init__(
        self, module: torch.nn.Module, bsize: int | tuple[int, int] = 16, *, capacity: int | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.bsize = bsize
        self.capacity = capacity
        self._steps = read_chain(module)
        #: Steps that read beyond the image what is not 0 there already, and how far all of them do.
        self._masked = {
            number: step.reach
            for number, step in enumerate(self._steps)
            if step.pad and not self._steps[step.reads[0]].zero_outside
        }
        self._most_masked = functools.reduce(Margin.union, self._masked.values(), NO_MARGIN)

    @property
    def margin(self) -> Margin:
        """Pixels around a tile that the chain sees."""
        return self._steps[0].margin

    def forward(self, x: Tensor, active: Tensor | SparseBlockGrid, base: Tensor | None = None) -> Tensor:
        """Run the chain on the active tiles.

        Parameters
        ----------
        x : Tensor, shape (N, C, H, W)
            Images, in any memory format.
        active : SparseBlockGrid or Tensor
            The active tiles, or a mask ``[N, H, W]`` or ``[N, 1, H, W]`` to find them with.
        base : Tensor, shape (N, K, H, W), optional
            The result outside of active tiles, 0 where it is None; not changed.

        Returns
        -------
        Tensor, shape (N, K, H, W)

        Raises
        ------
        ValueError
            For a batch norm or a dropout in training mode, whose work depends on all pixels.
        """
        grid = active
        if isinstance(active, Tensor):
            grid = SparseBlockGrid.from_mask(active, self.bsize, capacity=self.capacity)
        grid.check("x", x)
        if base is not None:
            grid.check("base", base)
        tiles = self._run(x, grid)
        return grid.onto_zeros(tiles) if base is None else grid.scatter(tiles, base)

    def _run(self, x: Tensor, grid: SparseBlockGrid) -> Tensor:
        """The result of the last step."""
        tiles: dict[int, Tensor] = {}
        outside = ~grid.inside(self._most_masked) if self._masked else None
        for number, step in enumerate(self._steps):
            if step.kind == "input":
                tiles[number] = grid.gather(x, step.margin)
                continue

            def take(value: Value, wanted: Margin = step.reach) -> Tensor:
                return crop(tiles[value.step], self._steps[value.step].margin, wanted)

            arguments = replace_values(step.arguments, take)
            if outside is not None and number in self._masked:
                arguments = (arguments[0].masked_fill(crop(outside, self._most_masked, step.reach), 0),)
            tiles[number] = self._apply_step(step, arguments, replace_values(dict(step.options), take))
            for source in step.done:
                del tiles[source]
        return tiles[len(self._steps) - 1]

    def _apply_step(self, step: Step, arguments: Any, options: dict[str, Any]) -> Tensor:
        if step.kind == "function":
            return FUNCTIONS[step.target].call(*arguments, **options)
        layer = self.module.get_submodule(step.target)
        if step.kind == "conv":
            return torch.nn.functional.conv2d(*arguments, layer.weight, layer.bias, 1, 0, layer.dilation, layer.groups)
        if step.kind in ("norm", "drop") and layer.training:
            raise ValueError(f"{step.target}: expected eval mode on active tiles, got {layer} in training mode")
        return layer(*arguments, **options)
