"""Batch norm and ReLU of stacks: against float64, finite differences, and what it may do with memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_cases import lay_out, on_devices, random_mask, random_state, random_tensor  # noqa: E402

from sbnet_cupy.torch import SparseBlockGrid, SparseBottleneck  # noqa: E402
from sbnet_cupy.torch._grid import NO_MARGIN, Margin  # noqa: E402
from sbnet_cupy.torch._norm import Pixels, find_pixels, norm_relu  # noqa: E402

functional = torch.nn.functional
MARGINS = [NO_MARGIN, Margin(1, 0, 2, 1)]


def make_grid(device: Any) -> Any:
    """Tiles of 4 x 4 pixels, of which some hang over edges, and rows that nobody uses."""
    mask = torch.zeros(2, 6, 7, device=device)
    mask[0, 0, 0] = mask[0, 5, 6] = mask[1, 2, 5] = 1
    return SparseBlockGrid.from_mask(mask, 4, capacity=5)


def make_stack(margin: Margin, dtype: Any = torch.float64, layout: str = "channels_last", device: Any = "cpu") -> Any:
    """Random everywhere, outside of the image as well."""
    shape = 5, 3, 4 + margin.top + margin.bottom, 4 + margin.left + margin.right
    return lay_out(random_tensor(*shape, dtype=dtype, device=device), layout)


def make_norm(dtype: Any = torch.float64, device: Any = "cpu", **options: Any) -> Any:
    return random_state(torch.nn.BatchNorm2d(3, dtype=dtype, device=device, **options))


def own_pixels(stack: Any, pixels: Pixels) -> Any:
    """Active pixels of a stack, as float64 ``[C, n]``."""
    return stack.double().permute(1, 0, 2, 3)[:, pixels.own[:, 0]]


def by_definition(stack: Any, norm: Any, pixels: Pixels) -> Any:
    """Of float64, one formula after the other, through all of which gradients flow."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    if norm.training:
        values = own_pixels(stack, pixels)
        mean, var = values.mean(1), values.var(1, correction=0)
    normal = (stack.double() - mean[:, None, None]) / torch.sqrt(var + norm.eps)[:, None, None]
    y = functional.relu(norm.weight.double()[:, None, None] * normal + norm.bias.double()[:, None, None])
    return torch.where(pixels.ceiling > 0, y, 0)


@on_devices
@pytest.mark.parametrize("margin", MARGINS, ids=["none", "margin"])
def test_the_pixels_that_count(margin: Margin, device: str) -> None:
    grid = make_grid(device)
    pixels, inside = find_pixels(grid, margin), grid.inside(margin)
    assert torch.equal(pixels.ceiling, torch.where(inside, torch.inf, 0.0))
    assert bool((pixels.own <= inside).all())
    assert int(pixels.own.sum()) == int(grid.pixels().sum())
    assert margin == NO_MARGIN or int(pixels.own.sum()) < int(inside.sum())


@on_devices
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("margin", MARGINS, ids=["none", "margin"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_and_gradients(layout: str, margin: Margin, training: bool, device: str) -> None:
    norm, pixels = make_norm(device=device).train(training), find_pixels(make_grid(device), margin)
    stack = make_stack(margin, layout=layout, device=device).requires_grad_()
    inputs = stack, norm.weight, norm.bias
    found, expected = norm_relu(stack, norm, pixels), by_definition(stack, norm, pixels)
    torch.testing.assert_close(found, expected)
    seed = random_tensor(*found.shape, seed=1, dtype=torch.float64, device=device)
    grads = [torch.autograd.grad((y * seed).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@on_devices
@pytest.mark.parametrize("margin", MARGINS, ids=["none", "margin"])
def test_gradients_are_finite_differences(margin: Margin, device: str) -> None:
    norm, pixels = make_norm(device=device), find_pixels(make_grid(device), margin)
    rest = {"training": True, "eps": norm.eps, "momentum": norm.momentum, **dict(norm.named_buffers())}

    def run(stack: Any, weight: Any, bias: Any) -> Any:
        return norm_relu(stack, SimpleNamespace(weight=weight, bias=bias, **rest), pixels)

    stack = make_stack(margin, device=device).requires_grad_()
    assert torch.autograd.gradcheck(run, (stack, norm.weight, norm.bias))


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype: Any, device: str) -> None:
    """Sums of float32: half types round the result alone, and the gradient by the stack."""
    norm, pixels = make_norm(torch.float32, device), find_pixels(make_grid(device), MARGINS[1])
    stack = make_stack(MARGINS[1], dtype, device=device).requires_grad_()
    seed = random_tensor(*stack.shape, seed=1, dtype=dtype, device=device)
    found, expected = norm_relu(stack, norm, pixels), by_definition(stack, norm, pixels)
    assert found.dtype == dtype
    inputs, rounding = (stack, norm.weight, norm.bias), 2 * torch.finfo(dtype).eps
    near = {"rtol": rounding, "atol": 4 * rounding}
    torch.testing.assert_close(found.double(), expected, **near)
    grads = [torch.autograd.grad((y * seed.to(y.dtype)).sum(), inputs) for y in (found, expected)]
    for one, other, value in zip(*grads, inputs):
        assert one.dtype == value.dtype
        torch.testing.assert_close(one, other, **near)


@on_devices
def test_a_large_mean_leaves_the_variance_exact(device: str) -> None:
    """In float32, the mean of squares less the square of the mean would be wrong in the first digit."""
    norm, pixels = make_norm(torch.float32, device, momentum=1.0), find_pixels(make_grid(device), MARGINS[1])
    stack = make_stack(MARGINS[1], torch.float32, device=device) + 3000
    norm_relu(stack, norm, pixels)
    values = own_pixels(stack, pixels)
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-4, atol=0)


@on_devices
def test_running_statistics_without_momentum_are_the_mean_of_all_steps(device: str) -> None:
    norm, pixels = make_norm(device=device, momentum=None), find_pixels(make_grid(device), MARGINS[1])
    norm.reset_running_stats()
    stacks = [make_stack(MARGINS[1], device=device) * factor for factor in (1, 2, 5)]
    for stack in stacks:
        norm_relu(stack, norm, pixels)
    values = [own_pixels(stack, pixels) for stack in stacks]
    torch.testing.assert_close(norm.running_mean, torch.stack([v.mean(1) for v in values]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([v.var(1) for v in values]).mean(0))
    assert int(norm.num_batches_tracked) == 3


@on_devices
def test_a_second_derivative_is_an_error(device: str) -> None:
    pixels, stack = find_pixels(make_grid(device)), make_stack(NO_MARGIN, device=device).requires_grad_()
    y = norm_relu(stack, make_norm(device=device), pixels)
    (grad,) = torch.autograd.grad(y.square().sum(), stack, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@on_devices
def test_compiled_gradients(device: str) -> None:
    torch._dynamo.reset()
    pixels, grads = find_pixels(make_grid(device), MARGINS[1]), []
    for run in (norm_relu, torch.compile(norm_relu, fullgraph=True, backend="aot_eager")):
        norm, stack = make_norm(device=device), make_stack(MARGINS[1], device=device).requires_grad_()
        grads.append(torch.autograd.grad(run(stack, norm, pixels).square().sum(), (stack, norm.weight, norm.bias)))
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected)


class _BigOps(TorchDispatchMode):
    """Notes the ops that make or take a tensor of at least `size` numbers, and the layout of what they make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names, self.mixed = size, [], []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, tuple) else (result,)) if self._is_big(t)]
        name = op.overloadpacket.__name__
        if (made or any(map(self._is_big, args))) and name not in ("detach", "view", "alias"):
            self.names.append(name)
        self.mixed += [name for t in made if t.dim() == 4 and not t.is_contiguous(memory_format=torch.channels_last)]
        return result

    def _is_big(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.numel() >= self.size


@on_devices
def test_passes_over_a_stack(device: str) -> None:
    """Seven ops forward and seven backward: whoever adds one has to say why."""
    pixels, norm = find_pixels(make_grid(device), MARGINS[1]), make_norm(torch.float32, device)
    stack = make_stack(MARGINS[1], torch.float32, device=device).requires_grad_()
    seed = torch.ones_like(stack)
    with _BigOps(stack.numel()) as ops:
        y = norm_relu(stack, norm, pixels)
        y.backward(seed)
    forward = ["where", "sum", "sub", "where", "linalg_vector_norm", "addcmul", "clamp"]
    backward = ["threshold_backward", "sum", "mul", "sum", "addcmul", "where", "addcmul_"]
    assert ops.names == [*forward, *backward]
    assert ops.mixed == []


@on_devices
def test_a_training_step_copies_no_stack_and_mixes_no_layouts(device: str) -> None:
    block = random_state(SparseBottleneck(16, 8)).to(device, memory_format=torch.channels_last)
    x = lay_out(random_tensor(2, 16, 21, 30, device=device), "channels_last").requires_grad_()
    grid = SparseBlockGrid.from_mask(random_mask(2, 21, 30, 0.9, device=device), 8, capacity=24)
    with _BigOps(24 * 8 * 8 * 8) as ops:
        y = block(x, grid)
        y.backward(torch.ones_like(y))
    assert ops.names.count("convolution") == ops.names.count("convolution_backward") == 3
    moves = {"copy_", "clone", "_to_copy", "contiguous", "masked_fill", "fill_", "slice", "slice_backward"}
    assert not moves & set(ops.names)
    assert ops.mixed == []
