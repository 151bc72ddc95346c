"""What README.md and docs/ show is run as it stands."""

from __future__ import annotations

import doctest
import importlib.util
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

FENCE = re.compile(r"^(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^<!-- command: (\w+) -->\n```\w*\n(.*)\n```$", re.MULTILINE)


#: What the blocks of each page need.
PAGES = {
    "README.md": {"", "gpu", "torch", "jax", "gpu, numba"},
    "docs/cuda-graphs.md": {"", "gpu", "gpu, torch"},
    "docs/fused-kernels.md": {""},
    "docs/pytorch.md": {"torch"},
}


@pytest.mark.parametrize("device", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace.

    Blocks directly after a line such as ``<!-- needs: gpu -->`` are left out where there is none. Without a device,
    `import cupy as cp` means NumPy.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    assert len(blocks) == text.count("```python")
    assert {block["needs"] or "" for block in blocks} == PAGES[page]
    missing = {name for needs in PAGES[page] for name in re.findall(r"\w+", needs) if not is_here(name, device)}
    if device:
        importlib.import_module("cupy").cuda.Device(0).use()  # JAX leaves another one behind where there are several
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for block in blocks:
        code = block["code"]
        if missing & set(re.findall(r"\w+", block["needs"] or "")):
            continue
        if not device:
            code = re.sub(r"\bimport cupy\b(?! as)", "import numpy as cupy", code)
            code = code.replace("import cupy as", "import numpy as")
        run_block(code, page, text.count("\n", 0, block.start("code")), namespace)
        ran += 1
    if not ran or (device and "torch" in missing):
        pytest.skip(f"{ran} of {len(blocks)} blocks were run: there is no {', '.join(sorted(missing))}")


def is_here(name: str, device: bool) -> bool:
    """Whether there is what a block needs: with a device, a library that works there."""
    if name == "gpu" or importlib.util.find_spec(name) is None:
        return name == "gpu" and device
    module = importlib.import_module(name)
    if name == "torch" and device:
        return bool(module.cuda.is_available())
    return name != "jax" or module.default_backend() == ("gpu" if device else "cpu")


def run_block(code: str, page: str, line: int, namespace: dict[str, Any]) -> None:
    """Run `code`, which begins after `line` lines of the page: as a doctest where it has prompts."""
    path = str(ROOT / page)
    if ">>> " not in code:
        # Empty lines in front, so that a traceback names the page's line.
        exec(compile("\n" * line + code, path, "exec"), namespace)
        return
    example = doctest.DocTestParser().get_doctest(code, namespace, page, path, line)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed, _ = runner.run(example, out=report.write, clear_globs=False)
    assert not failed, report.getvalue()
    namespace.update(example.globs)


def test_figures_are_those_of_the_recorded_run() -> None:
    rows = {row["case"]: row for row in recorded("import_time")}
    text = README.read_text(encoding="utf-8")
    assert f"| first time ({rows['cold']['kernels']} kernels compiled) | {rows['cold']['median_s']:.2f} s |" in text
    assert f"| from then on (read from the cache) | {rows['warm']['median_s']:.2f} s |" in text
    assert f"no device touched) | {rows['lazy']['median_s']:.2f} s |" in text
    cold, warm, lazy = (f"{row['median_s']:.2f}" for row in recorded("import_time_two_devices"))
    assert f"{cold}, {warm} and {lazy} s" in text


def test_speeds_are_those_of_the_recorded_run() -> None:
    rows = {(row["case"], row["implementation"]): row for row in recorded("gather_scatter")}
    table = re.findall(
        r"^\| (.+) \| (\d+) us \| ([\d.]+) \| (\d+) us \| (\d+) us \|$", README.read_text(), re.MULTILINE
    )
    assert len(table) == 6
    for op, time, share, cupy, torch in table:
        ours = rows[f"case L: {op}", "sbnet_cupy"]
        assert (time, share) == (f"{ours['median_us']:.0f}", f"{ours['share']:.2f}")
        for name, rival in (("CuPy indexing", cupy), ("PyTorch indexing", torch)):
            assert rival == f"{rows[f'case L: {op}', name]['median_us']:.0f}"


@pytest.mark.parametrize("kind", ["conv", "bottleneck"])
def test_times_of_networks_are_those_of_the_recorded_run(kind: str) -> None:
    """In TF32 and float16: ours, the dense network, and submanifold convolutions."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in recorded(kind):
        parameters = row["parameters"]
        is_goal = parameters.get("network") == "resnet-v2" and row["case"].endswith(", top-left 90%")
        if is_goal and ", block sizes" not in row["case"] and parameters["precision"] != "float32":
            times = found.setdefault(parameters["stage"], {}).setdefault(row["implementation"], [])
            times.append(row["median_us"])
            if row["implementation"] == "sbnet_cupy":
                found[parameters["stage"]].setdefault("dense", []).append(parameters["dense_us"])
    assert len(found) == 4
    for stage, times in found.items():
        columns = (times[name] for name in ("sbnet_cupy", "dense", "submanifold, captured"))
        cells = (" / ".join(map(brief, column)) for column in columns)
        assert f"| {stage} | {' | '.join(f'{cell} us' for cell in cells)} |" in README.read_text(encoding="utf-8")


def test_times_of_models_are_those_of_the_recorded_run() -> None:
    """Captured, in TF32 and float16: the fastest way of ours, and the fastest dense one."""
    fastest: dict[tuple[str, bool], dict[str, float]] = {}
    for row in recorded("torch_model"):
        model, _, dtype = row["case"].rpartition(", ")
        if "captured" in row["implementation"]:
            times = fastest.setdefault((model, row["implementation"].startswith("sbnet_cupy")), {})
            times[dtype] = min(row["median_us"], times.get(dtype, row["median_us"]))
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line.endswith(" times as fast |")]
    assert len(lines) == 3
    for line in lines:
        model = re.match(r"\| (.+) channels,", line)[1]
        ours, dense = ([fastest[model, ours][dtype] for dtype in ("float32", "float16")] for ours in (True, False))
        ratios = " / ".join(f"{theirs / time:.1f}" for theirs, time in zip(dense, ours))
        cells = [" / ".join(map(brief, times)) + " us" for times in (ours, dense)]
        assert line.endswith(f"| {cells[0]} | {cells[1]} | {ratios} times as fast |")


def recorded(name: str) -> list[dict[str, Any]]:
    """The rows of a recorded benchmark."""
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())["results"]


def brief(time: float) -> str:
    """A time in microseconds, as tables have it."""
    return f"{time:.1f}" if time < 100 else f"{time:.0f}"


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- command:") == 2
    commands = dict(COMMAND.findall(text))
    assert sorted(commands) == ["run", "test"]
    for name, command in commands.items():
        assert ci(ROOT, "--print", name).stdout == command + "\n"


def test_ci_runs_in_a_clean_state(tmp_path: Path) -> None:
    make_project(tmp_path, "<!-- command: test -->\n```sh\npwd && test ! -e .venv && exit 3\n```\n")
    (tmp_path / ".venv").mkdir()
    done = ci(tmp_path)
    assert done.stdout.splitlines() == ["+ pwd && test ! -e .venv && exit 3", str(tmp_path)]
    assert done.returncode == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "```sh\necho\n```\n",
        "<!-- command: test -->\n",
        "<!-- command: test -->\n\n```sh\necho\n```\n",
        "<!-- command: test -->\n```sh\n```\n",
        "<!-- command: test -->\n```sh\necho\n",
        "<!-- command: test -->\n```sh\necho\necho\n```\n",
        "<!-- command: test -->\n```sh\necho\n```\n" * 2,
    ],
    ids=["empty", "no name", "no block", "gap", "no line", "open", "two lines", "twice"],
)
def test_ci_refuses_an_unclear_readme(text: str, tmp_path: Path) -> None:
    make_project(tmp_path, text)
    done = ci(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "README.md: expected one line '<!-- command: test -->'" in done.stderr


def make_project(folder: Path, readme: str) -> None:
    """Make a project of `.ci/run` and a README."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "README.md").write_text(readme, encoding="utf-8")


def ci(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `.ci/run` from another folder."""
    return subprocess.run(["bash", str(project / ".ci" / "run"), *arguments], cwd="/", capture_output=True, text=True)
