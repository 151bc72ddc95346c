"""The kernels, executed on a CPU, against NumPy; and the tool that does it, against kernels with known mistakes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import cpu_cuda
import hypothesis
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, SUM_DTYPES, Case, MaskCase, cases, mask_cases
from cpu_cuda import calls
from cpu_cuda.calls import Call
from hypothesis import strategies as st

from sbnet_cupy import _instances
from sbnet_cupy._instances import Instance
from sbnet_cupy._sources import kernel_folder

if cpu_cuda.why_unavailable() and not os.environ.get("CI"):
    pytest.skip(cpu_cuda.why_unavailable(), allow_module_level=True)

CALLS = calls.walk_calls() + calls.large_calls() + calls.copy_calls() + calls.mask_calls() + calls.activate_calls()

orders = pytest.mark.parametrize("order", cpu_cuda.ORDERS, ids=lambda order: order.name)


def drawn_calls() -> list[Call]:
    """Calls from the strategies of the property tests, the same ones in every run."""

    def draw(strategy: st.SearchStrategy[Any], examples: int) -> list[Any]:
        found: list[Any] = []

        @hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def collect(case: Any) -> None:
            found.append(case)

        collect()
        return found

    def decided(case: MaskCase) -> bool:  # else the order of a sum may decide, which is not specified
        return not case.avgpool or case.mask.dtype.kind in "biu"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cases.BLOCK_SIZES", calls.BLOCK_SIZES)
        plain: list[Case] = draw(cases(), 100)
        summed: list[Case] = draw(cases(SUM_DTYPES), 50)
        masks: list[MaskCase] = draw(mask_cases().filter(decided), 100)
    found = [calls.gather_call(case, f"drawn-{k}") for k, case in enumerate(plain)]
    found += [calls.scatter_call(case, f"drawn-{k}", add=False) for k, case in enumerate(plain)]
    found += [calls.scatter_call(case, f"drawn-{k}", add=True) for k, case in enumerate(summed)]
    return found + [calls.mask_call(case, f"drawn-{k}") for k, case in enumerate(masks)]


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest) -> None:
    """Compile what the selected tests need, all at once."""
    selected = [item.callspec.params.get("call") for item in request.session.items if hasattr(item, "callspec")]
    cpu_cuda.build({instance for call in selected if isinstance(call, Call) for instance in call.kernels()})


@orders
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.usefixtures("built")
def test_call(call: Call, order: cpu_cuda.Order) -> None:
    call.check(order)


@pytest.mark.usefixtures("built")
def test_drawn_calls() -> None:
    drawn = drawn_calls()
    cpu_cuda.build({instance for call in drawn for instance in call.kernels()})
    for call in drawn:
        for order in cpu_cuda.ORDERS:
            call.check(order)


def test_every_kernel_of_every_dtype_runs() -> None:
    """The calls above take every instantiation that some dtype and layout can ask for, apart from the block size."""

    def names(instances: Iterable[Instance]) -> set[str]:
        sizeless = {re.sub(r"\d+, \d+, (?=sbnet|true|false)", "", instance.expression) for instance in instances}
        # Nor do sums come with every number of lanes: copies do.
        return {re.sub(r"(tiled<sbnet::Sum.*?(?:true|false)), \d+, \d+", r"\1", name) for name in sizeless}

    ran = names(instance for call in CALLS for instance in call.kernels())
    assert names(_instances.instances_for([(3, 3)], DTYPES)) - ran == set()


def test_inline_assembly_has_a_header_of_its_own() -> None:
    """The only text that does not run here: `ptx.cuh` gives each of its functions a plain C++ twin."""
    texts = {path.name: re.sub(r"//.*", "", path.read_text()) for path in kernel_folder().glob("*.cu*")}
    assert [name for name, text in texts.items() if re.search(r"\basm\b", text)] == ["ptx.cuh"]


# The tool itself ------------------------------------------------------------------------------------------------------


def run_text(body: str, xp: Any, *arrays: Any, threads: int = 32, head: str = "", shared_mem: int = 0) -> None:
    """Run `void kernel(int* p, int* q)` of the given body, whose first line is line 1, on one CTA."""
    parameters = ", ".join(f"int* {name}" for name, _ in zip("pq", arrays))
    code = f'{head}\n#line 1 "text.cu"\n__global__ void __launch_bounds__(96) kernel({parameters}) {{ {body} }}'
    module = xp.RawModule(code=code, options=("-std=c++17",), name_expressions=["kernel"])
    module.get_function("kernel")((1,), (threads,), arrays, shared_mem=shared_mem)


MISTAKES = {
    # name: body, threads, report
    "barrier-left-out": (
        "if (threadIdx.x != 5)\n__syncthreads();", 40,
        r"thread \(0,0,0\) \S*text.cu:2: __syncthreads: deadlock: thread \(5,0,0\) has ended",
    ),
    "two-barriers": (
        "if (threadIdx.x < 33) __syncthreads();\nelse __syncthreads();", 40,
        r"thread \(33,0,0\) \S*text.cu:2: __syncthreads: thread \(0,0,0\) waits for the same barrier at text.cu:1",
    ),
    "barrier-or-warp": (
        "if (threadIdx.x < 8) __syncthreads();\nelse __syncwarp();", 32,
        r"thread \(0,0,0\) \S*text.cu:1: __syncthreads: deadlock: thread \(8,0,0\) waits in __syncwarp at text.cu:2",
    ),
    "mask-without-caller": (
        "__shfl_xor_sync(0x7fffffffu, 1, 1);", 64,
        r"thread \(31,0,0\) \S*text.cu:1: __shfl_xor_sync: the mask 0x7fffffff leaves out the calling lane 31",
    ),
    "mask-beyond-warp": (
        "__ballot_sync(0xffffffffu, 1);", 40,
        r"thread \(32,0,0\) \S*text.cu:1: __ballot_sync: the mask 0xffffffff names lanes beyond a warp of 8",
    ),
    "mask-of-ended": (
        "if (threadIdx.x == 3) return;\n__syncwarp();", 32,
        r"thread \(0,0,0\) \S*text.cu:2: __syncwarp: deadlock: thread \(3,0,0\) has ended",
    ),
    "masks-differ": (
        "__syncwarp(threadIdx.x == 9 ? 0x3ffu : 0xffffffffu);", 32,
        r"thread \(9,0,0\) \S*text.cu:1: __syncwarp: with mask 0x3ff, but its lane 0 waits .* with mask 0xffffffff",
    ),
    "past-the-end": ("p[threadIdx.x + 1] = 0;", 32, r"thread \(31,0,0\) \S*text.cu:1: writes 0 bytes past the end"),
    "before-the-start": (
        "p[0] = p[-1024 * int(threadIdx.x + 1)];", 8, r"thread \(\d,0,0\) \S*text.cu:1: reads \d+ bytes before an array"
    ),
    "input-written": ("q[threadIdx.x] = 0;", 8, r"thread \(0,0,0\) \S*text.cu:1: writes byte 0 of a read-only array"),
    "null": ("*static_cast<int*>(nullptr) = 0;", 8, r"text.cu:1: undefined behaviour \(SIGILL\)"),
    "misaligned": (
        "reinterpret_cast<uint2*>(p + 1)->x = 0;", 8, r"thread \(0,0,0\) \S*text.cu:1: undefined behaviour"
    ),
    "beyond-shared": (
        "__shared__ int tile[8];\ntile[threadIdx.x] = 0;", 9,
        r"thread \(8,0,0\) \S*text.cu:2: undefined behaviour",
    ),
    "beside-shared": (  # by a pointer, whose bounds the compiler does not know
        "__shared__ int tile[8];\nint* end = tile + 8;\nend[threadIdx.x] = 0;", 9,
        r"block \(0,0,0\) .* past the end of shared memory",
    ),
    "overflow": ("p[0] = 0x7fffffff + int(threadIdx.x);", 9, r"thread \(1,0,0\) \S*text.cu:1: undefined behaviour"),
    "dynamic-shared": (
        "extern __shared__ int room[];\nroom[threadIdx.x] = 0;", 9,
        r"block \(0,0,0\) .* wrote byte 32 of 32 of dynamic shared memory",
    ),
    "hang": ("while (*static_cast<volatile int*>(p) != 3) {}", 8, r"thread \(0,0,0\) \S*text.cu:1: hangs"),
    "too-many-threads": ("", 97, r"threads of a CTA: got 97, the kernel takes 96"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported(name: str) -> None:
    body, threads, report = MISTAKES[name]
    with cpu_cuda.device(cpu_cuda.Order(seconds=1)) as xp:
        p, q = xp.zeros(32, np.int32), xp.zeros(32, np.int32)
        with cpu_cuda.guarded(xp, (q,)), pytest.raises(cpu_cuda.KernelFault, match=report):
            run_text(body, xp, p, q, threads=threads, shared_mem=32)
        run_text("p[0] = 1;", xp, p, q)  # and the next launch is none the worse for it


@pytest.mark.parametrize("order", cpu_cuda.ORDERS, ids=lambda order: order.name)
def test_warp_functions(order: cpu_cuda.Order) -> None:
    """Against what the CUDA guide says, for each lane of a full warp and of one of 8 threads."""
    functions = {
        "__shfl_sync(mask, v, lane + 3, 4)": lambda v, k: v[k // 4 * 4 + (k + 3) % 4],
        "__shfl_up_sync(mask, v, 3, 8)": lambda v, k: v[k - 3 if k % 8 >= 3 else k],
        "__shfl_down_sync(mask, v, 2, 8)": lambda v, k: v[k + 2 if k % 8 < 6 else k],
        "__shfl_xor_sync(mask, v, 5)": lambda v, k: v[k ^ 5],
        "__ballot_sync(mask, v & 1)": lambda v, k: sum((v[i] & 1) << i for i in range(len(v))),
        "__any_sync(mask, v == 7)": lambda v, k: any(v == 7),
        "__all_sync(mask, v >= 0)": lambda v, k: True,
        "__syncthreads_count(v & 1)": None,
        "__syncthreads_or(v == 7)": None,
        "__syncthreads_and(v >= 0)": None,
    }
    values = np.random.default_rng(0).permutation(40).astype(np.int32)
    votes = {"count": sum(values & 1), "or": 1, "and": 1}
    body = "const int v = p[threadIdx.x], lane = threadIdx.x % 32; const unsigned mask = threadIdx.x < 32 ? ~0u : 255u;"
    body += "".join(f"\nq[40 * {n} + threadIdx.x] = {text};" for n, text in enumerate(functions))
    with cpu_cuda.device(order) as xp:
        found = xp.empty((len(functions), 40), np.int32)
        run_text(body, xp, xp.asarray(values), found, threads=40)
    for (text, function), row in zip(functions.items(), found.get()):
        warps = [values[:32].tolist(), values[32:].tolist()]
        expected = [
            function(np.array(warp), k) if function else votes[text.partition("(")[0].rpartition("_")[2]]
            for warp in warps
            for k in range(len(warp))
        ]
        assert row.tolist() == np.array(expected).astype(np.uint32).astype(np.int32).tolist(), text


@pytest.mark.parametrize(
    ("dtype", "header", "widen", "narrow"),
    [
        (np.float16, "cuda_fp16.h", "__half2float(__half{bits})", "__float2half_rn"),
        (ml_dtypes.bfloat16, "cuda_bf16.h", "__bfloat162float(__nv_bfloat16{bits})", "__float2bfloat16_rn"),
    ],
)
def test_half_conversions(dtype: Any, header: str, widen: str, narrow: str) -> None:
    """All halves to float32, and back from each of them, each midpoint, and the floats beside those."""
    halves = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        wide = halves.astype(np.float32)
        finite = np.sort(wide[np.isfinite(wide)])
        middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
        hard = np.concatenate(
            [wide, middles, finite * np.float32(1.0001), np.array([65519.996, 65520, 3.4e38], np.float32)]
        )
        hard = np.concatenate([hard, np.nextafter(hard, np.float32(np.inf)), np.nextafter(hard, -np.float32(np.inf))])
        expected = hard.astype(dtype)
    body = (
        f"for (int i = threadIdx.x; i < {len(halves)}; i += 32) {{\n"
        f"const unsigned short bits = i; reinterpret_cast<float*>(p)[i] = {widen}; }}\n"
        f"for (int i = threadIdx.x; i < {len(hard)}; i += 32) q[i] = {narrow}(reinterpret_cast<float*>(q)[i]).bits;"
    )
    with cpu_cuda.device() as xp:
        p, q = xp.empty(len(halves), np.float32), xp.asarray(hard)
        run_text(body, xp, p, q, head=f"#include <{header}>")
    found = q.get().view(np.int32).astype(np.uint16).view(dtype)
    assert np.array_equal(p.get(), wide, equal_nan=True)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(found[~np.isnan(expected)].view(np.uint16), expected[~np.isnan(expected)].view(np.uint16))


def test_writes_beside_a_view_are_reported() -> None:
    with cpu_cuda.device() as xp:
        every_other = xp.zeros(16, np.int32)[::2]
        with pytest.raises(cpu_cuda.KernelFault, match="beside"), cpu_cuda.guarded(xp, output=every_other):
            run_text("p[2 * threadIdx.x] = 1; if (threadIdx.x == 7) p[3] = 1;", xp, every_other, threads=8)


def test_arguments_are_checked() -> None:
    with cpu_cuda.device() as xp:
        module = xp.RawModule(
            code="__global__ void kernel(int* p, long long n) {}", options=(), name_expressions=["kernel"]
        )
        kernel, p = module.get_function("kernel"), xp.zeros(4)
        kernel((1,), (1,), (p, np.int64(3)))
        for arguments in ((p,), (p, np.int32(3)), (p, 3, 4)):
            with pytest.raises(cpu_cuda.KernelFault, match="argument"):
                kernel((1,), (1,), arguments)
        for grid in ((0,), (1, 70000)):
            with pytest.raises(cpu_cuda.KernelFault, match="CTAs along an axis"):
                kernel(grid, (1,), (p, np.int64(3)))


def test_what_does_not_compile_shows_the_compilers_message() -> None:
    with cpu_cuda.device() as xp, pytest.raises(cpu_cuda.CompileError, match=r"text.cu:1.*missing"):
        run_text("missing();", xp)
