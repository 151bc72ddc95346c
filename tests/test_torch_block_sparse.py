"""Ordinary networks on active tiles: equal to themselves on whole images, or an error that names the layer."""

from __future__ import annotations

import copy
import doctest
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cases import lay_out, on_devices, random_mask, random_state, random_tensor  # noqa: E402

import sbnet_cupy.torch as sparse  # noqa: E402
from sbnet_cupy.torch import BlockSparse, SparseBlockGrid, _block_sparse  # noqa: E402

functional = nn.functional


@pytest.fixture(autouse=True)
def _ieee_float32() -> Any:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision writes it, with a projection, groups and dilation."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


class EncoderStage(nn.Module):
    """Of a U-Net: convolutions of several sizes, dense connections, dropout, biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, 6, (3, 5), padding="same"), nn.BatchNorm2d(6), nn.LeakyReLU(), nn.Dropout2d(0.5)
        )
        self.second = nn.Sequential(nn.Conv2d(6 + channels, 6, 4, padding="same"), nn.Sigmoid(), nn.Identity())
        self.third = nn.Conv2d(12, 5, 3, padding=(3, 1), dilation=(3, 1))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        a = self.first(x)
        b = self.second(torch.cat([a, x], dim=1))
        self.third(torch.cat([b, b], 1))  # leads to nothing
        c = self.third(torch.cat((a, 1 - b), 1))
        return functional.gelu(c, approximate="tanh") * 0.5 + functional.relu(c, inplace=False) - 1


class Activated(nn.Module):
    """Convolutions of what is, or is no longer, 0 outside of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()
        self.convs = nn.ModuleList(nn.Conv2d(4, 3, 3, padding=1) for _ in range(5))

    def forward(self, x: Any) -> Any:
        a, b, c, d, e = self.convs
        return (
            a(self.sigmoid(x)) * b(x + 1) + c(torch.sub(x, other=1)) * d(1 - x.relu()) + e(functional.gelu(2 * x + x))
        )


NETWORKS = {
    "activated": (Activated, (1, 1, 1, 1)),
    "basic": (lambda: BasicBlock(4), (2, 2, 2, 2)),
    "two-basic": (lambda: nn.Sequential(BasicBlock(4), BasicBlock(4)), (4, 4, 4, 4)),
    "bottleneck": (lambda: Bottleneck(4, 6, 8), (2, 2, 2, 2)),
    "encoder": (lambda: EncoderStage(4), (1 + 1 + 3, 1 + 2 + 3, 2 + 1 + 1, 2 + 2 + 1)),
    "pixels": (lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU()), (0, 0, 0, 0)),
}


def near(found: Any, expected: Any, where: Any) -> None:
    where = where.expand_as(expected)
    assert where.any()
    torch.testing.assert_close(torch.where(where, found, 0), torch.where(where, expected, 0), rtol=1e-4, atol=1e-4)


@on_devices
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_whole_image(name: str, layout: str, device: str) -> None:
    make, margin = NETWORKS[name]
    dense = random_state(make()).to(device).eval()
    x = lay_out(random_tensor(2, 4, 21, 30, device=device), layout)
    mask = random_mask(2, 21, 30, device=device)
    before = x.clone()
    with torch.no_grad():
        expected = dense(x)
        for capacity in (None, 30):
            network = BlockSparse(dense, 8, capacity=capacity)
            assert tuple(network.margin) == margin
            y, where = network(x, mask), SparseBlockGrid.from_mask(mask, 8).pixels()
            near(y, expected, where)
            assert bool((y[~where.expand_as(y)] == 0).all())
            base = random_tensor(*expected.shape, seed=3, device=device)
            assert torch.equal(network(x, mask[:, None], base), torch.where(where, y, base))
        # Tiles that hang over the edges, and some larger than the image.
        for tile in ((5, 7), (40, 3)):
            everywhere = SparseBlockGrid.from_mask(torch.ones_like(mask), tile)
            near(network(x, everywhere), expected, torch.ones_like(mask)[:, None])
    assert torch.equal(x, before)
    # Pixels beyond the margin play no part.
    far = functional.max_pool2d(where.float(), 2 * max(margin) + 1, 1, max(margin)) == 0
    assert far.any()
    noisy = network(torch.where(far, float("nan"), x), SparseBlockGrid.from_mask(mask, 8))
    near(noisy, expected, where)


@on_devices
@pytest.mark.parametrize("name", ["basic", "encoder"])
def test_gradients(name: str, device: str) -> None:
    dense = random_state(NETWORKS[name][0]()).double().to(device).eval()
    network, mask = BlockSparse(dense, 8), random_mask(2, 21, 30, device=device)
    where = SparseBlockGrid.from_mask(mask, 8).pixels()
    grads = []
    for run in (lambda x: network(x, mask), dense):
        x = random_tensor(2, 4, 21, 30, dtype=torch.float64, device=device).requires_grad_()
        dense.zero_grad()
        (torch.where(where, run(x), 0) ** 2).sum().backward()
        grads.append([x.grad, *(p.grad for p in dense.parameters() if p.grad is not None)])
    assert len(grads[0]) > 4
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@on_devices
def test_compiled(device: str) -> None:
    torch._dynamo.reset()
    network = BlockSparse(random_state(BasicBlock(4)).to(device).eval(), 8, capacity=20)
    x, mask = random_tensor(2, 4, 21, 30, device=device), random_mask(2, 21, 30, device=device)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), network(x, mask))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask), network(x, mask))


@on_devices
def test_copies(device: str) -> None:
    dense = random_state(BasicBlock(4)).to(device).eval()
    network, mask = BlockSparse(dense, 8), random_mask(2, 21, 30, device=device)
    x = random_tensor(2, 4, 21, 30, device=device)
    assert list(network.state_dict()) == [f"module.{name}" for name in dense.state_dict()]
    with torch.no_grad():
        expected = network(x, mask)
        for other in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
            assert torch.equal(other(x, mask), expected)
            other.module.conv1.weight.mul_(2)
            assert not torch.equal(other(x, mask), expected)
        assert torch.equal(network(x, mask), expected)


def sequence(*layers: Any) -> Any:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers)


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


REFUSED = {
    "stride": (sequence(nn.Conv2d(4, 4, 3, stride=2, padding=1)), r"^1: expected stride 1, got \(2, 2\)"),
    "valid": (sequence(nn.Conv2d(4, 4, 3)), r"^1: expected 'same' padding.* got padding \(0, 0\)"),
    "reflect": (
        sequence(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        "^1: expected padding_mode 'zeros', got 'reflect'",
    ),
    "pooling": (sequence(nn.AdaptiveAvgPool2d(1)), r"^1: expected a convolution .* got AdaptiveAvgPool2d"),
    "max-pooling": (sequence(nn.MaxPool2d(3, 1, 1)), "^1: expected a convolution .* got MaxPool2d"),
    "group-norm": (sequence(nn.GroupNorm(2, 4)), "^1: expected a convolution .* got GroupNorm"),
    "no-statistics": (sequence(nn.BatchNorm2d(4, track_running_stats=False)), "^1: expected running statistics"),
    "transposed": (sequence(nn.ConvTranspose2d(4, 4, 3, padding=1)), "^1: expected .* got ConvTranspose2d"),
    "attention": (
        Lambda(lambda self, x: self.conv(x).flatten(2).softmax(-1)),
        "^flatten: expected a layer or function that works on each pixel alone, got flatten",
    ),
    "mean": (Lambda(lambda self, x: x * torch.mean(x)), "^mean: expected a layer or function .* got mean"),
    "squeeze": (Lambda(lambda self, x: x - x.mean((2, 3), keepdim=True)), "^mean: expected a layer or function"),
    "parameter": (Lambda(lambda self, x: x * self.gamma), "^gamma: expected a layer or function .* got gamma"),
    "rows": (Lambda(lambda self, x: torch.cat([x, x], 2)), "^cat: expected to join channels, dim=1, got dim=2"),
    "two-results": (Lambda(lambda self, x: (x, x)), "^Lambda: expected one tensor as the result"),
    "branch": (Lambda(lambda self, x: x if x.sum() > 0 else -x), "^Lambda: expected a network that torch.fx can trace"),
    "in-place": (
        Lambda(lambda self, x: functional.relu(self.conv(x), inplace=True) + x.relu_()),
        "^relu_: expected not to work in place on a tensor that is used again, by conv",
    ),
    "no-input": (Lambda(lambda self, x: self.conv(input=x)), "^conv: expected one tensor as its argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_named(name: str) -> None:
    module, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        BlockSparse(module)


class TwoInputs(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        return x + y


def test_two_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^y: expected a network of one input, got another one"):
        BlockSparse(TwoInputs())


def test_in_place_behind_a_layer_that_does_nothing() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.relu = nn.Identity(), nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            return self.relu(self.same(x)) + x

    with pytest.raises(ValueError, match=r"^relu: expected not to work in place"):
        BlockSparse(Aliased())


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout(0.5)])
def test_training_mode_is_refused(layer: Any) -> None:
    network = BlockSparse(sequence(layer))
    x, mask = torch.ones(1, 4, 20, 20), torch.ones(1, 20, 20)
    with pytest.raises(ValueError, match=r"^1: expected eval mode on active tiles, got .* in training mode"):
        network(x, mask)
    network.eval()(x, mask)


def test_images_that_do_not_fit() -> None:
    network, x = BlockSparse(sequence()), torch.ones(1, 4, 20, 20)
    with pytest.raises(ValueError, match=r"^x: expected shape \(1, C, 20, 21\) like the mask's, got \(1, 4, 20, 20\)"):
        network(x, torch.ones(1, 20, 21))
    with pytest.raises(ValueError, match=r"^base: expected shape"):
        network(x, torch.ones(1, 20, 20), torch.ones(1, 4, 20, 21))


def test_the_example_of_the_docstring() -> None:
    found = doctest.testmod(_block_sparse)
    assert found.attempted > 5
    assert not found.failed
    assert sparse.BlockSparse is BlockSparse
