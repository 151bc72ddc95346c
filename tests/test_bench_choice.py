"""How good the choices of ``auto`` are, as far as ways and plans were measured."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from bench import choice, composed, fit, plans
from bench.plan_kinds import KINDS, Case, numbers_of
from bench.record import RESULTS

ROOT = Path(__file__).parents[1]


def cases(kind: str, precision: str) -> list[Case]:
    networks = [net for net in composed.every_network() if (net.kind, net.precision.name) == (kind, precision)]
    return [case for network in networks[:2] for case, _ in plans.cases_of(network)][::6]


def write(folder: Path, kind: str, precision: str, slower: dict[str, float]) -> None:
    """What the models expect, each way as many times slower; every second plan takes twice as long as the first one."""
    for name, each in KINDS.items():
        if each.network != kind or precision not in each.precisions:
            continue
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(plans.COLUMNS)
            for case in cases(kind, precision):
                found = each.promising(case, fit.H200)[:2]
                for number, plan in enumerate(found):
                    us = each.clocks([plan], case, fit.H200)[0] / fit.MHZ * slower.get(name, 1) * (1 + number)
                    text = " ".join(map(str, numbers_of(plan)))
                    writer.writerow([case.network.name, case.bsize, case.rows, text, us, True, "a device"])
    with (folder / composed.PATH.name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(composed.COLUMNS)
        for case in cases(kind, precision):
            us = composed.composed(case) / fit.MHZ * slower.get("composed", 1)
            writer.writerow([case.network.name, case.bsize, case.rows, us, True, "a device"])


@pytest.mark.parametrize(
    ("kind", "precision", "names"),
    [
        ("conv", "float32", {"conv-float32", "composed"}),
        ("conv", "tf32", {"conv", "wgmma", "composed"}),
        ("bottleneck", "float16", {"bottleneck", "wgmma-bottleneck", "layers", "composed"}),
    ],
)
def test_nothing_is_lost_where_models_are_right(kind: str, precision: str, names: set[str], tmp_path: Path) -> None:
    write(tmp_path, kind, precision, {})
    (found,) = choice.choices(tmp_path).values()
    assert [each.case for each in found] == cases(kind, precision)
    assert set.union(*(set(each.ways) for each in found)) == names
    for each in found:
        # Ways that count for more than is expected of them lose no more than that.
        assert 1 <= each.lost_to_ways <= max(kind.counted for kind in KINDS.values()) * 1.0001
        best = min(pick.best_us for pick in each.ways.values())
        assert each.lost_to_plans == pytest.approx(each.ways[each.chosen].us / best)


def test_what_a_wrong_model_loses_is_reported(tmp_path: Path) -> None:
    """The fused kernels take a hundred times as long as expected: they are chosen, where the other engine would do."""
    write(tmp_path, "conv", "float32", {"conv-float32": 100})
    found = choice.choices(tmp_path)["conv", "float32"]
    wrong = [each for each in found if each.chosen == "conv-float32"]
    assert wrong
    for each in wrong:
        assert each.lost_to_ways == pytest.approx(each.ways["conv-float32"].us / each.ways["composed"].us)
    assert f"at most {max(each.lost_to_ways for each in wrong):.3f}" in choice.report(found)


def test_a_plan_that_is_not_the_fastest_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "conv", "float32", {"composed": 1000})
    path = tmp_path / "conv-float32.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    times = [float(row[4]) for row in rows[1:]]
    for row in rows[1:]:  # the first plan of each problem takes longer than the second one
        row[4] = str(4 * max(times) - float(row[4]))
    path.write_text("\n".join(map(",".join, rows)))
    (found,) = choice.choices(tmp_path).values()
    assert all(each.lost_to_ways == 1 for each in found)
    assert any(each.lost_to_plans > 1 for each in found)


def test_the_choices_are_as_good_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    choice.main(["--worst", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    for line in lines[::2]:
        name, numbers = line.split(": ", 1)
        count, ways, most, plan, high = re.findall(r"\d+\.\d+|\d+(?= problems)", numbers)
        assert f"| {name} | {count} | {ways}, {most} | {plan}, {high} |" in page
    for line in lines[1::2]:
        assert re.match(r"  1\.\d{3}  resnet-.* blocks of \d+: .*composed .* us, counts ", line)


def test_all_that_was_measured_was_right() -> None:
    for path in (RESULTS / "plans").glob("*.csv"):
        assert {row["right"] for row in csv.DictReader(path.read_text().splitlines())} == {"True"}, path
