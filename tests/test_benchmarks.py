"""The programs behind the tables of docs/."""

import csv
import json

import numpy as np
import pytest

from benchmarks import curves, offline_table, speed
from tests.helpers import random_team


def test_speed_times_every_strategy_and_shares_out_the_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed.datasets, "load", lambda env: random_team(n=20_000))
    monkeypatch.setattr(speed, "exact_seconds", lambda *args: 0.25)
    out = tmp_path / "speed.json"
    scripts = ("otc_td3bc", "otc_cql_discrete")
    speed.main(speed.Args(scripts, num_seeds=(1,), repetitions=2, seconds=0.0, json=str(out)))
    record = json.loads(out.read_text())
    timed = {(row["script"], row["seeds"], row["update"]) for row in record["times"]}
    assert timed == {(script, 1, name) for script in scripts for name in speed.STRATEGIES}
    assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in record["times"])
    for row in record["stages"]:
        shares = {key: row[key] for key in ("draw", "forward", "match", "rank", "learner", "rest")}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[key] for key in ("draw", "forward", "match", "rank", "learner")) > 0
    assert record["exact_match_s"] == {"value": 0.25, "embedding": 0.25}
    assert "| otc_cql_discrete | 1 | eager | otc (value) |" in capsys.readouterr().out


def fake_run(folder, script, seed, returns, **args):
    """A run folder with the returns of pi^0, pi^1, ..."""
    run = folder / f"halfcheetah-medium__{script}__{seed}__{len(list(folder.iterdir()))}"
    run.mkdir()
    usual = {"env": "halfcheetah-medium", "split": None, "offline_updates": 100, "seed": seed}
    args = usual | args
    (run / "args.json").write_text(json.dumps({"script": script, "seed": seed, "args": args}))
    with open(run / "returns.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["deployment", "env_steps", "episodes", "mean_return", "std_return", "normalized_score"]
            + ["alpha_agent_0", "alpha_agent_1"]
        )
        for k, x in enumerate(returns):
            rows.writerow([k, 100 * k, 5, x, 1.0, x / 100, 1.0 + k, 2.0])


def test_the_offline_table_takes_the_first_policy_and_tells_ma_cql_from_omar(tmp_path, capsys):
    for seed, value in ((1, 1000.0), (2, 3000.0)):
        fake_run(tmp_path, "omar", seed, [value, -5.0], omar_coefficient=0.0)
    fake_run(tmp_path, "omar", 1, [4000.0], omar_coefficient=None)
    offline_table.main(offline_table.Args((str(tmp_path),), csv=str(tmp_path / "table.csv")))
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["mean_return"]) for row in rows) == [1000, 3000, 4000]
    printed = capsys.readouterr().out
    ma_cql = next(line for line in printed.splitlines() if "--omar-coefficient 0" in line)
    assert ma_cql.split("|")[5].strip() == "2" and "| 2000 | 20.0 +- 10.0 |" in ma_cql


def test_curves_average_the_seeds_of_a_strategy(tmp_path, capsys):
    for sampling, shift in (("otc", 0.0), ("uniform", 10.0)):
        for seed, value in ((1, 100.0), (2, 300.0)):
            its_returns = [value, value + shift, value + 2 * shift]
            options = {"sampling": sampling, "distance": "value", "adaptive_alpha": True}
            options |= {"alpha": 1.0, "exploration": "none", "alpha_max": None}
            options |= {"replacement": True, "exclude_self_matches": False}
            fake_run(tmp_path, "otc_td3bc", seed, its_returns, **options)
    curves.main(curves.Args(str(tmp_path), csv=str(tmp_path / "c.csv")))
    with open(tmp_path / "c.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    last = [float(r["mean_return"]) for r in rows if r["deployment"] == "2"]
    assert np.mean(last) == 210 and sorted(last) == [100, 120, 300, 320]
    printed = capsys.readouterr().out
    assert "220" in next(line for line in printed.splitlines() if "uniform" in line)
