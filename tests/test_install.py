"""The package in each of the ways it can be installed, and what its import costs."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbnet_cupy._sources import kernel_folder, sources_digest

ROOT = Path(__file__).parents[1]
CHECKOUT = "pyproject.toml MANIFEST.in LICENSE README.md .ci bench docs examples kernels sbnet_cupy tests".split()
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
KERNELS = {path.name for pattern in ("*.cu", "*.cuh") for path in (ROOT / "kernels").glob(pattern)}
MODULES = {path.relative_to(ROOT / "sbnet_cupy").as_posix() for path in (ROOT / "sbnet_cupy").rglob("*.py")}

# Imports the package, runs two ops, and prints what it saw.
PROBE = """
import json, sys
import numpy as np
import sbnet_cupy
from sbnet_cupy import _sources

image = np.arange(64, dtype=np.float32).reshape(1, 8, 8, 1)
grid = dict(bsize=(4, 4), bstride=(4, 4))
indices = sbnet_cupy.reduce_mask(image[..., 0], (2, 2), tol=35, **grid)
blocks = sbnet_cupy.sparse_gather(image, indices.bin_counts, indices.active_block_indices, **grid)
print(json.dumps({
    "module": sbnet_cupy.__file__,
    "version": sbnet_cupy.__version__,
    "kernels": str(_sources.kernel_folder()),
    "digest": _sources.sources_digest(),
    "active": indices.active_block_indices.tolist(),
    "corners": blocks[:, 0, 0, 0].tolist(),
}))
"""


@pytest.fixture(scope="module")
def build_tools() -> None:
    """Skip where a build would have to download its tools first; in CI they must be there."""
    for name, oldest in (("build", 1), ("pip", 23), ("setuptools", 77)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "0"
        if int(version.split(".")[0]) < oldest:
            message = f"needs {name} >= {oldest}: install the extra [test]"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory, build_tools: None) -> tuple[Path, Path]:
    """Return the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    checkout = copy_checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "out", checkout, cwd=folder)
    (sdist,), (wheel,) = (folder / "out").glob("*.tar.gz"), (folder / "out").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python_without_cupy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has NumPy and nothing else."""
    return make_environment(tmp_path_factory.mktemp("bare") / "venv") / "python"


def copy_checkout(target: Path) -> Path:
    """Copy the checkout, so that builds leave nothing in it."""
    target.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=NOT_COPIED)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; return its standard output, and fail with all of its output where it fails."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def from_checkout(python: str | Path, *arguments: str, cwd: Path, first: Path | None = None) -> str:
    """Run Python as :func:`run` does, with the checkout on its path, behind the folder `first`."""
    path = [str(folder) for folder in (first, ROOT) if folder]
    if python == sys.executable:
        path += filter(None, [os.environ.get("PYTHONPATH")])
    return run(python, *arguments, cwd=cwd, PYTHONPATH=os.pathsep.join(path))


def make_environment(folder: Path) -> Path:
    """Make a virtual environment of NumPy alone, the running environment's; return its scripts' folder."""
    venv.create(folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    packages = Path(run(scripts / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    for source in (Path(np.__file__).parent, Path(np.__file__).parents[1] / "numpy.libs"):
        if source.exists():
            (packages / source.name).symlink_to(source)
    return scripts


def install(scripts: Path, *arguments: str | Path) -> None:
    """Install into an environment, without downloads."""
    run(
        *(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet"),
        *("--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall"),
        *arguments,
        cwd=scripts,
        PYTHONPATH=str(metadata.distribution("setuptools").locate_file("")),
    )


def check_probe(printed: str) -> dict[str, Any]:
    """Check what must be so in every installation; return all that the probe printed."""
    result: dict[str, Any] = json.loads(printed)
    assert result["digest"] == sources_digest()
    assert result["active"] == [[0, 1, 0], [0, 1, 1]]
    assert result["corners"] == [32, 36]
    return result


def probe_environment(scripts: Path, cwd: Path) -> dict[str, Any]:
    """Run the probe and the console script in an environment."""
    assert "usage" in run(scripts / "sbnet-cupy", "--help", cwd=cwd, PYTHONPATH="").lower()
    return check_probe(run(scripts / "python", "-c", PROBE, cwd=cwd, PYTHONPATH=""))


def test_sdist_holds_the_whole_checkout(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", ".ci/run", "sbnet_cupy/py.typed"} <= names
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert {f"sbnet_cupy/{name}" for name in MODULES} <= names
    for folder in ("tests", "bench", "examples"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")} <= names
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_wheel_holds_the_package_alone(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        description = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == {
        "sbnet_cupy/py.typed",
        *(f"sbnet_cupy/{name}" for name in MODULES),
        *(f"sbnet_cupy/kernels/{name}" for name in KERNELS),
    }
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in description
    assert "sbnet-cupy = sbnet_cupy._cli:main" in scripts


def test_wheel_installs(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    scripts = make_environment(tmp_path / "venv")
    install(scripts, distributions[1])
    result = probe_environment(scripts, tmp_path)
    assert Path(result["module"]).is_relative_to(tmp_path / "venv")
    assert Path(result["kernels"]) == Path(result["module"]).parent / "kernels"
    assert f"-{result['version']}-" in distributions[1].name


def test_editable_installs(build_tools: None, tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    scripts = make_environment(tmp_path / "venv")
    install(scripts, "--editable", checkout)
    result = probe_environment(scripts, tmp_path)
    assert Path(result["module"]).parent == checkout / "sbnet_cupy"
    assert Path(result["kernels"]) == checkout / "kernels"


def test_bare_checkout_works(tmp_path: Path) -> None:
    result = check_probe(from_checkout(sys.executable, "-c", PROBE, cwd=tmp_path))
    assert Path(result["module"]).parent == ROOT / "sbnet_cupy"
    assert Path(result["kernels"]) == ROOT / "kernels"
    assert "usage" in from_checkout(sys.executable, "-m", "sbnet_cupy", "--help", cwd=tmp_path).lower()


def test_works_without_cupy(python_without_cupy: Path, tmp_path: Path) -> None:
    check_probe(from_checkout(python_without_cupy, "-c", PROBE, cwd=tmp_path))


def test_works_with_a_cupy_that_cannot_be_imported(python_without_cupy: Path, tmp_path: Path) -> None:
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("raise ImportError('a library is missing')")
    check_probe(from_checkout(python_without_cupy, "-c", PROBE, cwd=tmp_path, first=tmp_path))


def test_import_is_quick_without_cupy(python_without_cupy: Path, tmp_path: Path) -> None:
    clock = "time.process_time()"  # which other programs do not lengthen
    code = f"import time, numpy\nstart = {clock}\nimport sbnet_cupy\nprint({clock} - start)"
    seconds = [float(from_checkout(python_without_cupy, "-c", code, cwd=tmp_path)) for _ in range(5)]
    assert statistics.median(seconds) <= 0.15


def test_import_leaves_optional_packages_alone_without_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = "import sys, sbnet_cupy; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = from_checkout(sys.executable, "-c", code, cwd=tmp_path).split()
    assert "sbnet_cupy" in loaded
    assert not {"cupy", "matplotlib", "skimage", "torch", "tqdm"} & set(loaded)


def test_import_leaves_plans_to_the_first_call_that_needs_them(tmp_path: Path) -> None:
    code = "import sys, sbnet_cupy; print(*sys.modules)"
    loaded = from_checkout(sys.executable, "-c", code, cwd=tmp_path).split()
    assert "sbnet_cupy._fused_network" in loaded
    plans = "_fused _fused_plan _fused_conv_plan _fused_bottleneck_plan _fused_bottleneck_products _fused_clocks _warps"
    assert not {f"sbnet_cupy.{name}" for name in plans.split()} & set(loaded)


def copied_sources(folder: Path) -> dict[str, Any]:
    """Return the functions of a copy of ``_sources.py`` that lies in `folder`/sbnet_cupy."""
    target = folder / "sbnet_cupy" / "_sources.py"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "sbnet_cupy" / "_sources.py", target)
    return runpy.run_path(str(target))


def test_missing_kernels_are_reported_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"gather\.cu") as raised:
        copied_sources(tmp_path)["kernel_folder"]()
    assert str(tmp_path / "sbnet_cupy" / "kernels") in str(raised.value)
    assert str(tmp_path / "kernels") in str(raised.value)


def test_digest_follows_names_and_bytes(tmp_path: Path) -> None:
    def digest() -> str:
        value: str = copied_sources(tmp_path)["sources_digest"]()
        return value

    kernels = shutil.copytree(kernel_folder(), tmp_path / "kernels")
    header = min(kernels.glob("*.cuh"))
    text = header.read_bytes()
    assert digest() == sources_digest()
    header.write_bytes(text + b" ")
    assert digest() != sources_digest()
    header.write_bytes(text)
    (kernels / "notes.txt").write_text("no source")
    assert digest() == sources_digest()
    header.rename(kernels / "renamed.cuh")
    assert digest() != sources_digest()
