"""Tables of many runs: closed forms, brute force, coverage, what pairing does, refusals."""

import csv
import itertools
import json
import sys

import numpy as np
import pytest
import tyro

from benchmarks import aggregate
from benchmarks.aggregate import bootstrap, iqm, probability_of_improvement, profile, summary
from common import cli

# --- Statistics ---


def trimmed(values):
    """scipy.stats.trim_mean(values, 0.25), one value at a time."""
    left = sorted(float(v) for v in values)
    for _ in range(int(0.25 * len(left))):
        left = left[1:-1]
    return sum(left) / len(left)


@pytest.mark.parametrize(
    "values, by_hand",
    [
        ([7], 7),  # nothing to cut
        ([1, 2, 9], 4),  # floor(3 / 4) = 0
        ([9, 1, 4, 2], 3),  # 2 and 4
        ([0, 100, 1, 2, 6], 3),  # 1, 2 and 6: not by weights, as a cut of 5 / 4 would be
        ([0, 50, 1, 2, 6, 7, 3], (1 + 2 + 3 + 6 + 7) / 5),
        ([-9, -8, 1, 2, 3, 4, 70, 80], 2.5),
        ([-9, -8, 1, 2, 3, 4, 5, 70, 80], 3),
    ],
)
def test_the_interquartile_mean_is_the_trimmed_mean_by_hand(values, by_hand):
    values = np.array(values, float)
    assert iqm(values[:, None]) == pytest.approx(by_hand)
    assert iqm(values[None]) == pytest.approx(by_hand)  # seeds or tasks: all values together
    assert iqm(values[:, None]) == pytest.approx(trimmed(values))


def test_summaries_are_of_each_resample():
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 6))
    found = summary(x)
    assert found.shape == (4, 3, 3)
    for i, j in itertools.product(range(4), range(3)):
        median = np.median(x[i, j].mean(0))
        expected = x[i, j].mean(), median, trimmed(x[i, j].flat)
        assert found[i, j] == pytest.approx(expected)
    one_task = np.array([[1.0], [2.0], [9.0]])
    assert summary(one_task) == pytest.approx([4, 2, 4])  # its median is the seeds'


@pytest.mark.parametrize("shape, other", [((5, 3), (5, 3)), ((4, 2), (6, 2)), ((1, 1), (3, 1))])
def test_the_probability_of_improvement_counts_all_pairs_and_ties_half(shape, other):
    random = np.random.default_rng(1)
    x, y = random.integers(4, size=shape), random.integers(4, size=other)
    won = [
        np.mean([(a > b) + 0.5 * (a == b) for a in x[:, t] for b in y[:, t]])
        for t in range(shape[1])
    ]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(won))
    assert probability_of_improvement(x, x) == pytest.approx(0.5)
    stacked = probability_of_improvement(np.stack([x, x + 9]), np.stack([y, y]))
    assert stacked == pytest.approx([np.mean(won), 1])


def test_a_profile_is_the_share_of_runs_above():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert profile(x, np.array([0, 1, 2.5, 4])).tolist() == [1, 0.75, 0.5, 0]


# --- Bootstrap ---


def test_resamples_stay_within_a_task_and_every_seed_is_as_likely():
    """The bootstrap's distribution of a mean of two seeds is known: 1/4, 1/2, 1/4 per task."""
    x = np.array([[0.0, 100.0], [1.0, 110.0]])
    drawn = []
    ends = bootstrap(lambda x: drawn.append(x) or x.mean((1, 2)), x, resamples=20_100, level=0.5)
    drawn = np.concatenate(drawn)
    assert drawn.shape == (20_100, 2, 2) and set(drawn[..., 0].flat) == {0, 1}
    assert set(drawn[..., 1].flat) == {100, 110}
    share = [np.mean(drawn[..., 0].sum(1) == k) for k in range(3)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    both = np.corrcoef(drawn[:, 0, 0], drawn[:, 0, 1])[0, 1]
    assert abs(both) < 0.03  # tasks are drawn by themselves
    assert ends == pytest.approx(np.quantile(drawn.mean((1, 2)), [0.25, 0.75]))


def test_a_bootstrap_is_seeded_and_says_nothing_of_one_seed():
    x = np.random.default_rng(0).normal(size=(6, 2, 3))
    one, same, other = (bootstrap(lambda x: x.mean((1, 2)), x, seed=s) for s in (3, 3, 4))
    assert one.shape == (2, 3) and (one == same).all() and (one != other).any()
    assert np.isnan(bootstrap(summary, np.ones((1, 4)))).all()


@pytest.mark.parametrize("statistic", [lambda x: x.mean((-2, -1)), iqm])
def test_an_interval_covers_the_true_value_as_often_as_it_says(statistic):
    """Normal seeds around tasks' means that differ evenly: mean and IQM are both 0."""
    random, centres = np.random.default_rng(0), np.linspace(-1, 1, 5)
    hits = 0
    for i in range(400):
        low, high = bootstrap(
            statistic, random.normal(centres, 1, size=(12, 5)), resamples=500, seed=i
        )
        hits += low <= 0 <= high
    assert 0.90 < hits / 400 < 0.98  # 95 %, its standard error here is 1.1 %


def test_paired_intervals_are_narrow_where_seeds_share_noise():
    random = np.random.default_rng(0)
    start = random.normal(0, 10, size=(10, 3))
    x, y = start + 1 + random.normal(0, 0.5, (10, 3)), start + random.normal(0, 0.5, (10, 3))
    widths = {}
    for paired in (True, False):
        low, high = bootstrap(aggregate.differences, x, y, paired=paired)
        widths[paired] = high - low
        assert (low < 1).all() and (high > 1).all()
    assert (widths[True] < widths[False] / 4).all()
    # The paired interval of a mean is that of the differences
    low, high = bootstrap(lambda d: d.mean((-2, -1)), x - y)
    assert widths[True][0] == pytest.approx(high - low)
    # Noise of their own: pairing neither gains nor loses
    x, y = random.normal(size=(2, 40, 3))
    one, two = (np.diff(bootstrap(aggregate.differences, x, y, paired=p), axis=0) for p in (1, 0))
    assert one[0, 0] == pytest.approx(two[0, 0], rel=0.25)


# --- Runs ---

OTC = {"sampling": "otc", "distance": "value", "adaptive_alpha": True, "alpha": 1.0}
OTC |= {
    "exploration": "none",
    "alpha_max": None,
    "replacement": True,
    "exclude_self_matches": False,
}


def fake_run(folder, seed, returns, script="otc_bcq", record=None, **args):
    """A run folder with the returns of pi^0, pi^1, ... and a hundredth of them as scores."""
    run = folder / f"{len(list(folder.iterdir()))}"
    run.mkdir()
    usual = {"env": "hopper-medium", "split": None, "dataset": "built-in", "num_seeds": 1}
    args = usual | OTC | {"seed": seed, "deployments": len(returns) - 1, "run_dir": str(run)} | args
    content = {"script": script, "seed": seed, "args": args} | (record or {})
    (run / "args.json").write_text(json.dumps(content))
    with open(run / "returns.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["deployment", "mean_return", "normalized_score"])
        rows.writerows([k, x, x / 100] for k, x in enumerate(returns))
    return run


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """What the tool prints; on refusal its error, in two lines at most and without a file."""

    def of(*argv, refused=False):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, argv)])
        if not refused:
            cli.cli(aggregate.main, aggregate.Args, tyro.cli)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as error:
            cli.cli(aggregate.main, aggregate.Args, tyro.cli)
        assert error.value.code == 2 and sorted(tmp_path.rglob("*")) == before
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") <= 2
        assert not printed.out
        return printed.err

    return of


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.fixture
def study(tmp_path):
    """Two tasks, two strategies whose seeds share their start; OTC is better by 10 in all."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for env, level in (("hopper-medium", 1000), ("walker2d-medium", 2000)):
        for seed in range(1, 6):
            for sampling, gain in (("uniform", 0), ("otc", 10)):
                start = level + 100.0 * seed
                fake_run(folder, seed, [start, start, start + gain], env=env, sampling=sampling)
    return folder


def test_tables_compare_strategies_by_seed(study, tmp_path, said):
    raw, table, figure = (tmp_path / name for name in ("raw.csv", "table.csv", "figure.png"))
    printed = said(study, "--csv", raw, "--table", table, "--out", figure, "--curves")
    assert "20 runs, pi^2" in printed and "warning" not in printed
    over = next(line for line in printed.splitlines() if line.startswith("| otc-value | 5 |"))
    assert "| otc-value | 5 | 18.1 [" in over
    assert "| uniform | 5 | 0.10 [0.10, 0.10] | 0.10 [0.10, 0.10] | 10 of 10 |" in over
    assert "| otc-value | 1300 +- 141 | 1300 +- 141 | 1310 +- 141 |" in printed
    rows = {(row["where"], row["method"]): row for row in rows_of(table)}
    assert len(rows) == 6
    row = rows["hopper-medium", "otc-value"]
    found = [float(row[name]) for name in ("mean", "median", "iqm", "difference_iqm_low")]
    assert found == pytest.approx([1310, 1310, 1310, 10]) and row["pairs"] == "5"
    assert float(row["better"]) == pytest.approx((5 + 10) / 25)  # of own and smaller starts
    assert float(row["better_low"]) < 0.5 < float(row["better_high"])
    assert rows["hopper-medium", "uniform"]["baseline"] == ""
    assert len(rows_of(raw)) == 20 * 3
    assert {row["strategy"] for row in rows_of(raw)} == {"otc-value", "uniform"}
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "of, values", [("last", 1310), ("mean", 1305), ("gain", 10), ("improvement", 0.7800)]
)
def test_a_runs_value_is_what_is_asked_for(study, tmp_path, said, of, values):
    table = tmp_path / "t.csv"
    said(study, "--of", of, "--table", table, "--baseline", "otc-value", "--resamples", "100")
    rows = {(row["where"], row["method"]): row for row in rows_of(table)}
    if of == "improvement":
        values = np.mean([1000 / (1000 + 100 * s) for s in range(1, 6)])  # 10 of it, in %
        both = np.mean([1000 / (x + 100 * s) for s in range(1, 6) for x in (1000, 2000)])
        assert float(rows["2 tasks", "otc-value"]["mean"]) == pytest.approx(both)
    assert float(rows["hopper-medium", "otc-value"]["mean"]) == pytest.approx(values)
    assert float(rows["hopper-medium", "uniform"]["difference_mean"]) <= 0


def test_seeds_that_are_not_in_both_make_no_pair(tmp_path, said):
    for seed in range(1, 7):
        fake_run(tmp_path, seed, [1.0, 100.0 * seed], sampling="uniform")
    for seed in (4, 5, 9):
        fake_run(tmp_path, seed, [1.0, 100.0 * seed + 3])
    printed = said(tmp_path, "--table", tmp_path / "t.csv", "--resamples", "200")
    assert (
        "warning: fewer than five seeds" in printed and "otc-value on hopper-medium: 3" in printed
    )
    row = next(row for row in rows_of(tmp_path / "t.csv") if row["pairs"])
    assert row["seeds"] == "3" and row["pairs"] == "2" and row["won"] == "2 of 2"
    assert float(row["difference_mean"]) == pytest.approx(0.03)  # of the pairs alone, as a score


def test_scripts_have_baselines_of_their_own_and_tasks_need_every_method(tmp_path, said):
    for script, seed in itertools.product(("otc_bcq", "otc_awac"), range(1, 6)):
        for sampling in ("otc", "uniform"):
            fake_run(tmp_path, seed, [1.0, 2.0 + seed], script, sampling=sampling)
    for seed in range(1, 6):
        fake_run(tmp_path, seed, [1.0, 2.0], env="walker2d-medium")
    printed = said(tmp_path, "--table", tmp_path / "t.csv")
    assert "not of every method: walker2d-medium" in printed
    rows = {(row["where"], row["method"]): row for row in rows_of(tmp_path / "t.csv")}
    assert rows["1 task", "otc_awac otc-value"]["baseline"] == "otc_awac uniform"
    assert rows["1 task", "otc_bcq otc-value"]["baseline"] == "otc_bcq uniform"
    assert [key for key in rows if key[0] == "walker2d-medium"] == [
        ("walker2d-medium", "otc_bcq otc-value")
    ]
    said(tmp_path, "--table", tmp_path / "t.csv", "--baseline", "otc_bcq uniform")
    rows = {row["method"]: row for row in rows_of(tmp_path / "t.csv")[:4]}
    assert rows["otc_awac uniform"]["baseline"] == "otc_bcq uniform"


def test_what_is_left_out_is_said(tmp_path, said):
    for seed in range(1, 6):
        fake_run(tmp_path, seed, [1.0, 2.0])
    fake_run(tmp_path, 6, [1.0, 2.0], deployments=2)
    fake_run(tmp_path, 7, [1.0])
    printed = said(tmp_path)
    assert "5 runs, pi^1" in printed
    assert "left out: 1 unfinished" in printed and "left out: 1 without deployments" in printed


def test_offline_methods_are_a_table_too(tmp_path, said):
    for script, critic in (("omar", None), ("icq", "centralised"), ("icq", "independent")):
        for seed in range(1, 6):
            fake_run(tmp_path, seed, [10.0 * seed], script, critic=critic)
    assert "icq pi0, seed 1 (see --by; they differ in --critic)" in said(tmp_path, refused=True)
    printed = said(tmp_path, "--by", "critic", "--out", tmp_path / "figure.png")
    assert "| icq pi0 critic=independent | 5 |" in printed and "| omar pi0 critic=None |" in printed
    assert "baseline" not in printed


def test_scripts_that_deploy_nothing_are_compared_with_others_offline_policies(tmp_path, said):
    for seed in range(1, 6):
        fake_run(tmp_path, seed, [1.0 + seed], deployment_steps=None)
        run = fake_run(tmp_path, seed, [2.0 + seed], "bc")
        record = json.loads((run / "args.json").read_text())
        del record["args"]["deployments"]
        (run / "args.json").write_text(json.dumps(record))
    printed = said(tmp_path)
    assert "| bc pi0 | 5 |" in printed and "| otc_bcq pi0 | 5 |" in printed


def test_seeds_that_keep_their_policies_are_compared_with_others(tmp_path, said):
    for seed in range(1, 6):
        fake_run(tmp_path, seed, [1.0, 2.0], save_policies=seed == 1)
    assert "| otc-value | 5 |" in said(tmp_path)


def test_a_baseline_is_found_among_its_like(tmp_path, said):
    """--by tells methods apart, and each is compared with uniform draws of its own kind."""
    for size, sampling, seed in itertools.product((64, 128), ("uniform", "otc"), range(1, 6)):
        level = size + 10.0 * (sampling == "otc") + seed
        fake_run(tmp_path, seed, [level, level], sampling=sampling, batch_size=size)
    said(tmp_path, "--by", "batch_size", "--table", tmp_path / "t.csv")
    found = {row["method"]: row for row in rows_of(tmp_path / "t.csv") if "task" in row["where"]}
    for size in (64, 128):
        row = found[f"otc-value batch_size={size}"]
        assert row["baseline"] == f"uniform batch_size={size}" and row["won"] == "5 of 5"


def test_the_only_baseline_serves_all(tmp_path, said):
    """Where --by tells apart what uniform draws do not have."""
    for alpha, sampling, seed in [(1, "uniform", 1), (1, "uniform", 2)] + [
        (alpha, "otc", seed) for alpha in (1, 2) for seed in (1, 2)
    ]:
        fake_run(tmp_path, seed, [1.0, 2.0 + alpha], sampling=sampling, alpha=alpha)
    said(tmp_path, "--by", "alpha", "--table", tmp_path / "t.csv", "--mixed")
    found = {row["method"]: row["baseline"] for row in rows_of(tmp_path / "t.csv")}
    assert {found[f"otc-value alpha={a}"] for a in (1, 2)} == {"uniform alpha=1"}


def test_curves_are_of_one_task(study, said):
    printed = said(study, "--column", "normalized_score", "--curves", "--resamples", "100")
    assert printed.count("| method | pi^0") == 2  # of each task; none under the table of both


def test_a_figures_legend_names_all_methods(tmp_path, said, monkeypatch):
    """Also those that the first panel's task does not have."""
    from matplotlib.figure import Figure

    for env, sampling in (("hopper-medium", "uniform"), ("walker2d-medium", "balanced")):
        for seed in range(1, 6):
            fake_run(tmp_path, seed, [1.0, 2.0 + seed], env=env, sampling=sampling)
    labels, legend = [], Figure.legend

    def kept(figure, handles, names, **options):
        labels.extend(names)
        return legend(figure, handles, names, **options)

    monkeypatch.setattr(Figure, "legend", kept)
    said(tmp_path, "--out", tmp_path / "figure.png", "--resamples", "100")
    assert [label.split(",")[0] for label in labels] == ["balanced", "uniform"]


def test_a_figure_of_one_task_shows_it_once(tmp_path, said, monkeypatch):
    from matplotlib.figure import Figure

    for sampling in ("uniform", "balanced"):
        for seed in range(1, 6):
            fake_run(tmp_path, seed, [1.0, 2.0 + seed], sampling=sampling)
    titles, savefig = [], Figure.savefig

    def kept(figure, *args, **options):
        titles.extend(axis.get_title() for axis in figure.axes)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    said(tmp_path, "--out", tmp_path / "figure.png", "--resamples", "100")
    task = "hopper-medium"
    assert titles == [task, f"{task}, paired with uniform", f"{task}: performance profile"]


def test_tasks_without_scores_have_tables_of_returns(tmp_path, said):
    for seed in range(1, 6):
        run = fake_run(tmp_path, seed, [1.0, 2.0])
        (run / "returns.csv").write_text("mean_return,normalized_score\n1,nan\n2,nan\n")
    printed = said(tmp_path, "--out", tmp_path / "figure.png")
    assert "unscored" in printed and "**hopper-medium, mean_return**" in printed


# --- Refusals ---


@pytest.mark.parametrize(
    "other, flag, whatever",
    [
        ({"deployments": 1, "returns": [1.0, 2.0]}, "--deployments is 2", True),
        ({"batch_size": 64}, "--batch-size is not there", False),
        ({"dataset": "d4rl", "sampling": "uniform"}, "--dataset is built-in", False),
        ({"dataset": "d4rl", "env": "walker2d-medium"}, "--dataset is built-in", False),
        ({"num_seeds": 5, "sampling": "uniform"}, "--num-seeds is 1", False),
        ({"deployment_steps": 7, "sampling": "uniform"}, "--deployment-steps is", False),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, said, other, flag, whatever):
    """`whatever`: even with --mixed."""
    first = fake_run(tmp_path, 1, [1.0, 2.0, 3.0])
    second = fake_run(tmp_path, 2, other.pop("returns", [1.0, 2.0, 3.0]), **other)
    error = said(tmp_path, "--csv", tmp_path / "raw.csv", refused=True)
    assert flag in error and str(first) in error and str(second) in error
    if whatever:
        said(tmp_path, "--mixed", refused=True)
    else:
        said(tmp_path, "--mixed", "--resamples", "100")


def test_other_commits_are_refused(tmp_path, said):
    fake_run(tmp_path, 1, [1, 2], record={"code": "aaa"})
    fake_run(tmp_path, 2, [1, 2], record={"code": "bbb"})
    error = said(tmp_path, refused=True)
    assert "commit aaa" in error and "and bbb in" in error and "--mixed" in error
    said(tmp_path, "--mixed")


def test_two_runs_of_one_seed_are_refused(tmp_path, said):
    first, second = (fake_run(tmp_path, 1, [1.0, 2.0], run_dir=name) for name in "ab")
    error = said(tmp_path, refused=True)
    assert f"{first} and\n{second} are both otc-value, seed 1" in error and "differ" not in error
    assert "2 runs" not in said(first, first)  # the same folder twice is one run


def test_what_cannot_be_read_is_refused(tmp_path, said):
    assert "no run in" in said(tmp_path, refused=True)
    run = fake_run(tmp_path, 1, [1.0, 2.0])
    assert "did you mean mean_return" in said(tmp_path, "--column", "mean_retrun", refused=True)
    assert "did you mean otc-value" in said(tmp_path, "--baseline", "otc-valeu", refused=True)
    assert "did you mean distance" in said(tmp_path, "--by", "distanse", refused=True)
    assert "no run in nowhere" in said(tmp_path, "nowhere", refused=True)
    assert "at least 0" in said(tmp_path, "--bootstrap-seed", "-1", refused=True)
    assert "PNG" in said(tmp_path, "--out", tmp_path / "figure.pdf", refused=True)
    assert "at least 100" in said(tmp_path, "--resamples", "5", refused=True)
    assert "cannot be written" in said(tmp_path, "--csv", tmp_path / "no" / "c.csv", refused=True)
    for value in ("inf", "nan", "many"):
        (run / "returns.csv").write_text(f"mean_return,normalized_score\n1,1\n{value},1\n")
        assert "not all of mean_return are" in said(tmp_path, refused=True)
    (run / "returns.csv").write_text("mean_return,normalized_score\n1,1\n2,nan\n")
    assert "not all of normalized_score are" in said(tmp_path, refused=True)
    (run / "returns.csv").write_bytes(b"mean_return\n\xff\xfe\n")
    assert "returns.csv cannot be read" in said(tmp_path, refused=True)
    record = json.loads((run / "args.json").read_text())
    for text in ("{", json.dumps({"args": record["args"]})):
        (run / "args.json").write_text(text)
        assert "is not a run folder" in said(tmp_path, refused=True)


def test_a_row_that_was_cut_is_none(tmp_path, said):
    """A copy that broke off amid the last number, or the last but one."""
    fake_run(tmp_path, 1, [1.0, 2.0])
    run = fake_run(tmp_path, 2, [1.0, 2.5])
    whole = (run / "returns.csv").read_text()
    for cut in (1, 3, 9):
        (run / "returns.csv").write_text(whole[:-cut])
        assert "left out: 1 unfinished" in said(tmp_path)
    (run / "returns.csv").write_text(whole)
    assert "left out" not in said(tmp_path)


def test_linked_folders_count(tmp_path, said):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").mkdir()
    fake_run(tmp_path / "linked", 1, [1.0, 2.0])
    run = fake_run(tmp_path / "real", 2, [1.0, 2.0])
    (tmp_path / "linked" / "other").symlink_to(run)
    assert "2 runs" in said(tmp_path / "linked")
