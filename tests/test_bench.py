"""The benchmarks: what they count, compare, print and draw, and on a device that they run."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_device
import numpy as np
import pytest
from fake_device import FakeStream, fake_run

import sbnet_cupy
from bench import __main__ as command
from bench import cases, contest, data, gather_scatter, host, plots, record, reduce_mask, rivals, table, timing
from bench.cases import Mask, Target, Transfer

TIMING = timing.Timing(100.0, 90.0, 120.0, 25, "events")


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(rivals, "find_torch", lambda: None)
        monkeypatch.setattr(record, "find_torch", lambda: None)


def tiny(case: Transfer) -> Transfer:
    """Return the case on a few small images that its blocks do not divide."""
    return replace(case, shape=(2, 37, 45, min(case.shape[3], 5)), density=max(case.density, 0.2))


def every_transfer() -> list[Transfer]:
    points = [point.case for point in cases.sweep_points(quick=False)]
    return [*cases.large_cases(quick=False), *cases.small_cases(), *points]


class TestCases:
    def test_the_cases_with_goals(self) -> None:
        found = {case.name: case for case in cases.large_cases(quick=False)}
        assert {
            name: (case.original.split()[0], case.target.bound) for name, case in found.items() if case.original
        } == {
            "case L: gather": ("1.68", 1.00),
            "case L: gather, transpose": ("1.24", 0.90),
            "case L: scatter": ("2.02", 0.95),
            "case L: scatter, transpose": ("1.48", 0.90),
            "case L: scatter, add": ("2.07", 0.95),
            "case L: scatter, add, overlapping": ("1.48", 0.75),
        }
        gather, scatter = found["case L: gather"], found["case L: scatter"]
        assert (gather.bcount, gather.blocks, gather.stack_shape) == ((32, 32), 4096, (4096, 18, 18, 128))
        assert gather.margins == ((1, 1), (1, 1))
        assert scatter.stack_shape == (4096, 16, 16, 128)
        assert scatter.margins == ((0, 0), (0, 0))
        assert not scatter.overlaps

    def test_the_small_case_has_110_blocks(self) -> None:
        for case in cases.small_cases():
            assert (case.bcount, case.blocks) == ((25, 44), 110)
        gather, scatter = cases.small_cases()
        assert (gather.bsize, gather.boffset, scatter.bsize, scatter.boffset) == ((18, 18), (-1, -1), (16, 16), (0, 0))

    def test_names_are_unique(self) -> None:
        for found in (every_transfer(), [point.case for point in cases.sweep_points(quick=True)]):
            names = [case.name for case in found]
            assert len(set(names)) == len(names)

    def test_what_falls_under_the_floor_is_large(self) -> None:
        for case in every_transfer():
            assert case.target is not cases.FLOOR or case.stack_bytes > 100e6, case.name

    def test_sweeps_cover_what_they_promise(self) -> None:
        points = cases.sweep_points(quick=False)
        for variant in cases.VARIANTS:
            labels = {s: [p.label for p in points if (p.sweep, p.variant) == (s, variant)] for s in cases.SWEEPS}
            assert labels["channels"] == ["1", "3", "16", "24", "64", "96", "256"]
            assert labels["density"] == ["1%", "2%", "5%", "10%", "20%", "50%", "100%"]
            assert labels["dtype"] == ["float32", "float16", "uint8"]
            assert labels["block size"][0] == "3"
            assert {"64", "5x21", "8x32", "32x8"} <= set(labels["block size"])
        assert {p.case.overlaps for p in points if p.variant == "scatter, add, overlapping"} == {True}
        assert {p.case.overlaps for p in points if p.case.op != "gather" and "overlapping" not in p.variant} == {False}

    def test_inputs_exceed_the_cache(self) -> None:
        for case in every_transfer():
            assert 2 * case.stack_bytes * data.sets_needed(case) > 4 * 60e6, case.name

    @pytest.mark.parametrize(
        ("bsize", "boffset", "bstride"),
        [
            ((4, 4), (0, 0), (4, 4)),
            ((5, 7), (-1, -2), (3, 4)),
            ((2, 3), (1, 0), (5, 4)),  # gaps
            ((18, 18), (-1, -1), (16, 16)),
            ((9, 1), (-20, -3), (2, 1)),  # blocks outside of the image
        ],
    )
    @pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
    def test_covered_pixels(self, bsize: Any, boffset: Any, bstride: Any, density: float) -> None:
        case = Transfer("", "add", (3, 37, 29, 2), bsize, boffset, bstride, density)
        indices = cases.active_indices(3, case.bcount, case.blocks, seed=5)
        seen = np.zeros(case.shape[:3], bool)
        for n, i, j in indices:
            y, x = boffset[0] + i * bstride[0], boffset[1] + j * bstride[1]
            seen[n, max(y, 0) : max(y + bsize[0], 0), max(x, 0) : max(x + bsize[1], 0)] = True
        assert cases.covered_pixels(case, indices) == seen.sum()

    def test_byte_models(self) -> None:
        shape = (1, 32, 32, 4)
        tile: dict[str, Any] = {"bsize": (16, 16), "boffset": (0, 0), "bstride": (16, 16), "density": 1.0}
        stack = 4 * 16 * 16 * 4 * 4
        assert cases.byte_model(Transfer("", "gather", shape, **tile))[0] == 2 * stack
        assert cases.byte_model(Transfer("", "scatter", shape, **tile))[0] == 2 * stack
        assert cases.byte_model(Transfer("", "add", shape, **tile))[0] == 3 * stack
        overlapping = Transfer("", "add", shape, density=1.0)
        size, model = cases.byte_model(overlapping, sets=3)
        assert size == 4 * 18 * 18 * 16 + 2 * 32 * 32 * 16
        assert "covered" in model
        image = 32 * 32 * 16
        assert cases.byte_model(Transfer("", "gather_grad", shape, **tile))[0] == image + 3 * stack
        assert cases.byte_model(replace(overlapping, op="gather_grad"))[0] == image + size
        assert cases.byte_model(Transfer("", "scatter_grad", shape, **tile))[0] == 3 * image + 2 * stack

    def test_active_indices_are_distinct_and_ascending(self) -> None:
        found = cases.active_indices(3, (4, 5), 17, seed=1)
        assert found.dtype == np.int32
        rows = [tuple(row) for row in found.tolist()]
        assert rows == sorted(set(rows))
        assert len(rows) == 17

    @pytest.mark.parametrize(
        ("target", "median", "share", "text"),
        [
            (Target("share", 0.95), 1.0, 0.95, "met"),
            (Target("share", 0.95), 1.0, 0.76, "missed: 0.760, 20.0% short"),
            (Target("us", 12), 12.0, None, "met"),
            (Target("us", 12), 15.0, 2.0, "missed: 15.0 us, 25% over"),
        ],
    )
    def test_verdicts(self, target: Target, median: float, share: float | None, text: str) -> None:
        assert target.verdict(median, share) == text

    def test_a_share_is_needed_for_its_goal(self) -> None:
        with pytest.raises(ValueError, match=r"^share: expected a figure"):
            Target("share", 1).verdict(1.0, None)


class TestData:
    def test_random_words_repeat_and_differ_by_seed(self) -> None:
        a, again, b = (data.random_words(np, 10_000, seed) for seed in (1, 1, 2))
        assert (a == again).all()
        assert (a != b).mean() > 0.99
        bits = np.unpackbits(a.view(np.uint8)).mean()
        assert abs(bits - 0.5) < 0.01

    @pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
    def test_values(self, dtype: str) -> None:
        values = data.finite_values(np, (7, 11, 13), dtype, 3)
        assert (values.shape, values.dtype) == ((7, 11, 13), dtype)
        assert np.isfinite(values).all()
        assert len(np.unique(values)) > 200
        whole = data.small_integers(np, (7, 11, 13), dtype, 3)
        assert (whole.shape, whole.dtype) == ((7, 11, 13), dtype)
        assert set(np.unique(whole).tolist()) == set(range(16))

    @pytest.mark.parametrize("shape", [(2, 100, 75), (1, 400, 700), (3, 35, 50)])
    @pytest.mark.parametrize("density", [0.1, 1.0])
    def test_mask_activates_exactly_the_blocks_it_names(self, shape: Any, density: float) -> None:
        case = Mask("", shape, density)
        mask, blocks = data.make_mask(np, case, seed=4)
        found = sbnet_cupy.reduce_mask(mask, case.bcount, **case.grid)
        assert np.array_equal(found.active_block_indices, blocks)
        assert len(blocks) == case.blocks
        assert (mask > 0).mean() > 0.99

    @pytest.mark.parametrize("case", [tiny(case) for case in every_transfer()], ids=lambda case: case.name)
    def test_library_gives_what_is_expected(self, case: Transfer) -> None:
        """The expected results share no code with the library, so this tests them both."""
        inputs = data.make_inputs(np, case, 2)
        expected = data.Expected(np, case, inputs)
        ours = gather_scatter.library(case, inputs, expected)
        assert ours.check([call() for call in ours.calls])

    @pytest.mark.parametrize("op", ["gather", "scatter", "add", "gather_grad"])
    def test_a_single_wrong_bit_is_noticed(self, op: str) -> None:
        case = Transfer("", op, (1, 20, 20, 3), (8, 8), (0, 0), (8, 8))
        inputs = data.make_inputs(np, case, 1)
        expected = data.Expected(np, case, inputs)
        (call,) = gather_scatter.library(case, inputs, expected).calls
        result = call()
        assert expected.check([result])
        result.view(np.uint32)[0, 0, 0, 0] ^= 1
        assert not expected.check([result])
        assert not expected.check([result[:, :-1]])

    @pytest.mark.parametrize("part", [0, 1])
    def test_a_single_wrong_bit_of_a_pair_is_noticed(self, part: int) -> None:
        case = Transfer("", "scatter_grad", (1, 20, 20, 3), (8, 8), (0, 0), (6, 7))
        inputs = data.make_inputs(np, case, 1)
        expected = data.Expected(np, case, inputs)
        (call,) = gather_scatter.library(case, inputs, expected).calls
        result = call()
        assert expected.check([result])
        result[part].view(np.uint32)[0, 0, 0, 0] ^= 1
        assert not expected.check([result])

    def test_zeros_of_either_sign_differ(self) -> None:
        assert not data.same_bits(np.array([0.0]), np.array([-0.0]))


class TestRivals:
    @pytest.mark.parametrize("op", ["gather", "scatter", "add"])
    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("bstride", [(6, 6), (8, 9)])
    def test_indexing(self, op: str, transpose: bool, bstride: Any) -> None:
        if op == "scatter" and bstride == (6, 6):
            bstride = (8, 8)  # assignment leaves open which of several overlapping blocks wins
        case = Transfer("", op, (2, 37, 29, 3), (8, 8), (-1, -2), bstride, transpose=transpose)
        inputs = data.make_inputs(np, case, 2)
        found = rivals.transfer_rivals(np, case, inputs, data.Expected(np, case, inputs))
        assert isinstance(found[0], rivals.Contender)
        assert found[0].check([call() for call in found[0].calls])
        assert [(r.name, r.note) for r in found[1:]] == [
            (name, "PyTorch not installed")
            for name in ["PyTorch indexing"] + ["PyTorch unfold + mask"] * (op == "gather")
        ]

    def test_windows(self) -> None:
        case = Mask("", (2, 100, 75), 0.3)
        mask, blocks = data.make_mask(np, case, 0)
        windows, absent = rivals.mask_rivals(np, case, [mask], [blocks])
        assert isinstance(windows, rivals.Contender)
        assert windows.check([call() for call in windows.calls])
        assert absent == rivals.Absent("PyTorch max_pool2d + nonzero", "PyTorch not installed")


@pytest.mark.parametrize("capacity", [False, True])
def test_mask_results_are_checked(capacity: bool) -> None:
    case = Mask("", (2, 100, 75), 0.3)
    mask, blocks = data.make_mask(np, case, 0)
    ours = reduce_mask.library(case, [mask], [blocks], capacity)
    (result,) = [call() for call in ours.calls]
    assert ours.check([result])
    assert not ours.check([result._replace(bin_counts=result.bin_counts + 1)])
    wrong = result.active_block_indices.copy()
    wrong[-1, 0] += 1
    assert not ours.check([result._replace(active_block_indices=wrong)])


@pytest.fixture
def _fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    points = [replace(p, case=tiny(p.case)) for p in cases.sweep_points(quick=False)]
    monkeypatch.setattr("bench.sweep.sweep_points", lambda quick: points)
    monkeypatch.setattr(gather_scatter, "large_cases", lambda quick: [tiny(c) for c in cases.large_cases(quick)])
    monkeypatch.setattr(gather_scatter, "small_cases", lambda: [tiny(c) for c in cases.small_cases()])
    monkeypatch.setattr(gather_scatter, "sets_needed", lambda case: 2)
    monkeypatch.setattr(reduce_mask, "LARGE_MASK", replace(cases.LARGE_MASK, shape=(2, 100, 90)))
    monkeypatch.setattr(reduce_mask, "SMALL_MASK", replace(cases.SMALL_MASK, shape=(1, 60, 70)))
    monkeypatch.setattr(host, "SHAPE", (1, 40, 40, 4))
    fake_device.shrink_networks(monkeypatch)


class TestContest:
    def compete(self, contender: Any, clock: Any = lambda calls, run: TIMING, **fields: Any) -> table.Row:
        return contest.compete("a case", contender, clock, fake_run(), **fields)

    def test_a_right_result(self) -> None:
        contender = rivals.Contender(table.OURS, [lambda: 1, lambda: 2], lambda got: got == [1, 2], "a note")
        row = self.compete(
            contender,
            size=4e8,
            target=Target("share", 0.5),
            original="1 TB/s",
            byte_model="all of it",
            parameters={"a": 1},
        )
        assert row == table.Row(
            "a case",
            table.OURS,
            clock="events",
            median_us=100.0,
            low_us=90.0,
            high_us=120.0,
            repeats=25,
            bytes=4e8,  # type: ignore[arg-type]
            byte_model="all of it",
            tbps=4.0,
            share=1.0,
            original="1 TB/s",
            goal=">= 0.50 of copy",
            verdict="met",
            check="equal",
            note="a note",
            parameters={"a": 1},
        )
        assert not row.failed

    def test_a_wrong_result_fails_the_run(self) -> None:
        row = self.compete(rivals.Contender(f"{table.OURS}, exact", [lambda: 1], lambda got: False))
        assert row.check == "WRONG"
        assert row.failed

    def test_a_rival_may_fail(self) -> None:
        def broken() -> None:
            raise TypeError("no\n such dtype")

        for name, failed in (("CuPy indexing", False), (table.OURS, True)):
            row = self.compete(rivals.Contender(name, [broken], lambda got: True), size=8, byte_model="m")
            assert row.check == "failed: TypeError: no such dtype"
            assert (row.failed, row.median_us, row.byte_model) == (failed, None, "m")

    def test_a_rival_may_be_absent(self) -> None:
        row = self.compete(rivals.Absent("PyTorch", "PyTorch not installed"), size=8, description="d")
        assert (row.note, row.median_us, row.description, row.failed) == ("PyTorch not installed", None, "d", False)


class TestTiming:
    def test_percentiles(self) -> None:
        assert timing.summarize(range(101), "host") == timing.Timing(50, 10, 90, 101, "host")

    def test_host_time_is_that_of_one_call(self) -> None:
        calls = []
        found = timing.time_host(lambda: calls.append(1), 5, FakeStream())
        assert (len(calls), found.repeats, found.clock) == (6 * timing.HOST_CALLS, 5, "host")
        assert 0 < found.low_us <= found.median_us <= found.high_us < 1000

    @pytest.mark.usefixtures("_fake_device")
    def test_short_calls_are_timed_in_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = [lambda: None] * 3
        found = timing.time_device(calls, 5, FakeStream())
        assert (found.clock, found.repeats) == ("graph", 5)
        assert found.median_us == pytest.approx(50 / 21)  # 7 rounds of 3 calls
        monkeypatch.setattr(sys.modules["cupy"].cuda, "get_elapsed_time", lambda begin, end: 0.5)
        assert timing.time_device(calls, 5, FakeStream()) == timing.Timing(500, 500, 500, 5, "events")

    def test_a_failed_capture_ends(self) -> None:
        class Stream(FakeStream):
            capturing = False

            def begin_capture(self) -> None:
                self.capturing = True

            def end_capture(self) -> None:
                self.capturing = False
                raise RuntimeError("invalidated")

        stream = Stream()
        with pytest.raises(ZeroDivisionError):
            timing.capture([lambda: 1 / 0], 1, stream)
        assert not stream.capturing

    def test_copy_ceiling(self) -> None:
        run = fake_run()
        assert run.ceiling_tbps == pytest.approx(4.0)
        assert gather_scatter.ceiling_row(run).share == pytest.approx(1.0)


def test_table() -> None:
    rows = [
        table.timed_row(
            "L",
            table.OURS,
            TIMING,
            size=400_000_000,
            ceiling_tbps=4.0,
            target=Target("share", 0.9),
            description="8x8",
            byte_model="read + written",
            check="equal",
        ),
        table.Row("L", "PyTorch", note="PyTorch not installed", byte_model="read + written"),
        table.timed_row("M", table.OURS, TIMING),
    ]
    assert table.format_table(rows).splitlines() == [
        "  implementation  clock   median us     p10 to p90  TB/s  of copy  goal             verdict  check  note",
        "L: 8x8; bytes: read + written",
        "  sbnet_cupy      events      100.0  90.0 to 120.0  4.00     1.00  >= 0.90 of copy  met      equal",
        "  PyTorch" + 91 * " " + "PyTorch not installed",
        "M",
        "  sbnet_cupy      events      100.0  90.0 to 120.0",
    ]
    assert table.format_table([]).strip() == ""


def test_goals_that_were_missed_are_listed() -> None:
    fields: dict[str, Any] = {"size": 400_000_000, "ceiling_tbps": 4.0}
    rows = [
        table.timed_row("L", table.OURS, TIMING, target=Target("share", 0.9), check="equal", **fields),
        table.timed_row("M", table.OURS, TIMING, target=Target("us", 50), check="equal", **fields),
        table.timed_row("N", table.OURS, TIMING, target=Target("share", 0.9), check="WRONG", **fields),
        table.timed_row("N", "CuPy indexing", TIMING, check="WRONG", **fields),
    ]
    assert table.format_verdicts(rows).splitlines() == [
        "goals: 1 met, 2 not",
        "  M, sbnet_cupy: <= 50 us; missed: 100.0 us, 100% over",
        "  N, sbnet_cupy: WRONG",
    ]


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "machine", lambda: {"device": "a, device"})
    rows = [
        table.timed_row("L", table.OURS, TIMING, size=4, parameters={"bsize": "18"}),
        table.Row("M", "PyTorch", note="PyTorch not installed", parameters={"capacity": 3}),
    ]
    paths = record.save_rows("cases", rows, tmp_path / "new", quick=True)
    assert [path.name for path in paths] == ["cases.json", "cases.csv"]
    recorded = json.loads(paths[0].read_text())
    assert (recorded["machine"], recorded["quick"]) == ({"device": "a, device"}, True)
    assert [table.Row(**row) for row in recorded["results"]] == rows
    with paths[1].open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["case"], first["median_us"], first["bsize"], first["capacity"]) == ("L", "100.0", "18", "")
    assert (second["median_us"], second["note"], second["capacity"]) == ("", "PyTorch not installed", "3")
    assert first["device"] == second["device"] == "a, device"


def made_up_sweep() -> dict[str, Any]:
    """Make the JSON of a whole sweep, with smooth figures."""
    rows = [gather_scatter.ceiling_row(fake_run())]
    for point in cases.sweep_points(quick=False):
        k = list(cases.VARIANTS).index(point.variant)
        size, _ = cases.byte_model(replace(point.case, shape=(1, *point.case.shape[1:])))
        label = re.findall(r"\d+", point.label)
        tbps = 4.0 * (1 - 0.06 * k) * (1 - 1 / (2 + float(label[0]))) if label else 3.5 - 0.2 * k
        for name, factor in ((table.OURS, 1.0), ("CuPy indexing", 0.3), ("PyTorch indexing", 0.25)):
            if name == table.OURS or point.has_rivals:
                median = size / tbps / factor / 1e6
                rows.append(
                    table.timed_row(
                        point.case.name,
                        name,
                        timing.Timing(median, 0.97 * median, 1.05 * median, 25, "events"),
                        size=size,
                        parameters={"sweep": point.sweep, "point": point.label, "variant": point.variant},
                    )
                )
    return {"machine": {"device": "A made-up device"}, "results": [vars(row) for row in rows]}


class TestPlots:
    def test_one_picture_for_each_sweep(self, tmp_path: Path) -> None:
        (tmp_path / "sweep.json").write_text(json.dumps(made_up_sweep()))
        assert command.main(["plots", "--output", str(tmp_path)]) == 0
        names = ["sweep_block_size.png", "sweep_channels.png", "sweep_density.png", "sweep_dtype.png"]
        assert sorted(path.name for path in tmp_path.glob("*.png")) == names
        for name in names:
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_lines(self) -> None:
        rows = [row for row in made_up_sweep()["results"] if row["parameters"].get("sweep") == "density"]
        rows = [row for row in rows if row["parameters"]["variant"].startswith("gather")]
        labels = ["1%", "2%", "5%", "10%", "20%", "50%", "100%"]
        lines = plots.series(rows, labels)
        assert list(lines) == [v for v in cases.VARIANTS if v.startswith("gather")] + [
            "CuPy indexing",
            "PyTorch indexing",
        ]
        line = lines["gather"]
        assert line["x"] == list(range(7))
        assert line["tbps"][0] == pytest.approx(4.0 * (1 - 1 / 3))
        # 1.05 times the time is 1/1.05 of the bandwidth
        assert line["low"][0] == pytest.approx(line["tbps"][0] * (1 - 1 / 1.05))
        assert line["high"][0] == pytest.approx(line["tbps"][0] * (1 / 0.97 - 1))

    def test_nothing_to_draw(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["plots", "--output", str(tmp_path)]) == 1
        assert "expected the results of a suite with plots" in capsys.readouterr().err

    def test_failed_rows_are_left_out(self, tmp_path: Path) -> None:
        results = made_up_sweep()
        for row in results["results"]:
            if row["parameters"].get("sweep") == "dtype":
                row.update(median_us=None, tbps=None)
        results["results"] = results["results"][1:]  # no ceiling either
        (tmp_path / "sweep.json").write_text(json.dumps(results))
        assert [path.name for path in plots.draw(tmp_path / "sweep.json", tmp_path)] == [
            "sweep_block_size.png",
            "sweep_channels.png",
            "sweep_density.png",
        ]


class TestCommand:
    def test_defaults(self) -> None:
        options = command.parse([])
        assert (options.command, options.quick, options.only) == ("all", False, None)
        assert command.output_folder(options) == record.RESULTS

    @pytest.mark.parametrize("arguments", [["--quick"], ["sweep", "--only", "dtype"]])
    def test_partial_runs_do_not_replace_the_results(self, arguments: list[str], tmp_path: Path) -> None:
        assert command.output_folder(command.parse(arguments)) == command.PARTIAL
        assert command.output_folder(command.parse([*arguments, "--output", str(tmp_path)])) == tmp_path

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["nothing"], "invalid choice"), (["--only", "("], r"--only: expected a regular expression, got '\('")],
    )
    def test_bad_arguments(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as raised:
            command.main(arguments)
        assert raised.value.code == 2
        assert re.search(message, capsys.readouterr().err)

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(command, "no_device", lambda: "no CUDA device")
        assert command.main(["host"]) == 1
        assert capsys.readouterr().err == "bench: error: the benchmarks need a CUDA device: no CUDA device\n"

    @pytest.mark.usefixtures("_fake_device")
    def test_everything(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The whole path, with NumPy as the device."""
        assert command.main(["all", "--output", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        names = {path.name for path in tmp_path.iterdir()}
        suites = {"gather_scatter", "reduce_mask", "host", "sweep", "conv", "bottleneck"}
        assert {f"{suite}.{kind}" for suite in suites for kind in ("json", "csv")} <= names
        assert len([name for name in names if name.endswith(".png")]) == 8
        rows = [row for suite in suites for row in json.loads((tmp_path / f"{suite}.json").read_text())["results"]]
        checks = {(row["implementation"].split(",")[0], row["check"]) for row in rows}
        assert checks == {
            ("cudaMemcpyAsync", "equal"),
            ("sbnet_cupy", "equal"),
            ("CuPy indexing", "equal"),
            ("CuPy windows + argwhere", "equal"),
            ("RawKernel", ""),
            ("cupy.empty", ""),
            ("PyTorch indexing", ""),
            ("PyTorch unfold + mask", ""),
            ("PyTorch max_pool2d + nonzero", ""),
            ("PyTorch", ""),
            ("submanifold", ""),
            ("cudnn engine", ""),
        }
        assert all(
            row["note"] == "PyTorch not installed" for row in rows if row["implementation"].startswith("PyTorch")
        )
        ops = [row for row in rows if row["case"].startswith("host: ")]
        assert len(ops) == len(host.OPS)
        for row in ops:
            assert row["parameters"]["ratio_no_arguments"] > 0
            assert "x a launch with 12 arguments" in row["note"]
        assert "case L: gather: 2x37x45x5 float32" in captured.out
        assert "gather-scatter: 100%" in captured.err

    @pytest.mark.usefixtures("_fake_device")
    def test_only(self, tmp_path: Path) -> None:
        assert command.main(["gather-scatter", "--only", "case l: scatter", "--output", str(tmp_path)]) == 0
        rows = json.loads((tmp_path / "gather_scatter.json").read_text())["results"]
        assert {row["case"] for row in rows} == {
            "case L: scatter",
            "case L: scatter, transpose",
            "case L: scatter, add",
            "case L: scatter, add, overlapping",
        }

    @pytest.mark.usefixtures("_fake_device")
    def test_wrong_results_are_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setattr(data, "same_bits", lambda a, b: False)
        assert command.main(["gather-scatter", "--only", "case L: gather$", "--output", str(tmp_path)]) == 1
        captured = capsys.readouterr()
        assert "WRONG" in captured.out
        assert captured.err.endswith("bench: error: 1 results of this library were wrong or missing\n")


@pytest.fixture
def _device_memory() -> Iterator[None]:
    yield
    timing.free_memory()


@pytest.mark.gpu
@pytest.mark.usefixtures("_device_memory")
class TestDevice:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["gather-scatter", "--only", "400x700|case L: scatter, add"],
            ["reduce-mask"],
            ["host"],
            ["conv", "--only", "50x88"],
            ["bottleneck", "--only", "50x88"],
        ],
        ids=" ".join,
    )
    def test_runs(self, arguments: list[str], tmp_path: Path) -> None:
        assert command.main([*arguments, "--quick", "--output", str(tmp_path)]) == 0
        (results,) = tmp_path.glob("*.json")
        for row in json.loads(results.read_text())["results"]:
            if row["implementation"].startswith("PyTorch, channels_last") and row["check"] == "WRONG":
                continue  # cuDNN may choose a Winograd algorithm, which keeps no bound on each element
            assert row["check"] in ("", "equal"), row
            assert row["median_us"] is None or math.isfinite(row["median_us"])

    def test_sweep(self, tmp_path: Path) -> None:
        assert command.main(["sweep", "--only", "dtype", "--quick", "--output", str(tmp_path)]) == 0
        assert (tmp_path / "sweep_dtype.png").exists()
