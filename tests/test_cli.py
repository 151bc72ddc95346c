"""The ``sbnet-cupy`` command: the demonstration, its check, its errors, and the report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sbnet_cupy
from sbnet_cupy import _cli, _demo, _demo_figure, _demo_network, _demo_picture, _info

skimage_io = pytest.importorskip("skimage.io", reason="the demonstration needs scikit-image")
pytest.importorskip("matplotlib", reason="the demonstration needs matplotlib")

ROOT = Path(__file__).parents[1]


def command(*arguments: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sbnet_cupy`` of this checkout in the folder `cwd`."""
    return python("-m", "sbnet_cupy", *arguments, cwd=cwd, **variables)


def python(*arguments: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "PYTHONPATH": str(ROOT),
        # A machine with a GPU need not build the default set again for each bad argument.
        "SBNET_CUPY_JIT": "lazy",
        # On a busy machine, threads that wait for each other make NumPy's products ten times as slow.
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | settings | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def save(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    skimage_io.imsave(path, pixels, check_contrast=False)
    return path


def spots(height: int, width: int) -> np.ndarray[Any, Any]:
    """A dark picture with a bright spot in a corner and one in the middle."""
    picture = np.full((height, width, 3), 10, np.uint8)
    picture[:2, :3] = (255, 200, 100)
    picture[height // 2 : height // 2 + 4, width // 2 : width // 2 + 4] = (90, 220, 255)
    return picture


def numbers(output: str) -> dict[str, float]:
    """The numbers that the demonstration prints."""
    patterns = {
        "picture": r"picture +\S+, (?P<width>\d+) x (?P<height>\d+) pixels",
        "mask": r"mask +(?P<masked>[\d.]+)% of pixels",
        "blocks": r"blocks +(?P<active>\d+) of (?P<blocks>\d+) active, (?P<columns>\d+) x (?P<rows>\d+) "
        r"pixels each: (?P<skipped>[\d.]+)% skipped",
        "pixels": r"pixels +(?P<convolved>\d+) convolved by each layer, halos included, of (?P<pixels>\d+): "
        r"(?P<share>[\d.]+)%",
        "sparse": r"sparse +(?P<sparse>[\d.]+) ms",
        "dense": r"dense +(?P<dense>[\d.]+) ms: convolution, bottlenecks: (?P<times>[\d.]+) times as long",
    }
    found: dict[str, float] = {}
    for name, pattern in patterns.items():
        match = re.search(f"^{pattern}", output, re.MULTILINE)
        assert match, f"no line {name!r} in:\n{output}"
        found |= {key: float(value) for key, value in match.groupdict().items()}
    return found


def check_png(path: Path) -> None:
    image = skimage_io.imread(path)
    assert image.dtype == np.uint8
    assert 500 < image.shape[0] < 5000
    assert 1500 < image.shape[1] < 2500
    assert image[..., :3].std() > 10


def one_line(stderr: str) -> str:
    """The only line of `stderr`."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("sbnet-cupy: error: ")
    return lines[0]


def in_process(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, in this process."""
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(_cli.main([str(argument) for argument in arguments]))
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


# The demonstration

#: The command with a clock that other programs do not speed up or slow down: its own CPU time, in one thread. Where the
#: demonstration finds a GPU, it asks that for the time.
ON_CPU_TIME = (
    "import runpy, time; time.perf_counter = time.process_time; runpy.run_module('sbnet_cupy', run_name='__main__')"
)


def test_default_run(tmp_path: Path) -> None:
    done = python("-c", ON_CPU_TIME, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote     sbnet-cupy.png" in done.stdout
    check_png(tmp_path / "sbnet-cupy.png")

    found = numbers(done.stdout)
    name, picture = _demo_picture.load_picture(None)
    assert name == "hubble_deep_field.jpg"
    height, width = picture.shape[:2]
    assert (found["height"], found["width"]) == (height, width) == (872, 1000)
    assert (found["rows"], found["columns"]) == (8, 8)

    # The mask anew: brightness more than 0.5 of 255 away from the median.
    brightness = (picture @ np.array([1, 2, 1], np.int64)) / 4
    mask = np.abs(brightness - np.median(brightness)) > 0.5 * 255
    active = sbnet_cupy.reduce_mask(mask[np.newaxis], (109, 125), bsize=(14, 14), boffset=(-3, -3), bstride=(8, 8))
    count = int(active.bin_counts[0])
    assert (found["active"], found["blocks"]) == (count, 109 * 125)
    assert found["masked"] == pytest.approx(100 * mask.mean(), abs=0.06)
    assert found["skipped"] == pytest.approx(100 * (1 - count / (109 * 125)), abs=0.06)
    assert 60 <= found["skipped"] <= 90
    assert (found["convolved"], found["pixels"]) == (count * 10 * 10, height * width)
    assert found["share"] == pytest.approx(100 * count * 10 * 10 / (height * width), abs=0.06)
    assert found["sparse"] > 0
    assert found["times"] == pytest.approx(found["dense"] / found["sparse"], rel=0.01)
    assert found["times"] > 1.2, "the ideal is 2.7; 2.0 to 2.7 were seen, with five other programs running as well"
    check = re.search(r"equal to the dense network on (\d+) pixels, all (\d+) masked ones among them", done.stdout)
    assert check is not None
    assert int(check[2]) == mask.sum() < int(check[1]) < 64 * count
    assert f"and on all {height * width} to a dense network that drops inactive blocks" in done.stdout


def test_runs_on_numpy_where_no_device_is_visible(tmp_path: Path) -> None:
    image = save(tmp_path / "spots.png", spots(45, 70))
    arguments = ("--image", image, "--bsize", 8, "--tol", 0.25, "--output", "out.png")
    done = command(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"sbnet-cupy \S+ on NumPy \S+ \(.*(CUDA|CuPy).*\)$", done.stdout.splitlines()[0])
    found = numbers(done.stdout)
    # Blocks of 8 in 45 x 70 pixels: 6 x 9. The middle spot, rows 22 to 25 and columns 35 to 38, is in
    # block rows 2 and 3 and in block column 4, and no others are within 3 pixels of it, rows 19 to 28 and
    # columns 32 to 41, but those of column 5; the other spot is in the corner.
    assert (found["active"], found["blocks"]) == (5, 54)
    assert found["convolved"] == 5 * 10 * 10
    check_png(tmp_path / "out.png")


@pytest.mark.parametrize(
    "pixels",
    [
        pytest.param(spots(30, 40)[..., 0].astype(np.uint16) * 257, id="16-bit gray"),
        pytest.param(np.dstack([spots(30, 40), np.full((30, 40), 128, np.uint8)]), id="rgba"),
    ],
)
def test_kinds_of_images(pixels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = save(tmp_path / "in.png", pixels)
    output = tmp_path / "out.png"
    options = ("--image", image, "--bsize", 7, "--tol", 0.2, "--output", output)
    status, stdout, stderr = in_process(capsys, *options)
    assert (status, stderr) == (0, "")
    found = numbers(stdout)
    assert (found["height"], found["width"], found["blocks"]) == (30, 40, 5 * 6)
    # The middle spot, rows 15 to 18 and columns 20 to 23, is within 3 pixels of block rows 1 to 3 and of block
    # columns 2 and 3; the other one is in the corner.
    assert found["active"] == 7
    assert "check     exactly equal" in stdout
    check_png(output)


def test_cmyk_image(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    inks = image_module.fromarray(spots(30, 40)).convert("CMYK")
    inks.save(tmp_path / "in.jpg", quality=100, subsampling=0)
    _, picture = _demo_picture.load_picture(tmp_path / "in.jpg")
    np.testing.assert_allclose(picture, spots(30, 40), atol=8)


def test_palette_image(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image_module.fromarray(spots(30, 40)).quantize(8).save(tmp_path / "in.png")
    _, picture = _demo_picture.load_picture(tmp_path / "in.png")
    np.testing.assert_allclose(picture, spots(30, 40), atol=8)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (np.array([[0, 255]], np.uint8), [[[0, 0, 0], [255, 255, 255]]]),
        (np.array([[False, True]]), [[[0, 0, 0], [255, 255, 255]]]),
        (np.array([[255, 256, 65535]], np.uint16), [[[0, 0, 0], [1, 1, 1], [255, 255, 255]]]),
        (np.array([[-1.0, np.nan, 1.0, np.inf]]), [[[0] * 3, [127] * 3, [255] * 3, [127] * 3]]),
        (np.array([[7, 7]], np.int16), [[[0, 0, 0], [0, 0, 0]]]),
        (np.array([[[1, 2]]], np.uint8), [[[1, 1, 1]]]),  # gray and alpha
        (np.array([[[1, 2, 3, 4]]], np.uint8), [[[1, 2, 3]]]),  # RGB and alpha
        (np.array([[[[1, 2, 3]]], [[[4, 5, 6]]]], np.uint8), [[[1, 2, 3]]]),  # two frames
        (np.arange(10, dtype=np.uint8).reshape(2, 1, 5), [[[v] * 3 for v in range(5)]]),  # two gray frames
    ],
)
def test_any_pixels_become_rgb(raw: Any, expected: Any) -> None:
    picture = _demo_picture.to_rgb(raw)
    assert picture.dtype == np.uint8
    assert picture.tolist() == expected


def test_one_pixel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = save(tmp_path / "in.png", np.full((1, 1, 3), 200, np.uint8))
    output = tmp_path / "out.png"
    status, stdout, stderr = in_process(capsys, "--image", image, "--bsize", 10**12, "--output", output)
    assert (status, stderr) == (0, "")
    assert numbers(stdout)["active"] == 0, "nothing differs from the median"
    assert "and on all 1 to a dense network that drops inactive blocks" in stdout
    assert skimage_io.imread(output).ndim == 3


@pytest.mark.parametrize(
    ("bsize", "tol", "tile", "active", "blocks"),
    [
        (10**12, 0.5, (20, 30), 1, 1),
        (25, 0.25, (20, 25), 1, 2),
        (1, 0.25, (1, 1), 5 * 6 + 10 * 10, 600),
        (16, 0, (16, 16), 4, 4),
        (16, 1, (16, 16), 0, 4),
    ],
)
def test_extremes(bsize: int, tol: float, tile: tuple[int, int], active: int, blocks: int) -> None:
    outcome = _demo.run(spots(20, 30), bsize, tol, np)
    assert outcome.tile == tile
    assert (outcome.active_blocks, outcome.active.size) == (active, blocks)
    assert outcome.differing_pixels == 0


# The network


def edge_features(picture: np.ndarray[Any, Any], network: _demo_network.Network) -> np.ndarray[Any, Any]:
    """Features [H, W, direction] of the dense network, colours added up."""
    features: np.ndarray[Any, Any] = network.dense(picture[np.newaxis].astype(np.float32))[0]
    return features.reshape(*features.shape[:2], 3, 8).sum(axis=2)


def test_edges_excite_their_direction_and_have_its_colour() -> None:
    """Bright above and dark below excites the first direction most, which is red; the opposite is cyan."""
    network = _demo_network.Network.on(np)
    picture = np.zeros((30, 30, 3))
    picture[:15] = 100
    found = edge_features(picture, network)
    assert found[15, 15].argmax() == found[14, 15].argmax() == 0
    assert not found[8, 15].any(), "a flat area has no edges"
    red, green, blue = _demo_figure.colour(network.dense(picture[np.newaxis].astype(np.float32))[0])[15, 15]
    assert red > 3 * green > 0
    assert green == blue
    assert edge_features(picture[::-1], network)[15, 15].argmax() == 4
    assert edge_features(picture.transpose(1, 0, 2), network)[15, 15].argmax() == 6, "bright on the left"


def test_contours_gain_more_than_dots() -> None:
    network = _demo_network.Network.on(np)
    stem = _demo_network.Network(network.stem, ())
    picture = np.zeros((20, 60, 3))
    picture[10, 3:40] = picture[10, 50] = 200  # a line, and a dot
    before, after = edge_features(picture, stem), edge_features(picture, network)
    line, dot = (after[11, column, 0] / before[11, column, 0] for column in (20, 50))
    assert line > 1.5 * dot
    faint = edge_features(picture / 20, network)
    assert np.array_equal(faint, edge_features(picture / 20, stem)), "noise gets no support"


def test_every_sum_is_exact_in_float32() -> None:
    """All terms are multiples of `unit`, and no sum of some of them, in any order, exceeds 2**24 units."""
    network = _demo_network.Network.on(np)

    def check(largest: Any, unit: float) -> None:
        assert np.max(largest) <= 2**24 * unit

    def convolved(largest: Any, w: Any, unit: float) -> Any:
        assert np.array_equal(w, np.round(w)), "whole numbers, so that the unit stays"
        check(largest @ np.abs(w).sum(axis=(0, 1)), unit)
        # ReLU follows, or there are no negative weights: only the positive ones make results large.
        return largest @ np.maximum(w, 0).sum(axis=(0, 1))

    unit, largest = 1.0, convolved(np.full(3, 255.0), network.stem, 1.0)
    for weights in network.chain:
        assert (weights.scale1 == 1).all()
        assert (weights.shift1 <= 0).all()
        assert np.array_equal(weights.shift1, np.round(weights.shift1))
        assert (weights.scale2 == 1).all()
        assert not weights.shift2.any()
        assert (weights.scale3 == 1 / 8).all()
        assert not weights.shift3.any()
        assert (weights.conv1 >= 0).all()
        assert (weights.conv3 >= 0).all()
        inner = convolved(convolved(largest, weights.conv1, unit), weights.conv2, unit) / 8
        unit /= 8
        largest = largest + convolved(inner, weights.conv3, unit)
        check(largest, unit)
    assert largest.max() < 2**15
    assert unit == 2**-9


# The check


def test_sparse_equals_dense_where_it_has_to_and_only_there() -> None:
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 60, (61, 83, 3)).astype(np.uint8)
    picture[20:30, 40:50] = 255
    picture[58:] = 255  # the border counts as the dense network's zeros
    outcome = _demo.run(picture, 9, 0.5, np)
    assert outcome.differing_pixels == 0
    assert outcome.mask.any()
    assert not (outcome.mask & ~outcome.certain).any()
    assert np.array_equal(outcome.sparse[outcome.certain], outcome.dense[outcome.certain])
    pixels = _demo.tile_pixels(outcome.active, outcome.tile, outcome.mask.shape)
    assert not outcome.sparse[~pixels].any()
    rim = pixels & ~outcome.certain
    assert (outcome.sparse[rim] != outcome.dense[rim]).any()


def test_active_tiles_are_those_near_the_mask() -> None:
    mask = np.zeros((40, 50), bool)
    mask[19, 24] = True
    rows, columns = np.nonzero(_demo.active_tiles(mask, (4, 5)))
    # Rows 16 to 22 and columns 21 to 27.
    assert sorted(set(rows.tolist())) == [4, 5]
    assert sorted(set(columns.tolist())) == [4, 5]


def test_check_finds_a_wrong_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _demo_network.Network.sparse

    def sparse(*arguments: Any) -> Any:
        features, indices = right(*arguments)
        features[0, 3, 2, 1] += 4
        return features, indices

    monkeypatch.setattr(_demo_network.Network, "sparse", sparse)
    image = save(tmp_path / "in.png", spots(40, 50))
    status, stdout, stderr = in_process(capsys, "--image", image, "--output", tmp_path / "out.png")
    assert status == 1
    assert "check     MISMATCH: 1 of 2000 pixels differ from what the dense network computes, by up to 4 of" in stdout
    assert one_line(stderr).endswith("the sparse result differs from the dense one")
    check_png(tmp_path / "out.png")  # to see what is wrong


def test_check_finds_a_missed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def block_indices(*arguments: Any, **options: Any) -> sbnet_cupy.BlockIndices:
        indices, counts = sbnet_cupy.block_indices(*arguments, **options)
        return sbnet_cupy.BlockIndices(indices[:-1], counts)

    monkeypatch.setattr(_demo_network, "block_indices", block_indices)
    assert _demo.run(spots(40, 50), 8, 0.5, np).differing_pixels > 0


def test_check_finds_a_missing_halo(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(*arguments: Any, **options: Any) -> Any:
        stack = sbnet_cupy.sparse_gather(*arguments, **options)
        stack[:, :, 0] = stack[:, :, -1] = 0
        return stack

    picture = np.zeros((16, 48, 3), np.uint8)
    picture[4:9, 20:28] = 200  # lies across two blocks
    assert _demo.run(picture, 8, 0.5, np).differing_pixels == 0
    monkeypatch.setattr("sbnet_cupy._stack.sparse_gather", gather)
    assert _demo.run(picture, 8, 0.5, np).differing_pixels > 0


def test_check_finds_a_skipped_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo_network, "sparse_res_block_bottleneck", lambda x, *_, **__: x)
    assert _demo.run(spots(40, 50), 8, 0.5, np).differing_pixels > 0


@pytest.mark.parametrize(("enough", "calls"), [(0.0, 1), (1e9, 1 + _demo.RUNS)])
def test_slow_networks_are_timed_less_often(enough: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo, "ENOUGH_SECONDS", enough)
    made: list[str] = []
    results, clock = _demo.time_in_turn([lambda: made.append("dense"), lambda: made.append("sparse") or 7])
    assert made == ["dense", "sparse"] * calls
    assert results == [None, 7]
    assert clock.dense_seconds > 0
    assert clock.sparse_seconds > 0
    assert ("one run of each" in clock.method) == ("warm-up" not in clock.method) == (calls == 1)


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bsize", "0"], "argument --bsize: expected an integer >= 1, got '0'"),
        (["--bsize", "2.5"], "argument --bsize: expected an integer >= 1, got '2.5'"),
        (["--tol", "1.5"], "argument --tol: expected a number from 0 to 1, got '1.5'"),
        (["--tol=-0.1"], "argument --tol: expected a number from 0 to 1, got '-0.1'"),
        (["--tol", "nan"], "argument --tol: expected a number from 0 to 1, got 'nan'"),
        (["--tol", "some"], "argument --tol: expected a number from 0 to 1, got 'some'"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["help"], "invalid choice: 'help'"),
        (["--image", "absent.png"], "--image: expected an image file, got no file: 'absent.png'"),
        (["--image", "folder"], "--image: expected an image file, got the directory 'folder'"),
        (["--image", "text.png"], "--image: expected a readable image, got 'text.png': "),
        (["--image", "cut.png"], "--image: expected a readable image, got 'cut.png': "),
        (["--output", "folder"], "--output: expected a file to write, got the directory 'folder'"),
        (["--output", "absent/out.png"], "--output: expected a file in an existing directory, got "),
        (["--output", "text.png/out.png"], "--output: expected a file in an existing directory, got "),
        (["--image", "cut.png", "--output", "./cut.png"], "--output: expected another file than --image"),
    ],
)
def test_bad_argument_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no picture\nat all\n")
    whole = save(tmp_path / "cut.png", spots(90, 90)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    before = sorted(tmp_path.rglob("*"))
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in one_line(done.stderr)
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "cut.png").read_bytes() == whole[: len(whole) // 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = save(tmp_path / "in.png", spots(20, 30))
    status, _, stderr = in_process(capsys, "--image", image, "--output", "/dev/full")
    assert status == 2
    assert "--output: expected a file that can be written, got '/dev/full': No space left" in one_line(stderr)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    status, _, stderr = in_process(capsys, "--output", tmp_path / "out.png")
    assert status == 2
    assert "permission denied" in one_line(stderr)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("skimage", "scikit-image"),
        ("matplotlib.figure", "matplotlib"),
    ],
)
def test_missing_dependency(
    module: str,
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    status, stdout, stderr = in_process(capsys, "--output", tmp_path / "out.png")
    assert (status, stdout) == (1, "")
    assert f'{package} is needed: pip install "sbnet-cupy[demo]"' in one_line(stderr)


def test_not_enough_memory(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def conv2d(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr(_demo_network, "conv2d", conv2d)
    image = save(tmp_path / "in.png", spots(20, 30))
    status, _, stderr = in_process(capsys, "--image", image, "--output", tmp_path / "out.png")
    assert status == 1
    assert one_line(stderr).endswith("not enough memory for this picture: Unable to allocate 7 TiB")


# The rest of the command


def test_help_names_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, stdout, stderr = in_process(capsys, "--help")
    assert (status, stderr) == (0, "")
    for word in ("usage: sbnet-cupy", "--image PATH", "--bsize N", "--tol T", "--output PATH", "info", "PNG"):
        assert word in stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "--version") == (0, f"sbnet-cupy {sbnet_cupy.__version__}\n", "")


def test_import_is_light(tmp_path: Path) -> None:
    heavy = {"cupy", "matplotlib", "skimage"}
    program = f"import sys, sbnet_cupy._cli; print({heavy} & set(sys.modules))"
    done = python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


FACTS = [
    "sbnet_cupy",
    "Python",
    "platform",
    "NumPy",
    "CuPy",
    "CUDA runtime",
    "CUDA driver",
    "NVRTC",
    "device",
    "compute capability",
    "device memory",
    "kernels folder",
    "CuPy kernel cache",
    "SBNET_CUPY_JIT",
    "at import",
    "compiled now",
]


def facts(report: str) -> dict[str, str]:
    lines = [line for line in report.splitlines() if not line.startswith("  ")]
    return {line[:20].strip(): line[20:] for line in lines}


def test_info(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "a.cubin").write_bytes(bytes(2**20))
    (cache / "b.cubin").write_bytes(bytes(2**19))
    done = command("info", cwd=tmp_path, CUPY_CACHE_DIR=str(cache))
    assert (done.returncode, done.stderr) == (0, "")
    found = facts(done.stdout)
    assert list(found) == FACTS
    assert found["sbnet_cupy"].startswith(f"{sbnet_cupy.__version__} (")
    assert found["NumPy"] == np.__version__
    assert found["kernels folder"].startswith(str(ROOT / "kernels"))
    assert found["CuPy kernel cache"] == f"{cache} (2 files, 1.5 MiB)"
    assert found["SBNET_CUPY_JIT"] == "lazy"
    assert found["compiled now"] == "0 kernels"
    assert "failed" not in done.stdout


def test_info_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = facts(_info.report())
    assert list(found) == FACTS
    for name in ("CuPy", "CUDA runtime", "CUDA driver", "NVRTC", "device", "compute capability"):
        assert found[name] == "not installed"
    assert found["NumPy"] == np.__version__


@pytest.mark.gpu
def test_info_names_the_device() -> None:
    import cupy

    found = facts(_info.report())
    assert found["CuPy"] == cupy.__version__
    assert found["compute capability"].replace(".", "") == cupy.cuda.Device().compute_capability
    for name in ("CUDA driver", "NVRTC"):
        assert re.fullmatch(r"\d+\.\d+", found[name])
    assert found["device memory"].endswith(" GiB")


@pytest.mark.gpu
def test_uses_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = save(tmp_path / "in.png", spots(45, 70))
    status, stdout, stderr = in_process(capsys, "--image", image, "--output", tmp_path / "out.png")
    assert (status, stderr) == (0, "")
    assert " on CuPy " in stdout.splitlines()[0]
    assert "replays of CUDA graphs" in stdout
    assert "check     exactly equal" in stdout


def test_info_survives_a_broken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("kernel sources: expected gather.cu\nsomewhere")

    monkeypatch.setattr("sbnet_cupy._sources.kernel_folder", fail)
    found = facts(_info.report())
    assert found["kernels folder"] == "failed: RuntimeError: kernel sources: expected gather.cu somewhere"
    assert list(found) == FACTS
