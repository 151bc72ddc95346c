"""Weights of modules, packed for the fused kernels once in eval mode: when, where, and what the library gets to see."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_cases import on_devices, random_mask, random_state, random_tensor  # noqa: E402

import sbnet_cupy  # noqa: E402
from sbnet_cupy._packing import packing_of  # noqa: E402
from sbnet_cupy.torch import SparseBlockGrid, SparseBottleneck, SparseConv2d, _bottleneck, _conv, _folding  # noqa: E402
from sbnet_cupy.torch._arrays import Place  # noqa: E402
from sbnet_cupy.torch._packing import (  # noqa: E402
    _bottleneck_weights_at,
    _conv_weights_at,
    bottleneck_weights,
    pack_weight_op,
)

MODULES: dict[str, Any] = {
    "conv": lambda **place: SparseConv2d(8, 8, 3, **place),
    "bottleneck": lambda **place: SparseBottleneck(8, 16, **place),
    "projecting": lambda **place: SparseBottleneck(8, 16, 24, **place),
}
#: Weights that are packed, in each of them.
PACKED = {"conv": 1, "bottleneck": 3, "projecting": 3}


class Packings(TorchDispatchMode):
    """Records for what weights are packed, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is pack_weight_op:
            self.seen.append((args[0].dtype, args[1]))
        return function(*args, **(kwargs or {}))

    def take(self) -> list[tuple[Any, bool]]:
        """What was seen since."""
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def device_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of the CPU pass for some that are packed; the operators leave what was made of them alone."""
    monkeypatch.setattr(_folding, "is_packed", lambda weight: weight.element_size() <= 4)


def scene(name: str, device: str, dtype: Any = torch.float32) -> tuple[Any, Any, Any]:
    module = random_state(MODULES[name]()).to(device, dtype).eval()
    x = random_tensor(2, 8, 21, 30, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    return module, x, SparseBlockGrid.from_mask(random_mask(2, 21, 30, device=device), 8, capacity=12)


def count_packings(module: Any, x: Any, grid: Any) -> int:
    with torch.no_grad(), Packings() as packings:
        module(x, grid)
    return len(packings.seen)


@pytest.mark.parametrize("name", MODULES)
class TestWhen:
    """On the CPU, where nothing depends on it: how often, and what for."""

    def test_once_in_eval_mode(self, name: str, device_like: None) -> None:
        module, x, grid = scene(name, "cpu")
        n = PACKED[name]
        assert [count_packings(module, x, grid) for _ in range(3)] == [n, 0, 0]
        with torch.no_grad():
            next(module.parameters()).mul_(2)
        assert [count_packings(module, x, grid) for _ in range(2)] == [n, 0]
        module.eval()
        assert [count_packings(module, x, grid) for _ in range(2)] == [n, 0]
        module.load_state_dict(module.state_dict())
        assert [count_packings(module, x, grid) for _ in range(2)] == [n, 0]
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert [count_packings(other, x, grid) for _ in range(2)] == [n, 0]
        assert count_packings(module, x, grid) == 0
        module.half()
        assert [count_packings(module, x.half(), grid) for _ in range(2)] == [n, 0]
        module.double()
        assert [count_packings(module, x.double(), grid) for _ in range(2)] == [0, 0]

    def test_not_in_training_mode(self, name: str, device_like: None) -> None:
        module, x, grid = scene(name, "cpu")
        assert count_packings(module.train(), x, grid) == 0
        module(x, grid).sum().backward()
        assert module._kept is None

    def test_not_on_the_cpu(self, name: str) -> None:
        module, x, grid = scene(name, "cpu")
        assert count_packings(module, x, grid) == 0
        assert module.folded().words == []

    def test_once_for_each_setting(self, name: str, device_like: None, monkeypatch: pytest.MonkeyPatch) -> None:
        module, x, grid = scene(name, "cpu")
        n, found = PACKED[name], []
        setting = _folding._Setting
        for tf32, stream in ((False, 1), (True, 1), (False, 2), (True, 1), (False, 1)):
            monkeypatch.setattr(setting, "now", lambda device, now=(tf32, stream): setting(None, *now))
            with torch.no_grad(), Packings() as packings:
                module(x, grid)
                assert module.folded().tf32 == tf32
            found.append(packings.take())
        rounded, exact = [(torch.float32, True)] * n, [(torch.float32, False)] * n
        assert found == [exact, rounded, exact, [], []]

    def test_in_the_dtype_of_autocast(self, name: str, device_like: None) -> None:
        module, x, grid = scene(name, "cpu")
        n, half = PACKED[name], x.bfloat16()
        with Packings() as packings, torch.no_grad():
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    y = module(half, grid)
            assert (y.dtype, packings.take()) == (torch.bfloat16, [(torch.bfloat16, False)] * n)
            assert module(x, grid).dtype == torch.float32
            assert packings.take() == [(torch.float32, False)] * n
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(module(half, grid), y)
            assert packings.take() == []

    def test_compiled_it_is_left_to_each_call(self, name: str, device_like: None) -> None:
        module, x, grid = scene(name, "cpu")
        with torch.no_grad():
            expected = module(x, grid)
            torch._dynamo.reset()
            called: list[Any] = []

            def backend(graph: Any, inputs: Any) -> Any:
                called.extend(node.target for node in graph.graph.nodes)
                return graph

            compiled = torch.compile(module, fullgraph=True, backend=backend)
            assert torch.equal(compiled(x, grid), expected)
            next(module.parameters()).mul_(2)
            assert torch.equal(compiled(x, grid), module(x, grid))
        assert (_conv.conv2d_op if name == "conv" else _bottleneck.bottleneck_op) in called
        assert pack_weight_op not in called


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_size_of_packed_weights_is_known_without_packing(dtype: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for shape in ((3, 3, 40, 24), (1, 1, 7, 9)):
            words = pack_weight_op(torch.empty(shape, dtype=dtype, device="cuda"), True)
            wanted = (0,) if dtype == torch.float64 else (packing_of(shape, dtype.itemsize).words,)
            assert (words.dtype, words.device.type, tuple(words.shape)) == (torch.int32, "cuda", wanted)
    assert pack_weight_op(torch.ones(1, 1, 4, 4, dtype=dtype), True).shape == (0,)


def places(module: Any) -> tuple[list[Any], list[Any], tuple[Place, ...], tuple[Place, ...]]:
    """Weights of a module and room for packed ones, and where they lie, as if on device 3: nothing is read there."""
    weights = module.folded().weights
    words = [
        torch.zeros(packing_of(tuple(w.shape), w.element_size()).words, dtype=torch.int32)
        for w in weights[: module.packed]
    ]
    found = [tuple(Place.of(t)._replace(device=3) for t in tensors) for tensors in (weights, words)]
    return weights, words, found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_the_library_gets_to_see(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr("sbnet_cupy._validate.current_device", lambda xp: 3)
    module = SparseBottleneck(8, 16, 24, dtype=dtype).eval()
    weights, words, where, where_words = places(module)
    packed = _bottleneck_weights_at(where, where_words, True)
    assert isinstance(packed, sbnet_cupy.PackedBottleneck)
    assert _bottleneck_weights_at(where, where_words, True) is packed
    plain = packed.weights
    convs = (plain.conv1, plain.conv2, plain.conv3, plain.project)
    assert [a.data.ptr for a in (*convs, packed.channels)] == [weights[k].data_ptr() for k in (0, 1, 2, 4, 3)]
    assert [tuple(a.shape) for a in convs] == [(1, 1, 8, 16), (3, 3, 16, 16), (1, 1, 16, 24), (1, 1, 8, 24)]
    sizes = [8, 8, 16, 16, 16, 16]
    begins = [packed.channels.data.ptr + 4 * sum(sizes[:k]) for k in range(6)]
    parts = [getattr(plain, f"{kind}{number}") for number in "123" for kind in ("scale", "shift")]
    assert [a.data.ptr for a in parts] == begins
    assert [a.size for a in parts] == sizes
    assert [w.words.data.ptr for w in packed.convs] == [w.data_ptr() for w in words]
    assert {w.words.dtype for w in packed.convs} == {np.dtype(np.uint32)}
    assert {w.tf32 for w in packed.convs} == {dtype == torch.float32}
    assert {a.device.id for a in (*convs, *parts)} == {3}
    assert _bottleneck_weights_at(where, (), False).conv2.data.ptr == weights[1].data_ptr()
    conv = _conv_weights_at(where[1], where_words[1:2], False)
    assert (conv.source.data.ptr, conv.words.data.ptr, conv.tf32) == (weights[1].data_ptr(), words[1].data_ptr(), False)
    assert isinstance(_conv_weights_at(where[1], (), False), cupy.ndarray)
    with pytest.raises(ValueError, match="PackedWeights: expected what pack_weights makes"):
        _conv_weights_at(where[1], where_words[:1], False)


def test_nothing_is_kept_alive_by_what_the_library_gets_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr("sbnet_cupy._validate.current_device", lambda xp: 3)
    module = SparseBottleneck(8, 16).eval()
    weights, words, *where = places(module)
    _bottleneck_weights_at(*where, False)
    gone = [weakref.ref(t) for t in (*weights, *words)]
    del module, weights, words
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_batch_norms_in_one_tensor() -> None:
    module = random_state(SparseBottleneck(8, 4)).eval()
    weights, tf32 = bottleneck_weights(*module.folded()[:2], True)
    assert tf32 is True
    for number, norm in enumerate((module.bn1, module.bn2, module.bn3), 1):
        fields = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        folded = sbnet_cupy.fold_batch_norm(*(t.detach().numpy() for t in fields), norm.eps)
        for kind, expected in zip(("scale", "shift"), folded, strict=True):
            np.testing.assert_array_equal(getattr(weights, f"{kind}{number}"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
class TestOnADevice:
    def run(self, module: Any, x: Any, grid: Any) -> Any:
        with torch.no_grad():
            return module(x, grid)

    def unpacked(self, name: str, module: Any, x: Any, grid: Any) -> Any:
        """The same by the operator, which leaves packing to the library."""
        weights, rows = module.folded().weights, grid.rows[::-1]
        with torch.no_grad():
            if name != "conv":
                return _bottleneck.bottleneck_op(x, weights, [], None, *rows, [8, 8])
            bias = module.bias if module.bias.dtype == torch.float64 else module.bias.float()
            return _conv.conv2d_op(x, *weights, [], None, bias, None, *rows, [8, 8], [1, 1, 1, 1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("tf32", [False, True])
    def test_packed_or_not_gives_the_same_bits(
        self, name: str, dtype: Any, tf32: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        module, x, grid = scene(name, "cuda", dtype)
        assert count_packings(module, x, grid) == (0 if dtype == torch.float64 else PACKED[name])
        assert count_packings(module, x, grid) == 0
        assert torch.equal(self.run(module, x, grid), self.unpacked(name, module, x, grid))

    def test_the_library_packs_nothing_in_a_second_call(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from sbnet_cupy import _fused

        module, x, grid = scene(name, "cuda")
        packings, pack = [], _fused.pack
        monkeypatch.setattr(_fused, "pack", lambda *given: packings.append(1) or pack(*given))
        expected = self.run(module, x, grid)
        assert len(packings) == PACKED[name]
        assert torch.equal(self.run(module, x, grid), expected)
        assert len(packings) == PACKED[name]

    def test_switching_tf32(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module, x, grid = scene(name, "cuda")
        for tf32 in (False, True, False):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
            assert torch.equal(self.run(module, x, grid), self.unpacked(name, module, x, grid))
            assert module.folded().tf32 == tf32

    def test_a_graph_keeps_its_weights(self, name: str) -> None:
        """Also where the module forgets them, and others come to lie where they would have been."""
        module, x, grid = scene(name, "cuda")
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            expected = self.run(module, x, grid)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with Packings() as packings, torch.cuda.graph(graph):
            y = self.run(module, x, grid)
        assert packings.seen == []
        module.eval()
        for _ in range(3):
            with torch.cuda.stream(side):
                garbage = [torch.full((n,), float("nan"), device="cuda") for n in (64, 128, 256, 512, 1024, 4096)]
                self.run(module, x, grid)
        torch.cuda.synchronize()
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        del garbage

    def test_a_graph_without_a_call_before(self, name: str) -> None:
        """Folds and packs in every replay; nothing that was never computed is kept."""
        module, x, grid = scene(name, "cuda")
        expected = self.run(copy.deepcopy(module), x, grid)  # compiles the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = self.run(module, x, grid)
        assert torch.equal(self.run(module, x, grid), expected)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, self.run(module, x, grid))
        assert not torch.equal(y, expected)

    def test_each_stream_has_its_own(self, name: str) -> None:
        module, x, grid = scene(name, "cuda")
        expected = self.run(module, x, grid)
        other = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            assert count_packings(module, x, grid) == PACKED[name]
            assert count_packings(module, x, grid) == 0
            found = self.run(module, x, grid)
        torch.cuda.synchronize()
        assert torch.equal(found, expected)

    def test_memory_is_pytorchs(self, name: str) -> None:
        import cupy

        module, x, grid = scene(name, "cuda")
        self.run(copy.deepcopy(module), x, grid)
        pool = cupy.get_default_memory_pool()
        used = pool.used_bytes()
        self.run(module, x, grid)
        assert pool.used_bytes() == used
        assert all(w.is_cuda and w.dtype == torch.int32 for w in module.folded().words)
        assert len(module.folded().words) == PACKED[name]


@on_devices
def test_inference_tensors_are_folded_in_every_call(device: str) -> None:
    """Nobody counts their changes."""
    with torch.inference_mode():
        module, x, grid = scene("bottleneck", device)
        for _ in range(2):
            y = module(x, grid)
            expected = module(x)
            where = grid.pixels().expand_as(y)
            torch.testing.assert_close(y[where], expected[where], rtol=1e-2, atol=1e-2)
            module.conv2.weight.mul_(2)
        assert module._kept is None
