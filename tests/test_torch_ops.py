"""The ops on PyTorch tensors: the numbers, gradients, memory, and what PyTorch's machinery makes of them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_cases import HALO, LAYOUTS, TILES, lay_out, on_devices, random_mask, random_tensor  # noqa: E402

import sbnet_cupy  # noqa: E402
import sbnet_cupy.torch as sparse  # noqa: E402
from sbnet_cupy._validate import address_of  # noqa: E402
from sbnet_cupy.torch import _arrays, _gather, _reduce_mask, _scatter  # noqa: E402
from sbnet_cupy.torch._arrays import as_array, namespace  # noqa: E402

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def on_host(tensor: Any) -> Any:
    """The NumPy array of an image or stack, channels last; a copy where it was on a device."""
    return as_array(tensor.detach().cpu()).transpose(0, 2, 3, 1)


def rows_on_host(rows: Any) -> dict[str, Any]:
    return {name: as_array(tensor.cpu()) for name, tensor in rows._asdict().items()}


def active(device: Any, *, capacity: int | None = None, seed: int = 0) -> Any:
    return sparse.reduce_mask(random_mask(2, 21, 30, seed=seed, device=device), (3, 4), **TILES, capacity=capacity)


def same(found: Any, expected: Any) -> bool:
    """Whether tensor and array hold the same bits, channels last."""
    return on_host(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@on_devices
@pytest.mark.parametrize("capacity", [None, 3, 40])
@pytest.mark.parametrize("with_channel", [False, True])
def test_reduce_mask(device: str, capacity: int | None, with_channel: bool) -> None:
    mask = random_mask(2, 21, 30, device=device)
    expected = sbnet_cupy.reduce_mask(mask.cpu().numpy(), (3, 4), **TILES, capacity=capacity)
    found = sparse.reduce_mask(mask[:, None] if with_channel else mask, (3, 4), **TILES, capacity=capacity)
    assert isinstance(found, sbnet_cupy.BlockIndices)
    for tensor, array in zip(found, expected):
        assert (tensor.device.type, tensor.dtype) == (device, torch.int32)
        assert tensor.tolist() == array.tolist()


@on_devices
def test_average_pooling(device: str) -> None:
    mask = random_tensor(2, 21, 30, device=device)
    options: dict[str, Any] = {**TILES, "avgpool": True, "tol": 0.1}
    expected = sbnet_cupy.reduce_mask(mask.cpu().numpy(), (3, 4), **options)
    found = sparse.reduce_mask(mask, (3, 4), **options)
    assert found.active_block_indices.tolist() == expected.active_block_indices.tolist()
    assert 0 < len(expected.active_block_indices) < 24


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_scatter(device: str, layout: str, dtype: Any) -> None:
    x = lay_out(random_tensor(2, 5, 21, 30, dtype=dtype, device=device), layout)
    rows = active(device, capacity=12)
    host = rows_on_host(rows)
    stack = sparse.sparse_gather(x, *rows[::-1], **HALO)
    assert same(stack, sbnet_cupy.sparse_gather(on_host(x), **host, **HALO))
    expected_format = torch.channels_last if layout in ("channels_last", "sliced") else torch.contiguous_format
    assert stack.is_contiguous(memory_format=expected_format)
    blocks = lay_out(random_tensor(*stack.shape, seed=1, dtype=dtype, device=device), layout)
    before = x.clone()
    for add in (False, True) if dtype != torch.bool else (False,):
        options: dict[str, Any] = {**HALO, "add": add, "atomic": add}
        y = sparse.sparse_scatter(blocks, *rows[::-1], x, **options)
        wanted = sbnet_cupy.sparse_scatter(on_host(blocks), x=on_host(x), **host, **options)
        assert same(y, wanted)
        assert torch.equal(x, before)
        assert y.stride() == torch.empty_like(x).stride()
        if layout != "expanded":  # whose elements share memory
            z = lay_out(x, layout)
            z = z.clone() if z is x else z
            assert sparse.sparse_scatter_(blocks, *rows[::-1], z, **options) is z
            assert same(z, wanted)


@on_devices
def test_nothing_at_all(device: str) -> None:
    nothing = sparse.reduce_mask(torch.zeros(2, 21, 30, device=device), (3, 4), **TILES)
    x = random_tensor(2, 5, 21, 30, device=device).requires_grad_()
    stack = sparse.sparse_gather(x, *nothing[::-1], **HALO)
    assert stack.shape == (0, 5, 10, 10)
    y = sparse.sparse_scatter(stack, *nothing[::-1], x, **HALO)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    empty = torch.empty(0, 5, 21, 30, device=device)
    assert sparse.sparse_gather(empty, *active(device)[::-1], **HALO).abs().sum() == 0


@on_devices
def test_lazy_conjugates_and_negatives(device: str) -> None:
    """PyTorch leaves them to those who read; what the library reads has them done."""
    x, rows = random_tensor(2, 5, 21, 30, dtype=torch.complex64, device=device), active(device)[::-1]
    for lazy in (x.conj(), x.conj().imag):
        assert lazy.is_conj() or lazy.is_neg()
        found = sparse.sparse_gather(lazy, *rows, **HALO)
        assert torch.equal(found, sparse.sparse_gather(lazy.resolve_conj().resolve_neg().clone(), *rows, **HALO))


@on_devices
def test_inference_mode(device: str) -> None:
    x, mask = random_tensor(2, 5, 21, 30, device=device), random_mask(2, 21, 30, device=device)
    expected = chain(x, mask, 24)
    with torch.inference_mode():
        assert torch.equal(chain(x, mask, 24), expected)
        assert torch.equal(chain(x.clone(), mask.clone(), None, in_place=True), chain(x, mask, None, in_place=True))


def small(device: str) -> tuple[Any, Any]:
    """Few pixels, for the numbers that gradcheck computes; blocks repeat."""
    x = random_tensor(2, 2, 5, 6, dtype=torch.float64, device=device).requires_grad_()
    indices = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0], [-1, -1, -1]], dtype=torch.int32, device=device)
    return x, (torch.tensor([5], dtype=torch.int32, device=device), indices)


GRIDS: list[dict[str, Any]] = [
    {"bsize": (3, 3), "bstride": (3, 3)},
    {"bsize": (4, 3), "boffset": (-1, -1), "bstride": (2, 3)},
]


@on_devices
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients(device: str, grid: dict[str, Any]) -> None:
    x, rows = small(device)
    check = torch.autograd.gradcheck
    assert check(lambda x: sparse.sparse_gather(x, *rows, **grid), (x,))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert check(lambda x: sparse.sparse_gather(x, *rows, **grid), (last,))
    blocks = random_tensor(5, 2, *grid["bsize"], seed=1, dtype=torch.float64, device=device).requires_grad_()
    for add in (False, True):
        options = {**grid, "add": add, "atomic": add}
        assert check(lambda b, x, o=options: sparse.sparse_scatter(b, *rows, x, **o), (blocks, x))
        assert check(lambda b, x, o=options: sparse.sparse_scatter_(b, *rows, x.clone(), **o), (blocks, x))
        base = x.detach()
        assert check(lambda b, o=options, x=base: sparse.sparse_scatter(b, *rows, x, **o), (blocks,))
        stack = blocks.detach()
        assert check(lambda x, o=options, b=stack: sparse.sparse_scatter_(b, *rows, x.clone(), **o), (x,))


@on_devices
def test_in_place_gradients_are_those_of_autograd(device: str) -> None:
    x, rows = small(device)
    blocks = torch.ones(5, 2, 3, 3, dtype=torch.float64, device=device)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        sparse.sparse_scatter_(blocks, *rows, x, **GRIDS[0])
    assert torch.equal(x, before)
    middle = x * 1
    squared = middle**2  # needs what is overwritten next
    sparse.sparse_scatter_(blocks.requires_grad_(), *rows, middle, **GRIDS[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@on_devices
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device: str, layout: str) -> None:
    x, rows = small(device)
    x = lay_out(x.detach(), layout).requires_grad_()
    grid = [list(pair) for pair in ((4, 3), (-1, -1), (2, 3))]
    blocks = lay_out(random_tensor(5, 2, 4, 3, dtype=torch.float64, device=device), layout).requires_grad_()
    mask = random_tensor(2, 5, 6, device=device)
    check = torch.library.opcheck
    for capacity in (None, 7):
        check(_reduce_mask.reduce_mask_op, (mask, [2, 2], *grid, 0.5, False, capacity))
    check(_gather.gather_op, (x, *rows, *grid))
    for add in (False, True):
        check(_scatter.scatter_op, (blocks, *rows, x, *grid, add, add))
        check(_scatter.scatter_in_place_op, (blocks.detach(), *rows, x.detach().clone(), *grid, add, add))
    check(_scatter.onto_zeros_op, (blocks, *rows, [2, 5, 6], *grid))
    check(_gather.gather_grad_op, (blocks.detach(), *rows, list(x.shape), *grid, layout == "channels_last"))
    for op in (_scatter.scatter_grad_blocks_op, _scatter.scatter_grad_x_op):
        check(op, (x.detach(), *rows, *grid))


def chain(x: Any, mask: Any, capacity: int | None, in_place: bool = False) -> Any:
    rows = sparse.reduce_mask(mask, (3, 4), **TILES, capacity=capacity)
    stack = sparse.sparse_gather(x, rows.bin_counts, rows.active_block_indices, **HALO)
    blocks = 2 * stack[:, :, 1:-1, 1:-1] + 1
    scatter = sparse.sparse_scatter_ if in_place else sparse.sparse_scatter
    return scatter(blocks, rows.bin_counts, rows.active_block_indices, x * 3 if in_place else x, **TILES)


@on_devices
@pytest.mark.parametrize("capacity", [None, 24, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled(device: str, capacity: int | None, in_place: bool) -> None:
    """In one graph, with the gradients that autograd gives."""
    torch._dynamo.reset()
    # Inductor needs a C++ compiler on the CPU, and takes its time: what matters here is that nothing breaks the graph.
    compiled = torch.compile(chain, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for seed in range(2):
        x = random_tensor(2, 5, 21, 30, seed=seed, device=device)
        mask = random_mask(2, 21, 30, seed=seed, device=device)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = compiled(found, mask, capacity, in_place), chain(expected, mask, capacity, in_place)
        assert torch.equal(y, wanted)
        weights = random_tensor(*y.shape, seed=9, device=device)
        (y * weights).sum().backward()
        (wanted * weights).sum().backward()
        torch.testing.assert_close(found.grad, expected.grad)
        with torch.no_grad():
            assert torch.equal(compiled(x, mask, capacity, in_place), wanted)


@on_devices
def test_dynamic_shapes(device: str) -> None:
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chain, fullgraph=True, backend=count, dynamic=True)
    compilations = set()
    for n in (2, 3, 5):
        x, mask = random_tensor(n, 5, 21, 30, device=device), random_mask(n, 21, 30, device=device)
        assert torch.equal(compiled(x, mask, 24), chain(x, mask, 24))
        compilations.add(count.frame_count)
    assert len(compilations) == 1  # all of them for the first shape


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_that_of_a_convolution(device: str, dtype: Any) -> None:
    x = random_tensor(2, 4, 21, 30, device=device).requires_grad_()
    weight = random_tensor(4, 4, 3, 3, device=device)
    rows = active(device)[::-1]
    with torch.autocast(device, dtype):
        stack = sparse.sparse_gather(x, *rows, **HALO)
        blocks = torch.nn.functional.conv2d(stack, weight)
        y = sparse.sparse_scatter(blocks, *rows, x, **TILES)
        dense = torch.nn.functional.conv2d(x, weight)
        double = torch.nn.functional.conv2d(x.double(), weight.double())
        assert stack.dtype == blocks.dtype == y.dtype == dense.dtype == dtype
        assert sparse.sparse_gather(x.double(), *rows, **HALO).dtype == double.dtype == torch.float64
        assert sparse.sparse_gather(x.detach().to(torch.int32), *rows, **HALO).dtype == torch.int32
        z = x.detach().clone()
        sparse.sparse_scatter_(blocks.detach(), *rows, z, **TILES)
    assert z.dtype == torch.float32
    covered = sparse.sparse_scatter(torch.ones_like(blocks), *rows, torch.zeros_like(y), **TILES) > 0
    assert torch.equal(torch.where(covered, z, x), torch.where(covered, y.float(), x))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@on_devices
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_is_copied(device: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads a tensor where it lies, and writes where the result lies."""
    seen: dict[str, Any] = {}

    def spy(name: str) -> None:
        function = getattr(sbnet_cupy, name)

        def record(*arrays: Any, **options: Any) -> Any:
            given = [*arrays, options.get("out")]
            seen[name] = [address_of(array) for array in given if hasattr(array, "strides")]
            return function(*arrays, **options)

        monkeypatch.setattr(sbnet_cupy, name, record)

    rows = active(device)[::-1]
    for name in ("sparse_gather", "sparse_scatter_var", "sparse_gather_grad"):
        spy(name)
    x = lay_out(random_tensor(2, 5, 21, 30, device=device), layout).requires_grad_()
    stack = sparse.sparse_gather(x, *rows, **HALO)
    assert seen["sparse_gather"] == [t.data_ptr() for t in (x, *rows, stack)]
    grad = random_tensor(*stack.shape, device=device)
    (grad_x,) = torch.autograd.grad(stack, x, grad)
    assert seen["sparse_gather_grad"][0] == grad.data_ptr()
    assert seen["sparse_gather_grad"][-1] == grad_x.data_ptr()
    assert grad_x.stride() == x.stride()
    with torch.no_grad():
        sparse.sparse_scatter_(stack, *rows, x, **HALO)
        assert seen["sparse_scatter_var"] == [t.data_ptr() for t in (stack, *rows, x)]
        y = sparse.sparse_scatter(stack, *rows, x, **HALO)
        assert seen["sparse_scatter_var"] == [t.data_ptr() for t in (stack, *rows, y)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cupy_is_told(layout: str, dtype: Any) -> None:
    """Where a tensor lies, in bytes: nothing that needs a device."""
    pytest.importorskip("cupy")
    x = lay_out(random_tensor(2, 5, 21, 30, dtype=dtype), layout)
    for tensor in (x, x[:0], x[:, 2:, 1:, ::3]):
        array = _arrays._cupy_array(tensor, tensor.shape, tensor.stride(), 3)
        same_on_host = as_array(tensor)
        assert array.shape == same_on_host.shape
        assert array.strides == same_on_host.strides or array.size == 0
        assert array.dtype == same_on_host.dtype
        assert array.data.ptr == tensor.data_ptr()
        assert array.data.device_id == 3


def test_streams_are_pytorchs() -> None:
    pytest.importorskip("cupy")
    for pointer in (0, 5, 2**40):
        assert _arrays._stream(pointer).ptr == pointer


@pytest.mark.gpu
def test_memory_is_pytorchs() -> None:
    import cupy

    x = random_tensor(2, 16, 210, 300, device="cuda").contiguous(memory_format=torch.channels_last)
    mask = random_mask(2, 210, 300, device="cuda")
    pool = cupy.get_default_memory_pool()

    def run() -> list[Any]:
        rows = sparse.reduce_mask(mask, (27, 38), **TILES, capacity=2000)
        stack = sparse.sparse_gather(x, *rows[::-1], **HALO)
        return [*rows, stack, sparse.sparse_scatter(stack, *rows[::-1], x, **HALO, add=True, atomic=True)]

    run()
    used, requested = pool.used_bytes(), torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = run()
    assert pool.used_bytes() == used
    # Scratch memory went back.
    found = torch.cuda.memory_stats()["requested_bytes.all.current"] - requested
    assert found == sum(tensor.untyped_storage().nbytes() for tensor in kept)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    x = random_tensor(2, 5, 21, 30, device="cuda").requires_grad_()
    mask = torch.zeros(2, 21, 30, dtype=torch.bool, device="cuda")

    def step() -> tuple[Any, Any]:
        y = chain(x, mask, 12)
        return y, torch.autograd.grad((y**2).sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad = step()
    for seed, density in enumerate((0.3, 0.0, 1.0, 0.1)):
        contents = random_mask(2, 21, 30, density, seed)
        mask.copy_(contents)
        with torch.no_grad():
            x.copy_(random_tensor(2, 5, 21, 30, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        host = x.detach().cpu().requires_grad_()
        wanted = chain(host, contents, 12)
        assert torch.equal(y.cpu(), wanted)
        (wanted**2).sum().backward()
        torch.testing.assert_close(grad.cpu(), host.grad)


@pytest.mark.gpu
def test_streams() -> None:
    """Work waits for its own stream alone, and the host for none."""
    x = torch.zeros(2, 5, 21, 30, device="cuda")
    mask = random_mask(2, 21, 30, device="cuda")
    chain(x, mask, 24)  # compiles the kernels
    busy, idle = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (busy, idle):  # and allocates on both streams, which may synchronise
        with torch.cuda.stream(stream):
            chain(x, mask, 24)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_000_000_000)
        x.fill_(1)
        late = chain(x, mask, 24)
    with torch.cuda.stream(idle):
        early = chain(x, mask, 24)
        idle.synchronize()
    assert not busy.query()
    torch.cuda.synchronize()
    assert torch.equal(early.cpu(), chain(torch.zeros(2, 5, 21, 30), mask.cpu(), 24))
    assert torch.equal(late.cpu(), chain(torch.ones(2, 5, 21, 30), mask.cpu(), 24))


@on_devices
def test_threads(device: str) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            x, mask = random_tensor(2, 5, 21, 30, seed=seed), random_mask(2, 21, 30, seed=seed)
            expected = x.clone().requires_grad_()
            wanted = chain(expected, mask, None)
            wanted.sum().backward()
            stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else torch.no_grad()
            with stream, torch.enable_grad():
                for _ in range(10):
                    leaf = x.to(device).requires_grad_() if device == "cuda" else x.clone().requires_grad_()
                    y = chain(leaf, mask.to(device), None)
                    y.sum().backward()
                    assert torch.equal(y.cpu(), wanted)
                    assert torch.equal(leaf.grad.cpu(), expected.grad)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.gpu
def test_a_second_device() -> None:
    """Tensors decide where work runs, whatever the current device is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, mask = random_tensor(2, 5, 21, 30), random_mask(2, 21, 30)
    expected = chain(x, mask, 24)
    assert torch.cuda.current_device() == 0
    for device in ("cuda:1", "cuda:0"):
        leaf = x.to(device).requires_grad_()
        y = chain(leaf, mask.to(device), 24)
        y.sum().backward()
        assert y.device == torch.device(device)
        assert torch.equal(y.cpu(), expected)
        assert torch.cuda.current_device() == 0
    other = sparse.reduce_mask(mask.to("cuda:1"), (3, 4), **TILES)
    with pytest.raises(ValueError, match="bin_counts: expected a tensor on cuda:0 like x, got one on cuda:1"):
        sparse.sparse_gather(x.to("cuda:0"), *other[::-1], **HALO)


class TestErrors:
    def expect(self, kind: type[Exception], message: str, call: Any) -> None:
        with pytest.raises(kind, match="^" + re.escape(message)):
            call()

    @on_devices
    def test_of_tensors(self, device: str) -> None:
        x, rows = random_tensor(2, 5, 21, 30, device=device), active(device)[::-1]
        stack = sparse.sparse_gather(x, *rows, **TILES)
        m = len(stack)
        gather, scatter, write = sparse.sparse_gather, sparse.sparse_scatter, sparse.sparse_scatter_
        self.expect(TypeError, "x: expected a PyTorch tensor, got ndarray", lambda: gather(np.ones(3), *rows, **TILES))
        self.expect(TypeError, "bin_counts: expected a PyTorch tensor, got int", lambda: gather(x, 3, rows[1], **TILES))
        self.expect(
            TypeError,
            "x: expected a tensor with strides, got layout torch.sparse_coo",
            lambda: gather(x.to_sparse(), *rows, **TILES),
        )
        self.expect(
            ValueError,
            "x: expected 4 dimensions (N, C, H, W), got shape (5, 21, 30)",
            lambda: gather(x[0], *rows, **TILES),
        )
        self.expect(
            TypeError,
            "active_block_indices: expected dtype int32, got int64",
            lambda: gather(x, rows[0], rows[1].long(), **TILES),
        )
        self.expect(ValueError, "bsize: expected two integers", lambda: gather(x, *rows, bsize=(0, 8), bstride=(8, 8)))
        for op in (scatter, write):
            self.expect(
                ValueError,
                f"blocks: expected shape ({m}, 5, 8, 8) (M, C, height, width), got ({m}, 4, 8, 8)",
                lambda op=op: op(stack[:, :4], *rows, x, **TILES),
            )
            self.expect(
                TypeError,
                "blocks: expected dtype torch.float32 like x, got torch.float64",
                lambda op=op: op(stack.double(), *rows, x, **TILES),
            )
            self.expect(
                ValueError,
                "atomic: expected True",
                lambda op=op: op(stack, *rows, x, bsize=(8, 8), bstride=(7, 8), add=True),
            )
        mask = torch.ones(2, 3, 21, 30, device=device)
        self.expect(
            ValueError,
            "mask: expected shape (N, H, W) or (N, 1, H, W), got (2, 3, 21, 30)",
            lambda: sparse.reduce_mask(mask, (3, 4), **TILES),
        )
        flat = mask[:, 0]
        for options, message in (
            ({"bcount": (3, 4.5)}, "bcount: expected two integers"),
            ({"capacity": "many"}, "capacity: expected an integer or None, got str"),
            ({"capacity": -1}, "capacity: expected an integer from 0"),
            ({"tol": None}, "tol: expected a real number, got NoneType"),
        ):
            with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
                sparse.reduce_mask(flat, **{"bcount": (3, 4), **TILES, **options})
        eight = torch.ones(2, 3, 21, 30, device=device).to(torch.float8_e4m3fn)
        self.expect(TypeError, "dtype: expected one that NumPy has, or bfloat16", lambda: gather(eight, *rows, **TILES))

    @pytest.mark.gpu
    def test_of_devices(self) -> None:
        x, rows = random_tensor(2, 5, 21, 30, device="cuda"), active("cpu")[::-1]
        message = "bin_counts: expected a tensor on cuda:0 like x, got one on cpu"
        self.expect(ValueError, message, lambda: sparse.sparse_gather(x, *rows, **TILES))

    def test_of_a_gpu_without_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(ImportError, match=r"tensors on a GPU need CuPy: pip install .sbnet-cupy\[cu13\]."):
            namespace(torch.device("cuda", 0))
        with pytest.raises(TypeError, match="device: expected a CPU or CUDA tensor, got one on xpu:0"):
            namespace(torch.device("xpu", 0))

    def test_of_other_devices(self) -> None:
        x = torch.empty(2, 5, 21, 30, device="meta")
        assert sparse.sparse_gather(x, *(t.to("meta") for t in active("cpu")[::-1]), **TILES).device.type == "meta"


def test_imports_take_no_more_than_they_need() -> None:
    """Neither PyTorch for the package, nor its compiler for the operators."""
    code = """if True:
        import sys, sbnet_cupy
        print("torch" in sys.modules)
        import torch
        before = "torch._dynamo" in sys.modules
        import sbnet_cupy.torch
        print(before == ("torch._dynamo" in sys.modules))
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\nTrue\n"
