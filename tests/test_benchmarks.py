"""The programs behind the tables of docs/."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

import benchmarks
from benchmarks import (
    Worker,
    drawn_transitions,
    env_workers,
    offline_table,
    omsd_bandit,
    omsd_beta,
    peers,
    plot_run,
    restored,
    scalars,
    speed,
    turns,
    value_actions,
    whole_run,
)
from common import InputError, checkpoints
from common.envs import make_vec
from tests.helpers import random_team
from tools import render

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "script", ["otc_td3bc", pytest.param("otc_cql_discrete", marks=pytest.mark.slow)]
)
def test_speed_times_every_strategy_and_shares_out_the_time(monkeypatch, tmp_path, capsys, script):
    monkeypatch.setattr(speed.datasets, "load", lambda env: random_team(n=20_000))
    monkeypatch.setattr(speed, "exact_seconds", lambda *args: 0.25)
    some = ("uniform", "otc (value)", "otc (embedding)")  # of all, it takes minutes
    monkeypatch.setattr(speed, "STRATEGIES", {name: speed.STRATEGIES[name] for name in some})
    out = tmp_path / "speed.json"
    speed.main(speed.Args((script,), num_seeds=(1,), repetitions=2, seconds=0.0, json=str(out)))
    record = json.loads(out.read_text())
    timed = {(row["script"], row["seeds"], row["update"]) for row in record["times"]}
    assert timed == {(script, 1, name) for name in speed.STRATEGIES}
    assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in record["times"])
    for row in record["stages"]:
        shares = {key: row[key] for key in ("draw", "forward", "match", "rank", "learner", "rest")}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[key] for key in ("draw", "forward", "match", "rank", "learner")) > 0
    assert record["exact_match_s"] == {"value": 0.25, "embedding": 0.25}
    assert f"| {script} | 1 | eager | otc (value) |" in capsys.readouterr().out


def test_a_time_says_on_what_and_what_else_ran_there():
    what = speed.machine(torch.device("cpu"))
    names = {"cpu", "family", "model", "flags", "vectors", "caches", "cores", "load", "commit"}
    assert names < what.keys() and what["cores"] >= 1 and what["load"] >= 0
    line = speed.introduction("some-data", what)
    assert line.startswith(f"some-data, cpu {what['cpu']}") and "flags" not in line
    if Path("/sys/devices/system/cpu/cpu0/cache").exists():
        assert "L1 Data" in what["caches"]


def test_a_peer_is_asked_only_for_what_it_has():
    for options in ({"algorithms": ("BCQ", "IQL")}, {"peer": "torchrl", "compile": True}):
        with pytest.raises(InputError):
            peers.main(peers.Args(**options))
    for peer, scripts in peers.SCRIPTS.items():
        assert Path(peers.__file__).with_name(f"{peer}_worker.py").exists()
        for script in scripts.values():
            assert peers.learner_args(script).batch_size > 0


def test_two_checkouts_are_timed_in_turn(monkeypatch, tmp_path, capsys):
    asked = []

    class Fake:
        def __init__(self, folder):
            self.slow = 2.0 if folder == Path("before") else 1.0

        def seconds(self, script, num_seeds, updates, strategy):
            asked.append((self.slow, script, num_seeds, strategy))
            return self.slow * updates / 1e3

    monkeypatch.setattr(turns, "Checkout", Fake)
    out = tmp_path / "turns.json"
    turns.main(turns.Args(Path("before"), ("otc_bcq",), ("uniform",), (5,), 3, 0.01, json=str(out)))
    assert [each[0] for each in asked[-6:]] == [2.0, 1.0] * 3
    (row,) = json.loads(out.read_text())["ms"]
    assert row["before"] == pytest.approx([2.0] * 3) and row["now"] == pytest.approx([1.0] * 3)
    assert "| otc_bcq | 5 | uniform | 2.0 | 1.0 | 0.50 | 0.50 to 0.50 |" in capsys.readouterr().out


def fake_run(folder, script, seed, returns, record=None, **args):
    """A run folder with the returns of pi^0, pi^1, ..."""
    run = folder / f"halfcheetah-medium__{script}__{seed}__{len(list(folder.iterdir()))}"
    run.mkdir()
    usual = {"env": "halfcheetah-medium", "split": None, "offline_updates": 100, "seed": seed}
    args = usual | args
    content = {"script": script, "seed": seed, "args": args} | (record or {})
    (run / "args.json").write_text(json.dumps(content))
    with open(run / "returns.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["deployment", "env_steps", "episodes", "mean_return", "std_return", "normalized_score"]
            + ["alpha_agent_0", "alpha_agent_1"]
        )
        for k, x in enumerate(returns):
            rows.writerow([k, 100 * k, 5, x, 1.0, x / 100, 1.0 + k, 2.0])
    return run


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


def test_the_offline_table_pools_one_learner_and_every_seed_once(tmp_path, refusal, capsys):
    argv = tmp_path, "--csv", tmp_path / "table.csv"
    assert "no returns.csv" in refusal(offline_table, *argv)
    first = fake_run(tmp_path, "omar", 1, [1.0], critic="independent")
    fake_run(tmp_path, "omar", 1, [2.0], critic="centralised")
    offline_table.main(offline_table.Args((str(tmp_path),)))
    printed = capsys.readouterr().out
    assert "| omar |" in printed and "| omar --critic centralised |" in printed
    (tmp_path / "maiql").mkdir()
    fake_run(tmp_path / "maiql", "maiql", 1, [1.0], finetune=False)
    fake_run(tmp_path / "maiql", "maiql", 1, [2.0], finetune=True)
    offline_table.main(offline_table.Args((str(tmp_path / "maiql"),)))
    printed = capsys.readouterr().out
    assert "| maiql |" in printed and "| maiql --finetune |" in printed
    second = fake_run(tmp_path, "omar", 1, [3.0], critic="independent")
    said = refusal(offline_table, *argv)
    assert str(first) in said and str(second) in said


def test_the_behaviours_return_is_that_of_the_runs_own_data(tmp_path, capsys):
    for dataset, data_return in (("built-in", 1.0), ("d4rl", 4770.3), ("old.hdf5", None)):
        record = {"data_return": data_return}
        fake_run(tmp_path, "bc", 1, [1.0], record, dataset=dataset, env="halfcheetah-medium")
    offline_table.main(offline_table.Args((str(tmp_path),)))
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {line[1]: line[5] for line in lines} == {
        "halfcheetah-medium": "4411",
        "halfcheetah-medium (d4rl)": "4770",
        "halfcheetah-medium (old.hdf5)": "nan",
    }


def test_the_behaviours_score_is_that_of_its_own_table(tmp_path, capsys):
    with open(ROOT / "docs/results/datasets/team_datasets.csv") as file:
        scores = {row["dataset"]: row["score"] for row in csv.DictReader(file)}
    for env in scores:
        fake_run(tmp_path, "omar", 1, [1.0], env=env)
    offline_table.main(offline_table.Args((str(tmp_path),)))
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {line[1]: line[6] for line in lines} == scores


def test_omsds_betas_are_measured_once_for_each_setting(tmp_path, refusal, monkeypatch, capsys):
    asked, path = [], tmp_path / "beta.csv"

    def measure(args, settings, betas):
        asked.append([settings.score, *betas])
        seeds = range(1, 1 + args.num_seeds)
        columns = [omsd_beta.columns_of(args, settings, beta) for beta in betas]
        return [{**each, "seed": seed, "mean_return": 0.0} for each in columns for seed in seeds]

    monkeypatch.setattr(omsd_beta, "measure", measure)

    def of(scores=("decomposed",), **options):
        asked.clear()
        omsd_beta.main(omsd_beta.Args(("bandit-2",), str(path), scores, **options))
        return list(asked)

    assert of(("none", "decomposed")) == [["none", 1.0], ["decomposed", 1.0]]
    assert of(("none", "decomposed")) == []
    assert "bandit-2 decomposed beta 1.0: in" in capsys.readouterr().out
    assert of(betas=(0.3, 1.0)) == [["decomposed", 0.3]]
    assert of(betas=(0.3,), num_seeds=2) == of(betas=(0.3,), episodes=7) == [["decomposed", 0.3]]
    assert of(settings=omsd_beta.omsd.Args(gamma=0.5)) == [["decomposed", 1.0]]
    with open(path) as file:
        assert len(list(csv.DictReader(file))) == 5 + 5 + 5 + 2 + 5 + 5
    path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")  # cut short
    capsys.readouterr()
    cut = refusal(omsd_beta, "bandit-2", "--csv", path, "--scores", "none")
    assert "has 3 rows of bandit-2 none beta 1.0, not --num-seeds 5" in cut
    path.write_text("env,score,beta\nbandit-2,decomposed,1.0\n")
    assert "does not say how it was made" in refusal(omsd_beta, "bandit-2", "--csv", path)


def test_a_process_that_ends_is_told_with_its_last_words():
    code = "import sys; input(); print(2.5, flush=True); raise KeyError('foo')"
    worker = Worker("it", [sys.executable, "-c", code])
    assert worker.ask("how long?") == 2.5
    with pytest.raises(InputError, match="it ended with status 1: KeyError: 'foo'"):
        worker.ask("again?")


def test_a_whole_run_of_a_script_that_deploys_nothing_is_timed(monkeypatch):
    import bc

    begun = []
    monkeypatch.setattr(bc, "main", begun.append)
    found = whole_run.phases_of(whole_run.Args("bc", offline_updates=3), 2)
    assert set(found) == set(whole_run.PHASES)
    assert begun[0].num_seeds == 2 and begun[0].offline_updates == 3


def test_a_picture_of_another_versions_run_is_refused(tmp_path):
    run = fake_run(tmp_path, "otc_bcq", 1, [1.0], forgotten_argument=1)
    state = {"agent": {}, "script": "otc_bcq", "format": checkpoints.FORMAT}
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(InputError, match="is a run of another version of its script"):
        render.trained_policy(str(run), make_vec("hopper", 1, 0))


def test_tools_refuse_what_they_cannot_read(tmp_path, refusal):
    out = tmp_path / "file.png"
    assert "nope is not a run folder" in refusal(plot_run, "nope", "--figure", out)
    run = fake_run(tmp_path, "otc_td3bc", 1, [1.0], eval_every=200, policy_delay=2)
    assert "--eval-every 200" in refusal(plot_run, run, "--figure", out)
    assert "would lie in a run's folder" in refusal(
        offline_table, run, "--csv", run / "returns.csv"
    )
    torch.save({"agent": {}, "progress": (0, 100), "script": "otc_td3bc"}, run / "offline.pt")
    assert "of otc_td3bc, not otc_bcq" in refusal(value_actions, run, "--csv", out)
    assert "no run folders" in refusal(drawn_transitions, "--csv", out)
    assert "--gamma is 5.0" in refusal(omsd_beta, "--settings.gamma", 5, "--csv", out)
    assert "--draws is 0" in refusal(drawn_transitions, run, "--draws", 0, "--csv", out)
    assert "--seconds is nan" in refusal(turns, "--before", run, "--seconds", "nan", "--json", out)
    assert "--num-seeds is 0" in refusal(turns, "--before", run, "--num-seeds", 1, 0)
    assert "--workers 1 or more" in refusal(env_workers, "--workers", 0, "--csv", out)
    assert "--scripts iql: did you mean" in refusal(speed, "--scripts", "iql", "--json", out)
    argv = "--csv", out, "--fields", out, "--weightings"
    for wrong in ("foo", "vds", "vds 1.2.3", "foo 0.98"):
        assert f"--weightings '{wrong}': expected" in refusal(omsd_bandit, *argv, wrong)
    assert "no script 'foo'" in refusal(whole_run, "--script", "foo", "--json", out)
    with pytest.raises(InputError, match="is a run of mine; expected one of otc_bcq,"):
        restored.restore(str(fake_run(tmp_path, "mine", 1, [1.0])))
    assert "nothing to copy" in refusal(scalars, "--csv", out)
    assert "has no such argument" in refusal(scalars, run, "--by", "nope", "--csv", out)


def test_scalars_of_runs_that_an_argument_tells_apart(tmp_path, capsys):
    """A run that is named twice counts once; one that has none is said."""
    some = {"deployments": 1, "sampling": "uniform"}
    runs = [
        fake_run(tmp_path, "otc_bcq", 1, [1.0, 2.0], embedding_kl_weight=weight, **some)
        for weight in (0.5, 0.05)
    ]
    for run, value in zip(runs, (1.5, 2.5), strict=True):
        with SummaryWriter(str(run)) as writer:
            writer.add_scalar("otc/alpha", value, 3)
            writer.add_scalar("charts/return", value, 3)
    out = tmp_path / "scalars.csv"
    empty = fake_run(tmp_path, "otc_bcq", 2, [1.0, 2.0], embedding_kl_weight=0.5, **some)
    argv = (*map(str, runs), f"{runs[0]}/", str(empty)), str(out)
    scalars.main(scalars.Args(*argv, by=("embedding-kl-weight",)))
    assert capsys.readouterr().err == f"{empty} has no such tag\n"
    with open(out, newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("otc_bcq", "halfcheetah-medium", f"uniform embedding_kl_weight={weight}")
        + ("1", "otc/alpha", "3", value)
        for weight, value in (("0.5", "1.5"), ("0.05", "2.5"))
    ]


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    benchmarks.write_csv(str(path), [{"a": 1}])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="rows.csv cannot be written: No space left"):
        benchmarks.write_csv(str(path), [{"a": 1}, {"a": 2}])
    with pytest.raises(InputError, match="rows.png cannot be written: No space left"):
        benchmarks.write_figure(tmp_path / "rows.png", Figure(), 50)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["rows.csv"]
    monkeypatch.setattr("os.access", lambda *of: False)  # a folder that takes no new file
    benchmarks.write_csv(str(path), [{"a": 3}])
    assert path.read_bytes() == b"a\n3\n"


def test_two_outputs_are_two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="two outputs go to .*a.csv"):
        benchmarks.check_outputs("a.csv", str(tmp_path / "a.csv"))
    benchmarks.check_outputs("a.csv", "b.csv", None)
    benchmarks.check_outputs("/dev/null", "/dev/null")
    benchmarks.write("/dev/null", "words")
    assert Path("/dev/null").is_char_device() and not list(tmp_path.iterdir())
