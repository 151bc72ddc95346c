"""What is compiled, when, and what happens if it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sbnet_cupy
from sbnet_cupy import _instances, _jit
from sbnet_cupy._sources import kernel_folder

ROOT = Path(sbnet_cupy.__file__).parent.parent


def python(code: str, *, root: Path = ROOT, check: bool = True, **environment: str) -> Any:
    """Run `code` in a fresh interpreter that imports the package from `root`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,  # comes before PYTHONPATH
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )


def test_expressions_spell_the_template_arguments() -> None:
    walk = _instances.Walk("channels", 16)
    half = np.dtype(np.float16)
    assert _instances.gather_instance(walk, (18, 20)) == (
        "gather.cu",
        "sbnet::gather<sbnet::Copy<16>, unsigned int, 18, 20, sbnet::Order::kChannels>",
    )
    assert _instances.gather_instance(_instances.Walk("columns", 2), (3, 4)).expression == (
        "sbnet::gather<sbnet::Copy<2>, unsigned int, 3, 4, sbnet::Order::kColumns>"
    )
    assert _instances.scatter_instance(walk, (16, 16), half, True) == (
        "scatter.cu",
        "sbnet::scatter<sbnet::Sum<__half, 8>, unsigned int, 16, 16, sbnet::Order::kChannels, false>",
    )
    assert _instances.scatter_instance(walk, (16, 16), half, False, overlaps=True).expression == (
        "sbnet::scatter<sbnet::Overwrite<16>, unsigned int, 16, 16, sbnet::Order::kChannels, true>"
    )
    tiled = _instances.Walk("tiled", 8, True, channel_lanes=2, pixel_lanes=1, wide=True)
    assert _instances.gather_instance(tiled, (3, 4)) == (
        "gather.cu",
        "sbnet::gather_tiled<8, unsigned long long, 3, 4, true, 2, 1>",
    )
    assert _instances.scatter_instance(tiled, (3, 4), np.dtype(np.complex64), True, overlaps=True) == (
        "scatter.cu",
        "sbnet::scatter_tiled<sbnet::Sum<float, 2>, unsigned long long, 3, 4, true, 2, 1, true>",
    )


@pytest.mark.parametrize(
    ("dtype", "apart", "overlapping"),
    [("int8", 4, 4), ("float16", 16, 8), ("float32", 16, 16), ("complex64", 16, 16), ("complex128", 16, 16)],
)
def test_words_are_as_wide_as_registers_allow(dtype: str, apart: int, overlapping: int) -> None:
    for overlaps, widest in ((False, apart), (True, overlapping)):
        assert _instances.max_word(np.dtype(dtype), True, overlaps) == widest
        assert _instances.max_word(np.dtype(dtype), False, overlaps) == 16


def test_lanes_are_16_or_4_bytes_or_single() -> None:
    channels = {size: _instances.channel_lane_counts(size) for size in (1, 2, 4, 8, 16)}
    assert channels == {1: (16, 4, 1), 2: (8, 2, 1), 4: (4, 1), 8: (2, 1), 16: (1,)}
    pixels = {size: _instances.pixel_lane_counts(size) for size in (1, 2, 4, 8, 16)}
    assert pixels == {1: (16, 1), 2: (8, 1), 4: (4, 1), 8: (2, 1), 16: (1,)}


def test_size_table_is_that_of_the_original() -> None:
    assert set(_instances.SIZE_TABLE) == {*range(1, 35), 41, 48, 63, 64, 65, 81}
    assert set(_instances.DEFAULT_SIZES) <= set(_instances.SIZE_TABLE)


def test_precompile_names_everything_a_dtype_can_need() -> None:
    found = {i.expression for i in _instances.instances_for([(5, 6)], [np.dtype(np.float16)])}
    for word in (2, 4, 8, 16):
        where = "unsigned int, 5, 6, sbnet::Order::kChannels"
        assert f"sbnet::gather<sbnet::Copy<{word}>, {where}>" in found
        for overlaps, widest in (("false", 16), ("true", 8)):
            assert f"sbnet::scatter<sbnet::Overwrite<{word}>, {where}, {overlaps}>" in found
            added = f"sbnet::scatter<sbnet::Sum<__half, {word // 2}>, {where}, {overlaps}>"
            assert (added in found) == (word <= widest)
    assert "sbnet::gather<sbnet::Copy<2>, unsigned int, 5, 6, sbnet::Order::kColumns>" in found
    assert "sbnet::block_activity<__half, sbnet::AveragePool, 8>" in found
    for channel_lanes in (1, 2, 8):
        assert f"sbnet::gather_tiled<2, unsigned int, 5, 6, false, {channel_lanes}, 1>" in found
        for pixel_lanes in (1, 8):
            lanes = f"true, {channel_lanes}, {pixel_lanes}"
            assert f"sbnet::gather_tiled<2, unsigned int, 5, 6, {lanes}>" in found
            assert f"sbnet::scatter_tiled<sbnet::Sum<__half, 1>, unsigned int, 5, 6, {lanes}, true>" in found


@pytest.mark.parametrize(
    ("bsizes", "dtypes", "message"),
    [
        ([0], ["float32"], "bsizes: expected two integers"),
        ([(1, 2, 3)], ["float32"], "bsizes: expected two integers"),
        (["a"], ["float32"], "bsizes: expected two integers"),
        ([8], ["datetime64[s]"], "dtypes: expected numeric or bool dtypes"),
    ],
)
def test_precompile_rejects_what_the_ops_reject(bsizes: Any, dtypes: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sbnet_cupy.precompile(bsizes, dtypes)


def test_precompile_says_what_is_missing() -> None:
    # As on a machine without a driver: the device is hidden, CuPy may be there or not.
    result = python("import sbnet_cupy; sbnet_cupy.precompile([8])", check=False, CUDA_VISIBLE_DEVICES="")
    assert "RuntimeError: precompile needs CuPy and a CUDA device: " in result.stderr


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_import_without_a_visible_device_does_nothing(hidden: str) -> None:
    code = """
import sys, sbnet_cupy
from sbnet_cupy import _jit
assert "cupy" not in sys.modules
assert _jit.compiled() == []
print(_jit.import_report())
"""
    assert python(code, CUDA_VISIBLE_DEVICES=hidden).stdout == "nothing built at import\n"


def test_lazy_import_touches_no_device() -> None:
    code = """
import sys, sbnet_cupy
from pathlib import Path
from sbnet_cupy import _jit
assert "cupy" not in sys.modules
maps = Path("/proc/self/maps")
assert not maps.exists() or "libcuda" not in maps.read_text()
print(_jit.import_report())
"""
    assert python(code, SBNET_CUPY_JIT="lazy").stdout == "nothing built at import: SBNET_CUPY_JIT=lazy\n"


def test_an_unknown_mode_is_reported_but_harmless() -> None:
    result = python("import sbnet_cupy", SBNET_CUPY_JIT="eager", CUDA_VISIBLE_DEVICES="")
    assert "SBNET_CUPY_JIT: expected 'import' or 'lazy', got 'eager'" in result.stderr


def test_a_missing_header_has_a_hint() -> None:
    text = _jit._explain("scatter.cu", ["k"], 'combine.cuh(4): error: could not open source file "cuda_fp16.h"')
    assert str(kernel_folder() / "scatter.cu") in text
    assert "combine.cuh(4): error" in text
    assert 'pip install "cupy-cuda13x[ctk]"' in text


@pytest.mark.gpu
def test_import_builds_what_a_first_notebook_uses() -> None:
    code = """
import sbnet_cupy, cupy
from sbnet_cupy import _jit
assert "kernels built" in _jit.import_report(), _jit.import_report()
before = _jit.compiled()
def notebook(tile, halo, channels, dtype, mask_dtype, transpose):
    x = cupy.ones((1, 100, 120, channels), dtype)
    mask = cupy.zeros((1, 100, 120), mask_dtype)
    mask[0, 40:50, 40:50] = 1
    grid = dict(bsize=(tile + 2 * halo,) * 2, boffset=(-halo, -halo), bstride=(tile, tile))
    tiles = dict(bsize=(tile, tile), bstride=(tile, tile))
    active = sbnet_cupy.reduce_mask(mask, (-(-100 // tile), -(-120 // tile)), **grid)
    counts, indices = active.bin_counts, active.active_block_indices
    stack = sbnet_cupy.sparse_gather(x, counts, indices, **grid, transpose=transpose)
    inner = stack[:, :, halo:-halo, halo:-halo] if transpose else stack[:, halo:-halo, halo:-halo]
    inner = cupy.ascontiguousarray(inner)
    sbnet_cupy.sparse_scatter(inner, counts, indices, x, **tiles, transpose=transpose)
    if dtype == "float32" and not transpose and channels % 4 == 0:
        sbnet_cupy.sparse_scatter(inner, counts, indices, x, **tiles, add=True)
for tile in (8, 16, 32):
    notebook(tile, 1, 3, "float32", "float32", False)
    notebook(tile, 1, 64, "float32", "bool", False)
    notebook(tile, 1, 64, "float32", "uint8", True)
    notebook(tile, 1, 64, "float16", "bool", False)
assert _jit.compiled() == before, set(_jit.compiled()) - set(before)
print(len(before))
"""
    assert int(python(code, SBNET_CUPY_JIT="import").stdout) == len(_instances.default_instances())


@pytest.mark.gpu
def test_precompile_fills_the_disk_cache(tmp_path: Path) -> None:
    use = """
import cupy, numpy as np
x = cupy.ones((1, 40, 40, {channels}), np.float16)
counts, indices = cupy.ones(1, np.int32), cupy.zeros((1, 3), np.int32)
for transpose in (False, True):
    grid = dict(bsize=(5, 7), bstride=(5, 7), transpose=transpose)
    stack = sbnet_cupy.sparse_gather(x, counts, indices, **grid)
    for add in (False, True):
        sbnet_cupy.sparse_scatter_var(stack, counts, indices, x, **grid, add=add)
"""
    lazy = {"SBNET_CUPY_JIT": "lazy", "CUPY_CACHE_DIR": str(tmp_path)}
    first = python('import sbnet_cupy; print(sbnet_cupy.precompile([(5, 7)], ["float16"]))', **lazy)
    count = len(_instances.instances_for([(5, 7)], [np.dtype(np.float16)]))
    assert int(first.stdout) == count
    assert f"{count}/{count}" in first.stderr  # the progress bar
    quiet = python('import sbnet_cupy; sbnet_cupy.precompile([(5, 7)], ["float16"], progress=False)', **lazy)
    assert quiet.stderr == ""
    ours = {path.name for path in tmp_path.iterdir()}
    for channels in (1, 3, 8, 40, 50):
        python("import sbnet_cupy" + use.format(channels=channels), **lazy)
    later = {path.name for path in tmp_path.iterdir()} - ours
    text = "".join((tmp_path / name).read_bytes().decode("latin1") for name in later)
    assert "sbnet" not in text  # CuPy's own kernels may have come, none of ours


@pytest.mark.gpu
def test_a_broken_kernel_fails_at_first_use_with_file_and_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sbnet_cupy", tmp_path / "sbnet_cupy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(kernel_folder(), tmp_path / "kernels")
    broken = tmp_path / "kernels" / "gather.cu"
    lines = broken.read_text().splitlines()
    line = next(k for k, text in enumerate(lines) if "const Placement<Index> at =" in text)
    lines[line] = "    const Placement<Index> at = no_such_name;"
    broken.write_text("\n".join(lines) + "\n")
    code = """
import sbnet_cupy, cupy
from sbnet_cupy import _jit
print(_jit.import_report())
x, counts, indices = cupy.ones((1, 8, 8, 4), "f"), cupy.ones(1, "i"), cupy.zeros((1, 3), "i")
try:
    sbnet_cupy.sparse_gather(x, counts, indices, bsize=(8, 8), bstride=(8, 8))
except sbnet_cupy.KernelCompileError as error:
    print(error)
"""
    output = python(code, root=tmp_path, SBNET_CUPY_JIT="import").stdout
    assert "the build at import failed" in output
    assert f"{broken}: NVRTC could not compile" in output
    assert f'gather.cu({line + 1}): error: identifier "no_such_name" is undefined' in output


@pytest.mark.gpu
def test_an_edited_header_is_compiled_again(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sbnet_cupy", tmp_path / "sbnet_cupy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(kernel_folder(), tmp_path / "kernels")
    code = """
import sbnet_cupy, cupy
x, counts, indices = cupy.ones((1, 8, 8, 4), "f"), cupy.ones(1, "i"), cupy.zeros((1, 3), "i")
print(sbnet_cupy.sparse_gather(x, counts, indices, bsize=(8, 8), bstride=(8, 8)).sum())
"""
    environment = {"SBNET_CUPY_JIT": "lazy", "CUPY_CACHE_DIR": str(tmp_path / "cache")}
    assert float(python(code, root=tmp_path, **environment).stdout) == 256
    header = tmp_path / "kernels" / "transfer.cuh"
    text = header.read_text()
    changed = text.replace("row < count && n < t.batch", "row + 1 < count && n < t.batch")
    assert changed != text
    header.write_text(changed)
    assert float(python(code, root=tmp_path, **environment).stdout) == 0
