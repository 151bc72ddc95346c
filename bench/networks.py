"""Single convolutions and residual bottlenecks on active blocks, beside dense networks and submanifold ones.

One task is one stage of a network in one precision: the dense network, a sweep over block sizes, a curve over
sparsities, each at the best block size for it, and what else is told apart at the sparsity of the goals.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import sbnet_cupy
from sbnet_cupy import BlockIndices, BlockParams, block_indices
from sbnet_cupy._stack_conv import ENGINE_VARIABLE

from .contest import Clock, attempt, explain
from .network_data import Scene, active_blocks, tile_pixels
from .network_rivals import (
    CAPTURED,
    COMPILED,
    EAGER,
    SUBMANIFOLD,
    capture_torch,
    dense_contender,
    submanifold_contender,
    torch_arithmetic,
)
from .rivals import Absent, Contender
from .stages import (
    BYTE_MODEL,
    FLOOR_MODEL,
    GOAL_SPARSITY,
    REAL_MASKS,
    MaskCase,
    Network,
    block_label,
    networks,
    top_left_case,
)
from .table import OURS, Row, Task
from .timing import GRAPH_CALLS, Call, Capture, Run, time_captured, time_eager, time_host

Array = np.ndarray[Any, Any]

#: Samples of one figure of a sweep over block sizes, which is there to choose one.
SWEEP_REPEATS = 5
#: Block sizes that the other masks of the curve choose among: so many that were fastest at the sparsity of the goals.
SHORTLIST = 6
#: Active parts of the images that calls take in turn, in bytes: several times the 60 MB of an H200's L2.
ROTATED_BYTES = 240e6
#: Images to take in turn, at most: those of small stages then stay in part in the L2, and their row says how large.
MOST_IMAGES = 128
#: Engines: how a row calls it, what the library calls it, and for a composed one the library that multiplies.
ENGINES = (
    ("fused engine", "fused", ""),
    ("cublas engine", "composed", "cublas"),
    ("cudnn engine", "composed", "cudnn"),
)
#: Threads that compile the kernels of several block sizes side by side: a fused one takes most of a second of a core.
COMPILING_THREADS = 16


def tasks(kind: str, run: Run) -> Iterator[Task]:
    """Name and work of each network of a kind."""
    for network in networks(kind, run.quick):
        yield network.name, functools.partial(measure, network, run)


def measure(network: Network, run: Run) -> list[Row]:
    """All rows of one network; a failure outside of any contender is a row as well."""
    import cupy

    rows: list[Row] = []
    try:
        with torch_arithmetic(network.precision):
            rows.extend(_Bench(cupy, network, run).rows())
    except Exception as error:
        rows.append(Row(network.name, OURS, check=explain(error), description=network.describe()))
    return with_speedups(rows)


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Rows with their speed-up over the fastest dense network that was timed in the same way, eager or not.

    Also over a rival that missed the error bound: it is what one would run.
    """
    fastest: dict[bool, Row] = {}
    for row in rows:
        eager = row.clock == "eager"
        if row.median_us is not None and not row.failed and row.parameters.get("mask") == "dense":
            best = fastest.get(eager, row)
            fastest[eager] = row if row.median_us <= (best.median_us or math.inf) else best
    return [_with_speedup(row, fastest.get(row.clock == "eager")) for row in rows]


def _with_speedup(row: Row, dense: Row | None) -> Row:
    if dense is None or dense.median_us is None or row.median_us is None or row.clock == "host":
        return row
    parameters = {**row.parameters, "dense": dense.implementation, "dense_us": dense.median_us}
    return replace(row, speedup=dense.median_us / row.median_us, parameters=parameters)


@dataclass
class Sparse:
    """A network on the active blocks of one mask: calls of the library on its arrays, and what they must return."""

    scene: Scene
    mask: Array
    params: BlockParams
    #: How many images the calls take in turn.
    turns: int = 1
    engine: str = "auto"
    #: Whether weights are packed once, and not in every call.
    packs: bool = True

    def __post_init__(self) -> None:
        xp, network = self.scene.xp, self.scene.network
        self.active = active_blocks(self.mask, self.params)
        self.inside = tile_pixels(self.active, self.params, *network.shape[1:3])
        self.device_mask = xp.asarray(self.mask)
        #: What calls are given as weights.
        self.weights = self.scene.weights if network.kind == "bottleneck" else self.scene.convs[0]
        if self.packs:
            self.weights = sbnet_cupy.pack_weights(self.weights, allow_tf32=network.precision.tf32)
        #: Images that calls change: inputs of a bottleneck, results of a convolution.
        self.images = [self.scene.base.copy() for _ in range(self.turns)]
        #: What a convolution reads.
        self.sources = [self.scene.image] + [
            self.scene.image.copy() for _ in range(self.turns - 1) if network.kind == "conv"
        ]

    @functools.cached_property
    def indices(self) -> BlockIndices:
        """The active blocks, found when they are first needed: that compiles a kernel."""
        return self.reduce()

    @property
    def options(self) -> dict[str, Any]:
        """What all calls are told."""
        return {"allow_tf32": self.scene.network.precision.tf32, "engine": self.engine}

    @property
    def blocks(self) -> int:
        """Number of active blocks."""
        return int(self.active.sum())

    @property
    def pixels(self) -> int:
        """Pixels of the image in active tiles."""
        return int(self.inside.sum())

    def reduce(self) -> BlockIndices:
        """The active blocks; their number is known, and stays on the device."""
        return block_indices(self.device_mask, self.params, capacity=self.blocks)

    def restore(self) -> None:
        """Put the images back as they were."""
        for image in self.images:
            self.scene.xp.copyto(image, self.scene.base)

    def in_place(self, turn: int, indices: BlockIndices | None = None) -> Any:
        """Write the active tiles of an image, and touch nothing else; find the blocks first if they are not given."""
        image = self.images[turn]
        indices = indices or self.reduce()
        if self.scene.network.kind == "bottleneck":
            return sbnet_cupy.sparse_res_block_bottleneck(
                image, self.weights, indices, self.params, out=image, **self.options
            )
        return sbnet_cupy.sparse_conv2d(
            self.sources[turn], self.weights, indices, self.params, base=image, out=image, **self.options
        )

    def to_new_image(self) -> Any:
        """The public function with a result of its own: zeros, or the shortcut, outside of the active tiles."""
        run = sbnet_cupy.sparse_conv2d
        if self.scene.network.kind == "bottleneck":
            run = sbnet_cupy.sparse_res_block_bottleneck
        return run(self.scene.image, self.weights, self.indices, self.params, **self.options)

    def contender(self, what: str = "", reduce_mask: bool = False) -> Contender:
        """The way of this library, in place."""
        indices = None if reduce_mask else self.indices
        self.restore()
        calls = [functools.partial(self.in_place, turn, indices) for turn in range(self.turns)]
        return Contender(_ours(what), calls, self._are_right, note=block_label(self.params))

    def new_image_contender(self, what: str) -> Contender:
        """The way of this library, to a new image in each call."""
        base = self.scene.base if self.scene.network.kind == "bottleneck" else self.scene.xp.zeros_like(self.scene.base)

        def check(got: list[Any]) -> bool:
            return all(self.scene.is_right(image, self.inside, base) for image in got)

        return Contender(_ours(what), [self.to_new_image], check, note=block_label(self.params))

    def _are_right(self, got: list[Any]) -> bool:
        return all(self.scene.is_right(image, self.inside) for image in got)


def _ours(what: str) -> str:
    return f"{OURS}, {what}" if what else OURS


class _Bench:
    """The measurements of one network."""

    def __init__(self, xp: Any, network: Network, run: Run) -> None:
        self.xp = xp
        self.network = network
        self.run = run
        self.scene = Scene(xp, network)
        self.device = _device_name(xp)

    def rows(self) -> Iterator[Row]:
        yield from self.dense_rows()
        goal = top_left_case(GOAL_SPARSITY)
        sizes = yield from self.best_rows(goal, self.network.block_sizes(self.run.quick), "curve")
        if not sizes:  # every one failed, and its row says why
            return
        yield from self.goal_rows(goal, sizes[0])
        for sparsity in self.network.sparsities(self.run.quick):
            if sparsity != GOAL_SPARSITY:
                yield from self.best_rows(top_left_case(sparsity), sizes[:SHORTLIST], "curve")
        if self.network.is_detailed:
            for real in REAL_MASKS:
                yield from self.real_rows(real)

    def dense_rows(self) -> Iterator[Row]:
        """The dense networks, PyTorch's and this library's."""
        for name in (EAGER, CAPTURED) if self.run.quick else (EAGER, CAPTURED, COMPILED):
            clock = eager_clock() if name == EAGER else captured_clock(capturing=capture_torch)
            make: Callable[[], Contender | Absent] = functools.partial(dense_contender, name, self.scene)
            yield attempt(self._case("dense"), name, make, clock, self.run, **self._fields("dense"))
        name = _ours("dense conv2d" if self.network.kind == "conv" else "dense res_block_bottleneck")
        make = functools.partial(self._own_dense, name)
        yield attempt(self._case("dense"), name, make, captured_clock(), self.run, **self._fields("dense"))

    def sweep_rows(self, mask: MaskCase, sizes: Sequence[int]) -> list[Row]:
        """Every block size, with the fewest repeats that still choose one."""
        network = self.network
        pixels = mask.make(*network.shape[1:3])
        made: dict[int, Sparse | Exception] = {}
        for size in sizes:
            try:
                made[size] = Sparse(self.scene, pixels, network.params(size))
            except Exception as error:
                made[size] = error
        compile_ahead([sparse for sparse in made.values() if isinstance(sparse, Sparse)], self.run.stream)
        rows = []
        for size, sparse in made.items():
            fields = self._fields(mask.name, sparse if isinstance(sparse, Sparse) else None, mask.sparsity)
            fields["parameters"] |= {"bsize": size, "role": "sweep"}
            make = functools.partial(_contender, sparse)
            clock = captured_clock(repeats=SWEEP_REPEATS, before=getattr(sparse, "restore", None))
            rows.append(attempt(self._case(f"block sizes, {mask.name}"), OURS, make, clock, self.run, **fields))
        return rows

    def best_rows(self, mask: MaskCase, sizes: Sequence[int], role: str) -> Generator[Row, None, list[int]]:
        """A mask at the best of some block sizes for it. Returns those that did not fail, the fastest first."""
        swept = self.sweep_rows(mask, sizes)
        yield from swept
        right = fastest_sizes(swept)
        for best in right[:1]:
            yield from self._timed(mask, best, role=role, with_goal=True)
        return right

    def goal_rows(self, mask: MaskCase, size: int) -> Iterator[Row]:
        """What is told apart at the sparsity of the goals."""
        if self.network.is_main and not self.run.quick:
            yield from self._engine_rows(mask, size)
        if self.network.is_detailed:
            yield from self.detail_rows(mask, size)
            yield from self.submanifold_rows(mask)

    def real_rows(self, mask: MaskCase) -> Iterator[Row]:
        """A mask with structure, at the best of the even block sizes for it."""
        if self.run.quick:
            sizes = self.network.block_sizes(quick=True)
        else:
            sizes = tuple(size for size in self.network.block_sizes(quick=False) if size % 2 == 0)
        try:
            right = yield from self.best_rows(mask, sizes, "mask")
        except ImportError as error:  # the photograph comes with a package
            yield Row(self._case(mask.name), mask.name, note=explain(error))
            return
        for best in right[:1]:
            yield from self._timed(mask, best, "with reduce_mask", role="mask", reduce_mask=True)

    def detail_rows(self, mask: MaskCase, size: int) -> Iterator[Row]:
        """What else a call costs at the sparsity of the goals."""
        yield from self._timed(mask, size, "with reduce_mask", reduce_mask=True)
        yield from self._timed(mask, size, "eager", clock=eager_clock)
        yield from self._timed(mask, size, "with reduce_mask, eager", clock=eager_clock, reduce_mask=True)
        yield from self._timed(mask, size, "host time of a call", clock=short_host_clock)
        if not self.run.quick:
            yield from self._unusual_rows(mask, size)

    def _unusual_rows(self, mask: MaskCase, size: int) -> Iterator[Row]:
        """Results in new memory, and inputs that no cache holds."""
        sparse = Sparse(self.scene, mask.make(*self.network.shape[1:3]), self.network.params(size))
        fields = self._fields(mask.name, sparse, mask.sparsity)
        case = self._case(mask.name)
        make = functools.partial(sparse.new_image_contender, "to a new image")
        yield attempt(case, _ours("to a new image"), make, captured_clock(), self.run, **fields)
        turns, size_of_all = images_in_turn(self.network, sparse.pixels)
        name = f"{turns} images in turn, {size_of_all / 1e6:.0f} MB active"

        def rotating() -> Contender:
            return replace(sparse, turns=turns).contender(name)

        yield attempt(case, _ours(name), rotating, captured_clock(), self.run, **fields)

    def _engine_rows(self, mask: MaskCase, size: int) -> Iterator[Row]:
        """The same by each engine, whichever is the default, and with weights that are packed in every call."""
        for name, engine, library in ENGINES:
            if library == "cudnn" and importlib.util.find_spec("cudnn") is None:
                yield Row(self._case(mask.name), name, note='not installed: pip install "sbnet-cupy[cudnn]"')
                continue
            with chosen_engine(library or "auto"):
                yield from self._timed(mask, size, name, engine=engine)
        yield from self._timed(mask, size, "packed in every call", packs=False)

    def submanifold_rows(self, mask: MaskCase) -> Iterator[Row]:
        """Submanifold convolutions, whose autotuner takes long."""
        if self.run.quick:
            return
        pixels = mask.make(*self.network.shape[1:3])
        for cached in (True, False):
            name = f"{SUBMANIFOLD}, {'captured' if cached else 'with its table, eager'}"
            clock = captured_clock(capturing=capture_torch) if cached else eager_clock()
            make = functools.partial(submanifold_contender, name, self.scene, pixels, cached)
            yield attempt(self._case(mask.name), name, make, clock, self.run, **self._fields(mask.name))

    def _timed(
        self,
        mask: MaskCase,
        size: int,
        what: str = "",
        *,
        role: str = "detail",
        clock: Callable[[Call], Clock] | None = None,
        reduce_mask: bool = False,
        with_goal: bool = False,
        engine: str = "auto",
        packs: bool = True,
    ) -> Iterator[Row]:
        """The library's row for one mask and block size."""
        pixels = mask.make(*self.network.shape[1:3])
        sparse = Sparse(self.scene, pixels, self.network.params(size), engine=engine, packs=packs)
        fields = self._fields(mask.name, sparse, mask.sparsity)
        fields["parameters"] |= {"role": role, "reduce_mask": reduce_mask, "engine": engine, "packs": packs}
        if with_goal:
            fields |= {"target": self.network.goal(mask.name), "original": self.network.original(mask.name)}
        chosen = captured_clock(before=sparse.restore) if clock is None else clock(sparse.restore)
        if clock is not None:  # Python's time has no bandwidth, and no floor that the device sets
            fields |= {"size": None, "byte_model": "", "floor_us": None}
        make = functools.partial(sparse.contender, what, reduce_mask)
        yield attempt(self._case(mask.name), _ours(what), make, chosen, self.run, **fields)

    def _own_dense(self, name: str) -> Contender:
        scene, tf32 = self.scene, self.network.precision.tf32
        if self.network.kind == "bottleneck":
            call = functools.partial(sbnet_cupy.res_block_bottleneck, scene.image, scene.weights, allow_tf32=tf32)
        else:
            call = functools.partial(sbnet_cupy.conv2d, scene.image, scene.convs[0], allow_tf32=tf32)
        return Contender(name, [call], lambda got: all(map(scene.is_right, got)))

    def _case(self, what: str) -> str:
        return f"{self.network.name}, {what}"

    def _fields(self, mask: str, sparse: Sparse | None = None, sparsity: float | None = None) -> dict[str, Any]:
        """What a row says about its case: parameters, and the cost of the work in active tiles."""
        network = self.network
        whole = math.prod(network.shape[:3])
        pixels = whole if sparse is None else sparse.pixels
        parameters = {
            "kind": network.kind,
            "network": network.stage.network,
            "stage": network.name.split()[1],
            "precision": network.precision.name,
            "mask": mask,
            "sparsity": sparsity,
            "active_pixels": pixels,
            "active_share": pixels / whole,
            "flops": network.flops(pixels),
        }
        if sparse is not None:
            parameters |= {"bsize": sparse.params.bsize[0], "active_blocks": sparse.blocks}
        return {
            "description": network.describe() + (f"; {FLOOR_MODEL}" if sparse is None else ""),
            "parameters": parameters,
            "size": network.bytes(pixels),
            "byte_model": BYTE_MODEL,
            "floor_us": network.floor_us(pixels, self.run.ceiling_tbps, self.device),
        }


def _contender(sparse: Sparse | Exception) -> Contender | Absent:
    """The contender of a block size, or the reason why there is none."""
    if isinstance(sparse, Exception):
        raise sparse
    return sparse.contender()


def fastest_sizes(rows: Sequence[Row]) -> list[int]:
    """The block sizes of right rows, the fastest first."""
    timed = [row for row in rows if row.median_us is not None and not row.failed]
    return [int(row.parameters["bsize"]) for row in sorted(timed, key=lambda row: row.median_us or math.inf)]


@contextlib.contextmanager
def chosen_engine(engine: str) -> Iterator[None]:
    """Let stacks be convolved by this engine."""
    before = os.environ.get(ENGINE_VARIABLE)
    os.environ[ENGINE_VARIABLE] = engine
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENGINE_VARIABLE]
        else:
            os.environ[ENGINE_VARIABLE] = before


def images_in_turn(network: Network, pixels: int) -> tuple[int, float]:
    """How many images to take in turn so that no cache holds their active parts, and the bytes of these parts."""
    active = network.bytes(pixels)
    if network.kind == "bottleneck":
        active //= 2  # in place: what is read is what is written
    turns = max(1, min(MOST_IMAGES, math.ceil(ROTATED_BYTES / active)))
    return turns, turns * active


def captured_clock(
    calls: int = GRAPH_CALLS, repeats: int = 0, before: Call | None = None, capturing: Capture | None = None
) -> Clock:
    """Time in a CUDA graph of so many calls, by default from as many samples as the run takes."""
    return lambda contenders, run: time_captured(
        contenders, repeats or run.repeats, run.stream, calls, before, capturing
    )


def eager_clock(before: Call | None = None) -> Clock:
    """Time of calls in a row from Python."""
    return lambda calls, run: time_eager(calls, run.repeats, run.stream, before)


def short_host_clock(before: Call) -> Clock:
    """Python's time until the call returns, from fewer samples than that of the ops: a call is several of them."""
    return lambda calls, run: time_host(calls[0], run.repeats, run.stream)


def compile_ahead(cases: Sequence[Sparse], stream: Any) -> None:
    """Compile the kernels of several block sizes side by side, by running each once in a thread.

    What fails here fails again, and is told, when its turn comes. The images are restored before anybody times them.
    """
    import cupy

    device = cupy.cuda.Device()

    def run_once(sparse: Sparse) -> None:
        with device, cupy.cuda.Stream(non_blocking=True) as own, contextlib.suppress(Exception):
            sparse.in_place(0, sparse.indices)
            own.synchronize()

    stream.synchronize()  # the threads' streams know nothing of what this one still has to write
    list(_compilers().map(run_once, cases))


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    """Threads that stay: each has a cuBLAS handle of its own, which takes time to make."""
    return ThreadPoolExecutor(COMPILING_THREADS)


def _device_name(xp: Any) -> str:
    """Name of the current device."""
    runtime = xp.cuda.runtime
    name: str = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    return name
