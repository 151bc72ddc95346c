"""Layers on active tiles: against PyTorch's dense ones, in eval and in training."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch_cases import lay_out, on_devices, random_mask, random_state, random_tensor  # noqa: E402

import sbnet_cupy  # noqa: E402
from sbnet_cupy.torch import (  # noqa: E402
    SparseBlockGrid,
    SparseBottleneck,
    SparseConv2d,
    _bottleneck,
    _conv,
    _packing,
    sparse_gather,
)
from sbnet_cupy.torch._grid import Margin  # noqa: E402

functional = torch.nn.functional


@pytest.fixture(autouse=True)
def _ieee_float32() -> Any:
    """Without TF32, sums differ by the rounding of float32 alone."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def make_grid(device: Any, *, seed: int = 0, capacity: int | None = None, density: float = 0.3) -> Any:
    """Of images whose last tiles hang over two edges."""
    mask = random_mask(2, 21, 30, density, seed, device)
    return SparseBlockGrid.from_mask(mask, 8, capacity=capacity)


def near(found: Any, expected: Any, where: Any) -> None:
    """Raise unless the two agree up to rounding in the pixels `where`, of which there are some."""
    where = where.expand_as(expected)
    assert where.any()
    torch.testing.assert_close(torch.where(where, found, 0), torch.where(where, expected, 0), rtol=1e-4, atol=1e-4)


class DenseBottleneck(torch.nn.Module):
    """As a user's dense network has it."""

    def __init__(self, channels: int, inner: int, out: int | None = None, ksize: int = 3) -> None:
        super().__init__()
        out = channels if out is None else out
        self.bn1, self.conv1 = torch.nn.BatchNorm2d(channels), torch.nn.Conv2d(channels, inner, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(inner)
        self.conv2 = torch.nn.Conv2d(inner, inner, ksize, padding=ksize // 2, bias=False)
        self.bn3, self.conv3 = torch.nn.BatchNorm2d(inner), torch.nn.Conv2d(inner, out, 1, bias=False)
        if out != channels:
            self.shortcut = torch.nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Any) -> Any:
        y = self.conv1(functional.relu(self.bn1(x)))
        y = self.conv2(functional.relu(self.bn2(y)))
        y = self.conv3(functional.relu(self.bn3(y)))
        return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class TestGrid:
    @on_devices
    def test_tiles(self, device: str) -> None:
        mask = random_mask(2, 21, 30, device=device)
        grid = SparseBlockGrid.from_mask(mask[:, None], (8, 8))
        assert (grid.batch, grid.size, grid.tile) == (2, (21, 30), (8, 8))
        assert torch.equal(grid.pixels()[:, 0], mask)  # which is of whole tiles
        wide = SparseBlockGrid.from_mask(mask, 8, reach=1)
        grown = functional.max_pool2d(mask[:, None].float(), 3, 1, 1) > 0
        assert bool((wide.pixels() >= grown).all())
        assert len(wide.rows.active_block_indices) > len(grid.rows.active_block_indices)

    @on_devices
    @pytest.mark.parametrize("capacity", [None, 5, 40])
    def test_what_lies_inside(self, device: str, capacity: int | None) -> None:
        grid = make_grid(device, capacity=capacity)
        for margin in (Margin(0, 0, 0, 0), Margin(1, 2, 0, 3)):
            ones = torch.ones(2, 1, 21, 30, device=device)
            expected = grid.gather(ones, margin) == 1
            assert torch.equal(grid.inside(margin), expected)
            torch._dynamo.reset()
            compiled = torch.compile(lambda grid, margin=margin: grid.inside(margin), backend="eager", fullgraph=True)
            assert torch.equal(compiled(grid), expected)

    @on_devices
    def test_gather_and_scatter(self, device: str) -> None:
        grid, x = make_grid(device), random_tensor(2, 3, 21, 30, device=device)
        stack = grid.gather(x, Margin(1, 2, 0, 3))
        rows = grid.rows.bin_counts, grid.rows.active_block_indices
        assert torch.equal(stack, sparse_gather(x, *rows, bsize=(11, 11), boffset=(-1, 0), bstride=(8, 8)))
        assert torch.equal(grid.scatter(grid.gather(x), x * 2), torch.where(grid.pixels(), x, 2 * x))
        assert torch.equal(grid.onto_zeros(grid.gather(x)), torch.where(grid.pixels(), x, 0))
        tiles = grid.gather(x).double().requires_grad_()
        weights = random_tensor(2, 3, 21, 30, seed=1, dtype=torch.float64, device=device)
        (grid.onto_zeros(tiles) * weights).sum().backward()
        assert torch.equal(tiles.grad, grid.gather(weights))

    def test_errors(self) -> None:
        grid = make_grid("cpu")
        with pytest.raises(
            ValueError, match=re.escape("x: expected shape (2, C, 21, 30) like the mask's, got (2, 3, 2")
        ):
            grid.gather(torch.ones(2, 3, 20, 30))
        with pytest.raises(ValueError, match=re.escape("tile: expected two integers (height, width), each >= 1, got")):
            SparseBlockGrid.from_mask(torch.ones(1, 4, 4), 0)
        with pytest.raises(ValueError, match="mask: expected shape"):
            SparseBlockGrid.from_mask(torch.ones(1, 2, 4, 4), 2)


CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": (5, 3), "bias": False},
    {"kernel_size": 4},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "dilation": (2, 3)},
    {"kernel_size": 3, "groups": 2},
]


class TestConv:
    @on_devices
    @pytest.mark.parametrize("options", CONVS, ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_equals_the_dense_one(self, device: str, options: dict[str, Any], layout: str) -> None:
        dense = random_state(torch.nn.Conv2d(4, 6, **{"padding": "same", **options})).to(device)
        sparse = SparseConv2d(4, 6, **options).to(device)
        sparse.load_state_dict(dense.state_dict())
        x = lay_out(random_tensor(2, 4, 21, 30, device=device), layout).requires_grad_()
        base = random_tensor(2, 6, 21, 30, seed=1, device=device)
        for capacity in (None, 30):
            grid = make_grid(device, capacity=capacity)
            expected, where = dense(x), grid.pixels()
            results = [sparse(x, grid), sparse.eval()(x, grid)]
            with torch.no_grad():
                results += [sparse(x, grid), sparse.train()(x, grid)]
                onto = sparse(x, grid, base)
            for found in results:
                near(found, expected, where)
                assert bool((found[~where.expand_as(found)] == 0).all())
            near(onto, expected, where)
            assert torch.equal(torch.where(where, 0, onto), torch.where(where, 0, base))
            torch.testing.assert_close(sparse(x), expected)

    @on_devices
    def test_gradients_are_those_of_the_dense_one(self, device: str) -> None:
        dense = random_state(torch.nn.Conv2d(4, 6, 3, padding=1)).double().to(device)
        sparse = SparseConv2d(4, 6, 3, device=device, dtype=torch.float64)
        sparse.load_state_dict(dense.state_dict())
        grid = make_grid(device)
        weights = random_tensor(2, 6, 21, 30, seed=2, dtype=torch.float64, device=device) * grid.pixels()
        grads = []
        for module in (lambda x: sparse(x, grid), dense):
            x = random_tensor(2, 4, 21, 30, dtype=torch.float64, device=device).requires_grad_()
            (module(x) * weights).sum().backward()
            grads.append(x.grad)
        for found, expected in zip(
            [grads[0], *(p.grad for p in sparse.parameters())], [grads[1], *(p.grad for p in dense.parameters())]
        ):
            torch.testing.assert_close(found, expected)

    @on_devices
    def test_autocast(self, device: str) -> None:
        conv, grid = SparseConv2d(4, 6, 3, device=device), make_grid(device)
        x = random_tensor(2, 4, 21, 30, device=device)
        with torch.autocast(device, torch.bfloat16):
            trained = conv(x, grid)
            with torch.no_grad():
                inferred = conv(x, grid)
            assert trained.dtype == inferred.dtype == functional.conv2d(x, conv.weight).dtype
        torch.testing.assert_close(trained, inferred, rtol=2e-2, atol=2e-2)

    def test_errors(self) -> None:
        with pytest.raises(
            ValueError, match=r"SparseConv2d: expected 'same' padding, .* got padding \(0, 0\) for kernel"
        ):
            SparseConv2d(3, 4, 3, padding=0)
        conv, grid = SparseConv2d(3, 4, 3), make_grid("cpu")
        with pytest.raises(ValueError, match="x: expected shape"):
            conv(torch.ones(1, 3, 21, 30), grid)
        with pytest.raises(ValueError, match="base: expected shape"):
            conv(torch.ones(2, 3, 21, 30), grid, torch.ones(2, 4, 21, 31))

    def test_inference_goes_through_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        for name in ("sparse_conv2d", "sparse_res_block_bottleneck"):
            function = getattr(sbnet_cupy, name)
            monkeypatch.setattr(sbnet_cupy, name, lambda *a, n=name, f=function, **o: (calls.append(n), f(*a, **o))[1])
        x, grid = random_tensor(2, 4, 21, 30), make_grid("cpu")
        conv, block = SparseConv2d(4, 4, 3), SparseBottleneck(4, 2).eval()
        conv(x, grid)
        block(x, grid)
        assert calls == []
        with torch.inference_mode():
            conv(x, grid)
            block(x, grid)
        assert calls == ["sparse_conv2d", "sparse_res_block_bottleneck"]


class TestBottleneck:
    @on_devices
    @pytest.mark.parametrize("out", [None, 6])
    @pytest.mark.parametrize("ksize", [3, 5])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_eval_equals_the_dense_one(self, device: str, out: int | None, ksize: int, layout: str) -> None:
        dense = random_state(DenseBottleneck(4, 3, out, ksize)).to(device).eval()
        sparse = SparseBottleneck(4, 3, out, kernel_size=ksize, device=device).eval()
        sparse.load_state_dict(dense.state_dict())
        x = lay_out(random_tensor(2, 4, 21, 30, device=device), layout)
        before = x.clone()
        with torch.no_grad():
            expected, skip = dense(x), x if out is None else dense.shortcut(x)
        assert (expected - skip).abs().mean() > 0.01
        for capacity in (None, 30):
            grid = make_grid(device, capacity=capacity)
            composed = sparse(x.clone().requires_grad_(), grid)
            with torch.no_grad():
                inferred = sparse(x, grid)
            for found in (composed, inferred):
                near(found, expected, grid.pixels())
                near(found, skip, ~grid.pixels())
        assert torch.equal(x, before)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), expected)

    @on_devices
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_in_place(self, device: str, layout: str) -> None:
        plain, grid = random_state(SparseBottleneck(4, 3)).to(device).eval(), make_grid(device, capacity=30)
        sparse = SparseBottleneck(4, 3, inplace=True, device=device).eval()
        sparse.load_state_dict(plain.state_dict())
        x = lay_out(random_tensor(2, 4, 21, 30, device=device), layout)
        with torch.no_grad():
            expected, changing = plain(x, grid), lay_out(x, layout).clone()
            version = changing._version
            assert sparse(changing, grid) is changing
            assert changing._version > version
            torch.testing.assert_close(changing, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(torch.where(grid.pixels(), 0, changing), torch.where(grid.pixels(), 0, x))
        with torch.inference_mode():
            changing = x.clone()
            assert sparse(changing, grid) is changing
        # Where something else is to be left of the images, it does not happen.
        before = x.clone()
        sparse(x, grid).sum().backward()
        assert sparse.train()(x, grid) is not x
        widening = SparseBottleneck(4, 3, 6, inplace=True, device=device).eval()
        with torch.no_grad():
            widening(x, grid)
            sparse.load_state_dict(plain.state_dict())  # training moved the statistics
            torch._dynamo.reset()
            compiled = torch.compile(sparse.eval(), fullgraph=True, backend="aot_eager")(x, grid)
            torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)

    @on_devices
    def test_training_on_all_tiles_is_that_of_the_dense_one(self, device: str) -> None:
        """Statistics, outputs and gradients; the edges of images that tiles hang over included."""
        grid = SparseBlockGrid.from_mask(torch.ones(2, 21, 30, device=device), 8, capacity=30)
        dense = random_state(DenseBottleneck(4, 3, 6)).double().to(device).train()
        sparse = SparseBottleneck(4, 3, 6, device=device, dtype=torch.float64).train()
        sparse.load_state_dict(dense.state_dict())
        results = []
        for module in (lambda x: sparse(x, grid), dense):
            x = random_tensor(2, 4, 21, 30, dtype=torch.float64, device=device).requires_grad_()
            y = module(x)
            (y**3).sum().backward()
            results.append((y, x.grad))
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected)
        for name, expected in dense.state_dict().items():
            torch.testing.assert_close(sparse.state_dict()[name], expected)
        for name, parameter in dense.named_parameters():
            torch.testing.assert_close(sparse.get_parameter(name).grad, parameter.grad)

    @on_devices
    def test_training_normalises_over_active_pixels(self, device: str) -> None:
        sparse, grid = random_state(SparseBottleneck(4, 3)).to(device).train(), make_grid(device, capacity=30)
        x = random_tensor(2, 4, 21, 30, device=device)
        before = sparse.bn1.running_mean.clone(), sparse.bn1.running_var.clone()
        y = sparse(x, grid)
        pixels = x.permute(1, 0, 2, 3)[:, grid.pixels()[:, 0]]
        for running, old, now in zip(
            (sparse.bn1.running_mean, sparse.bn1.running_var), before, (pixels.mean(1), pixels.var(1))
        ):
            torch.testing.assert_close(running, 0.9 * old + 0.1 * now)
        # Nothing else of the image takes part.
        far = functional.max_pool2d(grid.pixels().float(), 3, 1, 1) == 0
        assert far.any()
        noisy = sparse(torch.where(far, 100.0, x), grid)
        near(noisy, y, grid.pixels())

    @on_devices
    def test_no_active_tile(self, device: str) -> None:
        sparse = random_state(SparseBottleneck(4, 3)).to(device)
        grid = SparseBlockGrid.from_mask(torch.zeros(2, 21, 30, device=device), 8, capacity=4)
        x, before = random_tensor(2, 4, 21, 30, device=device), copy.deepcopy(sparse.state_dict())
        assert torch.equal(sparse.train()(x, grid), x)
        assert torch.equal(sparse.eval()(x, grid), x)
        for name in ("bn1.running_mean", "bn2.running_var"):
            assert torch.equal(sparse.state_dict()[name], before[name])

    @on_devices
    def test_what_eval_keeps_follows_the_parameters(self, device: str) -> None:
        sparse, grid = random_state(SparseBottleneck(4, 3)).to(device).eval(), make_grid(device)
        x = random_tensor(2, 4, 21, 30, device=device)

        def check() -> None:
            with torch.no_grad():
                near(sparse(x, grid), sparse(x), grid.pixels())

        check()
        kept = sparse.folded()
        assert sparse.folded() is kept
        assert all(tensor.device.type == device for tensor in kept.weights)
        with torch.no_grad():
            sparse.conv2.weight.mul_(2)
        check()
        assert sparse.folded() is not kept
        sparse.load_state_dict(random_state(SparseBottleneck(4, 3), 1).state_dict())
        check()
        sparse.train()(x, grid)
        sparse.eval()
        check()
        sparse.bn2.weight.data.mul_(3)  # which nobody sees
        sparse.eval()
        check()
        assert sparse.double().folded().weights[3].dtype == torch.float64

    @on_devices
    def test_compiled(self, device: str) -> None:
        sparse, mask = random_state(SparseBottleneck(4, 3, 6)).to(device), random_mask(2, 21, 30, device=device)
        x = random_tensor(2, 4, 21, 30, device=device)

        def run(x: Any, mask: Any) -> Any:
            return sparse(x, SparseBlockGrid.from_mask(mask, 8, capacity=20))

        for mode in ("eval", "train"):
            torch._dynamo.reset()
            getattr(sparse, mode)()
            state = copy.deepcopy(sparse.state_dict())
            with torch.set_grad_enabled(mode == "train"):
                expected = run(x, mask)
                sparse.load_state_dict(state)
                found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, mask)
            torch.testing.assert_close(found, expected)
            if mode == "train":
                found.sum().backward()

    @on_devices
    def test_autocast_is_that_of_the_dense_one(self, device: str) -> None:
        for out in (None, 6):
            dense = random_state(DenseBottleneck(4, 3, out)).to(device).eval()
            sparse = SparseBottleneck(4, 3, out, device=device).eval()
            sparse.load_state_dict(dense.state_dict())
            x, grid = random_tensor(2, 4, 21, 30, device=device), make_grid(device)
            with torch.autocast(device, torch.bfloat16), torch.no_grad():
                found, expected = sparse(x, grid), dense(x)
            assert found.dtype == expected.dtype
            where = grid.pixels().expand_as(found)
            torch.testing.assert_close(found[where], expected[where], rtol=5e-2, atol=5e-2)

    @on_devices
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, device: str, dtype: Any) -> None:
        dense = random_state(DenseBottleneck(4, 3)).double().to(device).eval()
        sparse = SparseBottleneck(4, 3, device=device, dtype=dtype).eval()
        sparse.load_state_dict(dense.state_dict())
        x, grid = random_tensor(2, 4, 21, 30, dtype=dtype, device=device), make_grid(device)
        with torch.no_grad():
            found, expected = sparse(x, grid), dense(x.double())
        assert found.dtype == dtype
        where, near = grid.pixels().expand_as(found), 0.1 if dtype == torch.bfloat16 else 0.01
        torch.testing.assert_close(found[where].double(), expected[where], rtol=near, atol=near)

    def test_an_even_kernel_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 2"):
            SparseBottleneck(4, 2, kernel_size=2)


MODULES = {
    "conv": lambda: SparseConv2d(4, 4, 3),
    "bottleneck": lambda: SparseBottleneck(4, 6),
}


@on_devices
@pytest.mark.parametrize("name", MODULES)
def test_copies(name: str, device: str) -> None:
    """By pickle, deepcopy and state dict: the same parameters in memory of their own, also after inference."""
    module, grid = random_state(MODULES[name]()).to(device).eval(), make_grid(device)
    x = random_tensor(2, 4, 21, 30, device=device)
    with torch.no_grad():
        expected = module(x, grid)
        loaded = MODULES[name]().to(device).eval()
        loaded.load_state_dict(module.state_dict())
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), loaded):
            assert torch.equal(other(x, grid), expected)
            assert other.state_dict().keys() == module.state_dict().keys()
            for parameter in other.parameters():
                parameter.mul_(2)
            assert not torch.equal(other(x, grid), expected)
        assert torch.equal(module(x, grid), expected)


@on_devices
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device: str, layout: str) -> None:
    x, (indices, counts) = lay_out(random_tensor(2, 4, 21, 30, device=device), layout), make_grid(device).rows
    check = torch.library.opcheck
    conv = random_state(SparseConv2d(4, 6, 3)).to(device)
    with torch.no_grad():
        for bias, base in ((conv.bias, None), (None, random_tensor(2, 6, 21, 30, device=device))):
            for folded in (conv.train().folded(), conv.eval().folded()):  # which packs, on a device
                (weight,), words, tf32 = folded
                check(_conv.conv2d_op, (x, weight, words, tf32, bias, base, counts, indices, [8, 8], [1, 1, 1, 1]))
        for out in (None, 6):
            block = random_state(SparseBottleneck(4, 3, out)).to(device)
            for folded in (block.train().folded(), block.eval().folded()):
                check(_bottleneck.bottleneck_op, (x, *folded, counts, indices, [8, 8]))
                if out is None:
                    check(_bottleneck.bottleneck_in_place_op, (x.clone(), *folded, counts, indices, [8, 8]))
            check(_packing.pack_weight_op, (folded.weights[0], False))


@on_devices
def test_distributed_data_parallel(device: str, tmp_path: Path) -> None:
    """One process: hooks, buckets and buffers are all there."""
    backend = "nccl" if device == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        check_data_parallel(device)
    finally:
        gc.collect()  # a wrapped module that ends the group's threads itself may wait for them for ever, with the GIL
        torch.distributed.destroy_process_group()


def check_data_parallel(device: str) -> None:
    grid, x = make_grid(device), random_tensor(2, 4, 21, 30, device=device)
    alone = random_state(SparseBottleneck(4, 3)).to(device)
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    for _ in range(2):
        for module in (alone, wrapped):
            module(x, grid).square().sum().backward()
    for found, expected in zip(wrapped.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert torch.equal(wrapped.module.bn1.running_mean, alone.bn1.running_mean)


@pytest.mark.gpu
def test_inference_is_captured_in_a_cuda_graph() -> None:
    block, conv = random_state(SparseBottleneck(4, 3)).cuda().eval(), random_state(SparseConv2d(4, 6, 3)).cuda().eval()
    x = random_tensor(2, 4, 21, 30, device="cuda").contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(2, 21, 30, dtype=torch.bool, device="cuda")

    def run() -> Any:
        with torch.no_grad():
            grid = SparseBlockGrid.from_mask(mask, 8, capacity=12)
            return conv(block(x, grid), grid)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for density in (0.3, 0.0, 0.1):
        mask.copy_(random_mask(2, 21, 30, density))
        graph.replay()
        torch.cuda.synchronize()
        found = y.clone()
        torch.testing.assert_close(found, run(), rtol=1e-4, atol=1e-4)
