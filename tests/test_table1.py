"""Table 1 from its raw files, and the page that shows it."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import table1, write_csv

ROOT = Path(__file__).parent.parent
TASK = "hopper-medium"


def raw_files(folder, strategies, task=TASK):
    """Returns of two seeds and two deployments: {strategy: [(pi^0, pi^1, pi^2), ...]}; scalars of
    five updates after each deployment, of which the online share is the deployment's number in
    tenths and the error the update's."""
    rows, scalars = [], []
    for name, seeds in strategies.items():
        for seed, curve in enumerate(seeds, 1):
            first = {"task": task, "strategy": name, "seed": seed}
            rows += [
                first | {"deployment": k, "mean_return": x, "normalized_score": x / 10}
                for k, x in enumerate(curve)
            ]
            first = {"env": task, "strategy": name, "seed": seed}
            for i in range(10):
                step = 20_000 + 200 * (i + 1)
                value = {"otc/online_fraction": 0.1 * (1 + i // 5), "losses/vae_reconstruction": i}
                scalars += [first | {"tag": t, "step": step, "value": v} for t, v in value.items()]
    write_csv(str(folder / f"{task}.csv"), rows)
    write_csv(str(folder / f"{task}_scalars.csv"), scalars)


def lines_of(folder, capsys):
    table1.main(table1.Args(str(folder)))
    return capsys.readouterr().out.splitlines()


def test_the_tables_by_hand(tmp_path, capsys):
    raw_files(
        tmp_path,
        {
            "uniform": [(100, 0, 110), (-100, 0, -90)],
            "otc-value": [(100, 0, 150), (-100, 0, -80)],
            "mixed0.25": [(100, 0, 140), (-100, 0, -40)],
        },
    )
    lines = lines_of(tmp_path, capsys)
    # 10 % each; 50 and 20 %; 40 and 60 %
    its = next(line for line in lines if line.startswith(f"| {TASK} |"))
    assert its == (
        f"| {TASK} | 10.0 [10.0, 10.0] |  | 35.0 [20.0, 50.0] |  |  |  | 50.0 [40.0, 60.0] |  |"
    )
    assert lines[lines.index(its) + 1] == (
        "| *paper* | -6.8 +- 7.0 |  | 12.0 +- 2.6 | 2.6 +- 3.8 |  |  |  |  |"
    )
    # Less uniform draws': 40 and 10; 30 and 50
    value, mixed = "**25 [10, 40]**", "**40 [30, 50]**"
    assert f"| {TASK} |  | {value} |  |  |  | {mixed} |  |" in lines
    # Scores are a tenth: 4 and 1; 1 and -4
    assert "| value | uniform | 2.5 [1.0, 4.0] | 1 of 1 |" in lines
    assert "| value | mixed 25 % | -1.5 [-4.0, 1.0] | 0 of 1 |" in lines
    assert "| value | mixed 25 % | -15 [-40, 10] | 1 of 2 |" in lines
    assert "| uniform | 0 +- 100 | 0 +- 0 | 10 +- 100 |" in lines
    # Of the second deployment's updates, the errors of 5 to 9
    assert "| uniform | 10 % | 20 % | 15 % | 700.0 |" in lines


def test_order_of_seeds_and_other_data_sets_do_not_matter(tmp_path, capsys):
    curves = {"uniform": [(10, 0, 11), (10, 0, 14)], "otc-value": [(10, 0, 12), (10, 0, 19)]}
    for name, seeds in (("one", curves), ("two", {k: v[::-1] for k, v in curves.items()})):
        (tmp_path / name).mkdir()
        raw_files(tmp_path / name, seeds)
    one = lines_of(tmp_path / "one", capsys)
    two = lines_of(tmp_path / "two", capsys)
    assert [x for x in one if "Raw" not in x] == [x for x in two if "Raw" not in x]
    raw_files(tmp_path / "two", {"uniform": [(1, 0, 2)] * 2}, "walker2d-medium")
    its = [x for x in lines_of(tmp_path / "two", capsys) if x.startswith("| value | uniform |")]
    assert its == [x for x in one if x.startswith("| value | uniform |")]


def test_what_is_no_table_is_refused(tmp_path, refusal):
    assert "no raw returns" in refusal(table1, tmp_path)
    raw_files(tmp_path, {"uniform": [(1, 1, 1)] * 2, "otc-value": [(1, 1, 1)]})
    assert "differ in seeds" in refusal(table1, tmp_path)
    write_csv(str(tmp_path / "other.csv"), [{"a": 1}])
    assert "no raw file of Table 1" in refusal(table1, tmp_path)


@pytest.mark.parametrize("folder", ["docs/results/otc_bcq/table1"])
def test_the_page_is_what_the_tool_says(folder, capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    table1.main(table1.Args(folder, figure=str(tmp_path / "figure.png")))
    assert capsys.readouterr().out in (ROOT / "docs/table1.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_has_the_tables_with_the_papers_updates(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/table1.md").read_text()
    section = page[page.index("## With the paper's 4,000 updates") :]
    raw = table1.read(ROOT / "docs/results/otc_bcq/table1_4000")
    for task, curves in raw.returns.items():
        table1.of_data_set(curves)
        assert capsys.readouterr().out in section, task
    fewer = table1.read(ROOT / "docs/results/otc_bcq/table1")
    task = "halfcheetah-medium"
    names = {name: strategy for strategy, name in table1.STRATEGIES.items()}
    paper = dict(zip(table1.PER_PAGE, table1.PAPER[task], strict=True))
    _, _, *lines = table_rows(section[: section.index("###")])
    assert {names[name] for name, *_ in lines} == set(raw.returns[task])
    for name, *cells in lines:
        its = (table1.improvement(x.returns[task][names[name]]) for x in (fewer, raw))
        assert cells == [*(table1.interval(x, 1) for x in its), paper.get(names[name], "")]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table's line; without emphasis, links as their text."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line.replace("*", "")) for line in lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in plain]


def test_the_pages_that_quote_the_table_quote_it_right():
    """The tables at the head of the findings' section."""
    page = (ROOT / "docs/table1.md").read_text()
    head = page[page.index("## Improvement") : page.index("\n## halfcheetah-medium\n")]
    _, _, *improvements = table_rows(head)[: 2 + 2 * len(table1.PAPER)]
    measured = {
        its[0]: (its, of_paper)
        for its, of_paper in zip(improvements[::2], improvements[1::2], strict=True)
        if "not measured" not in its
    }
    findings = (ROOT / "docs/findings.md").read_text()
    section = findings[findings.index("## 5. Table 1") :]
    first = table_rows(section[: section.index("### ")])
    assert first[2 : 2 + 2 * len(measured)] == [row for rows in measured.values() for row in rows]
    known = table_rows(head)
    assert all(row in known for row in first if "---" not in row[0])
    start = section.index("| data set | strategies |")
    assert table_rows(section[start : section.index("\n\n", start)]) == known[-len(measured) - 2 :]


def test_the_summary_is_what_the_raw_files_say():
    """README's return on wind and difference from uniform draws on Table 1, by draw."""
    wind = defaultdict(list)
    with open(ROOT / "docs/results/correction/wind.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["deployment"] == "5":
                wind[row["strategy"].removeprefix("otc-")].append(float(row["mean_return"]))
    page = (ROOT / "docs/table1.md").read_text()
    known = table_rows(page[page.index("## Over the data sets") : page.index("## What goes with")])
    table = {row[0]: row[2:] for row in known if row[1] == "uniform"} | {"uniform": ["", ""]}
    readme = (ROOT / "README.md").read_text()
    rows = table_rows(readme[readme.index("## Does it work?") : readme.index("## Is it fast?")])[2:]
    assert len(rows) == 7
    for name, *cells in rows:
        name = name.removeprefix("OTC, ").removesuffix(" (ours)").split(":")[0]
        assert cells == [table1.interval(np.array(wind[name]), 1), *table[name]]


def test_what_goes_with_the_return():
    """By hand: Spearman's rho is 1 - 6 (1 + 0 + 1) / (3 * 8) for one swap of neighbours."""
    assert table1.rank_correlation([1, 2, 30], [5, 6, 7]) == pytest.approx(1)
    assert table1.rank_correlation([1, 2, 30], [7, 6, 5]) == pytest.approx(-1)
    assert table1.rank_correlation([1, 2, 30], [5, 7, 6]) == pytest.approx(0.5)
