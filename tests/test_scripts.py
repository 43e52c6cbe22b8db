"""What every script must do: whole runs, resuming, bad input."""

import contextlib
import csv
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import checkpoints, runs
from common.device import Graphed
from common.envs import VecEnv
from common.replay import Replay
from tests.helpers import (
    SCRIPTS,
    WITH_OTC,
    WITH_SCALES,
    assert_same,
    every_otc_script,
    every_script,
    for_learner,
    learner_of,
    logged_steps,
    only,
    run,
    scalars,
    state_of,
    tiny,
)
from tests.tiny_task import ENV

ROOT = Path(__file__).parent.parent

# --- Runs ---


EMBEDDING = ["--sampling", "otc", "--distance", "embedding"]
RUNS = [
    ["--sampling", "otc", "--distance", "value", "--exclude-self-matches", "--no-replacement"],
    ["--sampling", "otc", "--no-adaptive-alpha", "--alpha", "0.5"],
    ["--sampling", "balanced"],
    ["--sampling", "online"],
    ["--sampling", "offline"],
]
RUNS = [("otc_bcq", strategy) for strategy in RUNS]
RUNS += [(script, EMBEDDING) for script in WITH_OTC]
RUNS += [(s, ["--sampling", "otc", "--distance", "value"]) for s in WITH_OTC if s != "otc_bcq"]
RUNS += [(script, ["--sampling", "uniform"]) for script in WITH_OTC]
# Steps that each of a learner's optimisers makes in 60 offline updates and twice 20
STEPS = {
    "otc_bcq": [100, 100, 100],
    "otc_awac": [100, 100],
    "otc_cql": [100, 100, 0],
    "otc_td3bc": [100, 20 + 6 + 6],
    "otc_bremen": [100, 40 + (2 + 2 + 2) * 3, 40],
    "omar": [100, 100],
    "icq": [100, 100],
    "otc_cql_discrete": [100],
}


@pytest.mark.parametrize(("script", "strategy"), RUNS, ids=str)
def test_a_run_of_two_seeds_writes_what_it_should(
    tmp_path, monkeypatch, capsys, data, script, strategy
):
    where = tmp_path / "runs"
    common = ["--env", ENV, "--dataset", data, "--run-dir", where, *tiny(script)]
    run(monkeypatch, script, *common, "--num-seeds", 2, "--seed", 3, *strategy)
    folders = sorted(where.iterdir(), key=lambda f: f.name.split("__")[-2])
    otc = "otc" in strategy
    named = f"otc-{'embedding' if 'embedding' in strategy else 'value'}" if otc else strategy[1]
    for folder, seed in zip(folders, "34", strict=True):
        parts = folder.name.split("__")
        assert parts[1] == script and parts[2].startswith(named) and parts[3] == seed
    for folder in folders:
        rows = list(csv.DictReader((folder / "returns.csv").open()))
        assert [row["deployment"] for row in rows] == ["0", "1", "2"]
        assert [row["env_steps"] for row in rows] == ["0", "60", "120"]
        assert [row["episodes"] for row in rows] == ["10"] * 3
        assert all(float(row["mean_return"]) < 0 for row in rows)
        assert {"alpha_agent_0", "alpha_agent_1"} <= set(rows[0])
        if "--no-adaptive-alpha" in strategy:
            assert {row["alpha_agent_0"] for row in rows} == {"0.5"}

        logged = scalars(folder)
        updates = list(range(10, 101, 10))  # offline, then two deployments
        losses = {tag for tag in logged if tag.startswith("losses/")}
        of_embedding = {"losses/embedding_reconstruction", "losses/embedding_kl"}
        assert len(losses) > 3 and (of_embedding <= losses) == (strategy == EMBEDDING)
        for tag in losses:
            assert list(logged[tag]) == (updates[:6] if tag in of_embedding else updates), tag
        assert list(logged["otc/value_mean_agent_1"]) == updates
        drawn = {"otc/unique_fraction", "otc/online_fraction"}
        assert all(list(logged[tag]) == updates[6:] for tag in drawn)
        alphas = {"otc/alpha_agent_0", "otc/transition_distance_agent_1"}
        alphas |= {"otc/effective_sample_size_agent_0"}
        assert alphas <= set(logged) if otc else not alphas & set(logged)
        assert list(logged["offline/episodic_return"]) == [30, 60]
        returns = [float(row["mean_return"]) for row in rows]
        assert list(logged["charts/episodic_return"]) == [0, 1, 2]
        assert list(logged["charts/episodic_return"].values()) == pytest.approx(returns)
        for tag in set(logged) - {"charts/normalized_score"}:  # the tiny task has no scale for it
            assert np.isfinite(list(logged[tag].values())).all(), tag

    state = torch.load(folders[0] / "checkpoint.pt", weights_only=True)
    optimizers = [its_state["state"] for its_state in state["agent"]["_extra_state"]]
    steps = [int(o[0]["step"]) if o else 0 for o in optimizers]
    assert steps == STEPS.get(script, steps)

    text = capsys.readouterr().out
    assert text.startswith("file: 1,000 transitions") and "improvement" in text and "mean" in text
    assert sorted(f.name for f in folders[0].iterdir() if "events" not in f.name) == [
        "args.json",
        "checkpoint.pt",
        "offline.pt",
        "returns.csv",
    ]
    if strategy == EMBEDDING:  # trained after pi^0, frozen afterwards
        for name, steps in (("offline.pt", set()), ("checkpoint.pt", {60})):
            state = state_of(folders[0] / name)["strategy"]["embedding._extra_state"]
            assert {s["step"].item() for s in state["optimizer"]["state"].values()} == steps


@every_otc_script
def test_offline_updates_see_offline_data_and_later_ones_what_the_sampler_draws(
    tmp_path, monkeypatch, data, script
):
    module = importlib.import_module(script)
    learner, last, drawn, seen = learner_of(script), {}, [], []
    gather, draw, update = Replay.gather, module.OTC.draw, learner.update

    def noted_gather(replay, index, *columns):
        last["index"], last["batch"] = index, gather(replay, index, *columns)
        return last["batch"]

    def noted_draw(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    def noted_update(agent, batch, *kind):
        assert batch["obs"] is last["batch"]["obs"]
        seen.append(last["index"])
        return update(agent, batch, *kind)

    monkeypatch.setattr(Replay, "gather", noted_gather)
    monkeypatch.setattr(module.OTC, "draw", noted_draw)
    monkeypatch.setattr(learner, "update", noted_update)
    where = ["--run-dir", tmp_path / "runs"]
    run(monkeypatch, script, "--env", ENV, "--dataset", data, *tiny(script), *where)
    offline, later = seen[:60], seen[60:]
    assert max(index.max() for index in offline) < 1000
    assert len(later) == 40 and all(map(torch.equal, later, drawn))
    assert max(index.max() for index in later) >= 1000


@pytest.mark.parametrize("script", WITH_SCALES)
def test_a_run_scales_by_its_file(tmp_path, monkeypatch, data, script):
    learner = learner_of(script)
    scales, update = [], learner.update

    def watched(agent, batch, *kind):
        scales.append((agent.obs_mean.numpy().copy(), agent.obs_std.numpy().copy()))
        return update(agent, batch, *kind)

    monkeypatch.setattr(learner, "update", watched)
    where = ["--run-dir", tmp_path / "runs"]
    run(monkeypatch, script, "--env", ENV, "--dataset", data, *tiny(script), *where)
    with h5py.File(data) as file:
        obs = file["observations"][:]
    assert len(scales) == 60 + 20 + 20
    for mean, std in scales:
        np.testing.assert_allclose(mean[:, 0], [obs.mean(0)] * 2, atol=1e-5)
        np.testing.assert_allclose(std[:, 0], [obs.std(0) + 1e-3] * 2, rtol=1e-3)


@every_otc_script
def test_strategies_start_from_the_same_offline_policy(tmp_path, monkeypatch, data, script):
    common = ["--env", ENV, "--dataset", data, *tiny(script)]
    run(monkeypatch, script, *common, "--run-dir", tmp_path / "a", "--deployments", 0)
    start = only(tmp_path / "a")
    first_rows, first_data, parts = [], [], []
    for sampling in ("otc", "uniform"):
        where = tmp_path / sampling
        options = ["--run-dir", where, "--offline-checkpoint", start, "--sampling", sampling]
        run(monkeypatch, script, *common, *options)
        row = next(csv.DictReader((only(where) / "returns.csv").open()))
        first_rows.append({k: v for k, v in row.items() if not k.startswith("alpha")})
        state = torch.load(only(where) / "checkpoint.pt", weights_only=True)
        first_data.append(state["replay"]["obs"][:, :, :60])
        parts.append(state["agent"])
    assert first_rows[0] == first_rows[1] and torch.equal(*first_data)
    offline = torch.load(start / "offline.pt", weights_only=True)["agent"]
    for part in parts:  # which they then leave
        assert any(not torch.equal(offline[k], part[k]) for k in offline if k.endswith("weight"))


@pytest.mark.parametrize("script", [script for script in WITH_OTC if script != "otc_bremen"])
def test_fine_tuning_takes_its_own_learning_rates(tmp_path, monkeypatch, data, script):
    common = ["--env", ENV, "--dataset", data, *tiny(script)]
    run(monkeypatch, script, *common, "--run-dir", tmp_path / "a", "--deployments", 0)
    names = [f.name for f in dataclasses.fields(importlib.import_module(script).Args)]
    rates = [n for n in names if n.endswith("learning_rate") and n != "embedding_learning_rate"]
    for name in rates:
        common += ["--" + name.replace("_", "-"), 0]
    options = ["--run-dir", tmp_path / "b", "--offline-checkpoint", only(tmp_path / "a")]
    run(monkeypatch, script, *common, *options, "--sampling", "uniform")
    folder = only(tmp_path / "b")
    before, after = (
        torch.load(only(tmp_path, f"{name}/*/{file}"), weights_only=True)["agent"]
        for name, file in (("a", "offline.pt"), ("b", "checkpoint.pt"))
    )
    trained = [n for n in before if n.endswith("weight") and "target" not in n]
    assert rates and trained and all(torch.equal(before[n], after[n]) for n in trained)
    assert min(scalars(folder)["otc/online_fraction"]) == 70


class Killed(BaseException):
    """What no code of a script catches, as nothing catches SIGKILL."""


def end_life(monkeypatch, module, what, count):
    """Die at the count-th update, write of a file (before it is in place) or step of environments;
    or be asked to stop by SIGTERM at the count-th update."""
    seen = {"update": 0, "write": 0, "step": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            if name == "update" and "update" not in args[0].function.__name__:
                return function(*args, **kwargs)  # acting
            seen[name] += 1
            if (what, count) == (name, seen[name]):
                raise Killed
            if (what, count, name) == ("SIGTERM", seen[name], "update"):
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Graphed, "__call__", counted("update", Graphed.__call__))
    monkeypatch.setattr(os, "replace", counted("write", os.replace))
    monkeypatch.setattr(VecEnv, "to_box", counted("step", VecEnv.to_box))


# 60 offline updates and twice 40, a checkpoint every 17, evaluations of 20 steps at update 30 and
# 60, deployments of 60 steps: each life goes on from the last checkpoint of the one before.
LIVES = [
    ("update", 37),
    ("write", 1),  # from 34: the checkpoint of update 51
    ("SIGTERM", 5),  # from 34
    ("step", 50),  # from 39: in the first deployment
    ("write", 4),  # from 60: between returns.csv of the first seed and of the second
    ("update", 54),  # from 60: in the second deployment's fine-tuning
    ("step", 10),  # from the second deployment: the last evaluation
]
# The others' loops are otc_bcq's; that their learners keep all they need, test_learners.py sees.
OWN_PATHS = ["otc_bcq", "otc_bremen"]


@pytest.mark.parametrize(
    ("script", "strategy"),
    [pytest.param(s, "", marks=() if s in OWN_PATHS else pytest.mark.slow) for s in WITH_OTC]
    + [("otc_bcq", "--sampling balanced"), ("otc_bcq", "--distance embedding --alpha-max 2")],
)
def test_a_run_that_dies_again_and_again_ends_where_the_unbroken_one_does(
    tmp_path, monkeypatch, data, script, strategy
):
    """returns.csv, parameters, optimisers, data and generators are bit for bit the same."""
    argv = ["--env", ENV, "--dataset", data, *tiny(script), *strategy.split(), "--num-seeds", 2]
    argv += ["--finetune-updates", 40, "--checkpoint-every", 17]
    run(monkeypatch, script, *argv, "--run-dir", tmp_path / "unbroken")
    module = importlib.import_module(script)
    options, progress, ends = [*argv, "--run-dir", tmp_path / "broken"], [], []
    for number, life in enumerate(LIVES):
        torch.manual_seed(number)  # a new process does not go on with the generators of the old
        with monkeypatch.context() as patch, pytest.raises((Killed, SystemExit)) as end:
            end_life(patch, module, *life)
            run(patch, script, *options)
        assert end.type is Killed or (life[0] == "SIGTERM" and end.value.code == 143)
        ends.append(end)  # and with it all that died: the folder is free nevertheless
        first, second = sorted((tmp_path / "broken").iterdir())
        options = ["--resume", second if number == 2 else first]
        state = torch.load(first / "checkpoint.pt", weights_only=True)
        progress.append(state["progress"])
    embeds = any(name.startswith("embedding.") for name in state["strategy"])
    third = (0, 120 if embeds else 60)  # 60 updates more, of the embedding
    assert progress == [(0, 34), (0, 34), (0, 39), third, third, (2, 0), (2, 40)]
    run(monkeypatch, script, *options)

    whole, broken = (sorted((tmp_path / name).iterdir()) for name in ("unbroken", "broken"))
    for one, other in zip(whole, broken, strict=True):
        assert (one / "returns.csv").read_bytes() == (other / "returns.csv").read_bytes()
        assert logged_steps(one) == logged_steps(other)
        values = [{t: v for t, v in scalars(x).items() if "time/" not in t} for x in (one, other)]
        assert_same(*values)
    for name in ("offline.pt", "checkpoint.pt"):
        assert_same(*(state_of(f[0] / name) for f in (whole, broken)))


@pytest.mark.parametrize("flags", [(), ("--offline-updates", 0)])
@pytest.mark.parametrize("back", [0, 7200])
def test_every_point_is_logged_once_and_in_order(tmp_path, monkeypatch, data, flags, back):
    """Whatever the clock says, of a run that is stopped twice; also without pi^0's updates."""
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_td3bc"), *flags]
    run(monkeypatch, "otc_td3bc", *argv, "--run-dir", tmp_path / "unbroken")
    options, clock = [*argv, "--run-dir", tmp_path / "broken"], time.time
    for life in range(3):
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            patch.setattr(time, "time", lambda life=life: clock() - life * back)
            if life < 2:
                end_life(patch, None, "SIGTERM", 8)
            run(patch, "otc_td3bc", *options)
        options = ["--resume", only(tmp_path / "broken")]
    whole, broken = only(tmp_path / "unbroken"), only(tmp_path / "broken")
    assert (broken / "returns.csv").read_bytes() == (whole / "returns.csv").read_bytes()
    assert logged_steps(broken) == logged_steps(whole)
    assert all(steps == sorted(set(steps)) for steps in logged_steps(broken).values())
    together = EventAccumulator(str(broken), size_guidance={"scalars": 0})
    together.Reload()
    for tag, steps in logged_steps(whole).items():
        assert [event.step for event in together.Scalars(tag)] == steps, tag


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - set(WITH_OTC)))
def test_an_offline_script_logs_stops_and_goes_on(tmp_path, monkeypatch, capsys, data, script):
    argv = ["--env", ENV, "--dataset", data, *tiny(script), "--num-seeds", 2]
    run(monkeypatch, script, *argv, "--run-dir", tmp_path / "unbroken")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        end_life(patch, None, "SIGTERM", 37)
        run(patch, script, *argv, "--run-dir", tmp_path / "broken")
    whole, broken = (sorted((tmp_path / name).iterdir()) for name in ("unbroken", "broken"))
    assert exit.value.code == 143
    run(monkeypatch, script, "--resume", broken[0])
    for one, other in zip(whole, broken, strict=True):
        assert (one / "returns.csv").read_bytes() == (other / "returns.csv").read_bytes()
        (row,) = csv.DictReader((one / "returns.csv").open())
        assert row["deployment"] == "0" and row["env_steps"] == "0" and row["episodes"] == "10"
        assert logged_steps(one) == logged_steps(other)
        losses = {k: v for k, v in logged_steps(one).items() if k.startswith("losses/")}
        assert losses and all(v == list(range(10, 61, 10)) for v in losses.values())
    assert_same(*(state_of(f[0] / "checkpoint.pt") for f in (whole, broken)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_script
def test_a_run_on_a_gpu_is_the_same_without_graphs_and_stopped(tmp_path, monkeypatch, data, script):
    argv = ["--env", ENV, "--dataset", data, *tiny(script), "--num-seeds", 2, "--device", "cuda"]
    run(monkeypatch, script, *argv, "--run-dir", tmp_path / "graphs")
    run(monkeypatch, script, *argv, "--no-cuda-graph", "--run-dir", tmp_path / "eager")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        end_life(patch, None, "SIGTERM", 37)
        run(patch, script, *argv, "--run-dir", tmp_path / "stopped")
    run(monkeypatch, script, "--resume", min((tmp_path / "stopped").iterdir()))
    graphs, *others = (
        state_of(min((tmp_path / name).iterdir()) / "checkpoint.pt")
        for name in ("graphs", "eager", "stopped")
    )
    for other in others:
        assert other["progress"] == graphs["progress"]
        for name, value in graphs["agent"].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(other["agent"][name], value, rtol=1e-3, atol=1e-4)


def start_process(script, *argv):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.slow
def test_resume_after_a_kill_ends_where_the_unbroken_run_does(tmp_path, data):
    """A process of its own, killed some time after its first checkpoint; all that it saves at the
    end is bit for bit the same."""
    # No tight loop of checkpoints: most moments are between two of them.
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--offline-updates", 400]
    argv += ["--finetune-updates", 200, "--checkpoint-every", 110]
    unbroken = start_process("otc_bcq", *argv, "--run-dir", tmp_path / "unbroken")
    process = start_process("otc_bcq", *argv, "--run-dir", tmp_path / "broken")
    while not list((tmp_path / "broken").glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(np.random.default_rng(0).uniform(0, 1))
    process.kill()
    process.communicate(timeout=60)
    folder = only(tmp_path / "broken")
    process = start_process("otc_bcq", "--resume", folder)
    for each in (process, unbroken):
        output, _ = each.communicate(timeout=300)
        assert each.returncode == 0, output

    whole = only(tmp_path / "unbroken")
    assert (whole / "returns.csv").read_bytes() == (folder / "returns.csv").read_bytes()
    assert logged_steps(whole) == logged_steps(folder)  # nothing twice, nothing lost
    assert_same(*(state_of(f / "checkpoint.pt") for f in (whole, folder)))


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys, data):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    count, update = iter(range(1, 100)), Graphed.__call__

    def interrupted(*args):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(Graphed, "__call__", interrupted)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "otc_bcq", *argv)
    folder = only(tmp_path / "runs")
    assert exit.value.code == 130 and f"--resume {folder}" in capsys.readouterr().err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["progress"] == (0, 7)


# 60 steps of deployment and 20 of evaluation, twice, and 20 of the last evaluation
@pytest.mark.parametrize(("step", "progress"), [(30, (0, 60)), (70, (0, 60)), (165, (2, 20))])
def test_a_stop_amid_a_deployment_takes_effect_at_once(tmp_path, monkeypatch, data, step, progress):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--eval-every", 1000]
    run(monkeypatch, "otc_bcq", *argv, "--run-dir", tmp_path / "unbroken")
    count, to_box = [0], VecEnv.to_box

    def stepped(*args):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_box(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(VecEnv, "to_box", stepped)
        run(patch, "otc_bcq", *argv, "--run-dir", tmp_path / "broken")
    assert exit.value.code == 143 and count[0] == step
    whole, broken = only(tmp_path / "unbroken"), only(tmp_path / "broken")
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["progress"] == progress
    run(monkeypatch, "otc_bcq", "--resume", broken)
    assert (whole / "returns.csv").read_bytes() == (broken / "returns.csv").read_bytes()
    assert_same(*(state_of(f / "checkpoint.pt") for f in (whole, broken)))


def test_ctrl_c_while_the_data_is_made_is_no_traceback(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.datasets.load", interrupted)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "otc_bcq")
    assert exit.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# Each is alone in the folder while it runs. One process for all: most of its time is imports.
ONE_AFTER_ANOTHER = """
import json, pathlib, runpy, shutil, sys
for script, *argv in json.load(sys.stdin):
    copy = shutil.copy(script, ".")
    sys.argv = [copy, *argv]
    print("began", copy, flush=True)
    runpy.run_path(copy, run_name="__main__")
    print("ended", copy, flush=True)
    pathlib.Path(copy).unlink()
"""


def test_one_script_and_common_copied_into_an_empty_folder_run(tmp_path, data):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignore)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "tiny_task.py", tmp_path / "tests")
    task = {script: for_learner(script, ["--env", ENV, "--dataset", data]) for script in SCRIPTS}
    jobs = [[str(ROOT / f"{script}.py"), *task[script], *tiny(script)] for script in SCRIPTS]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        input=json.dumps(jobs),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for script in SCRIPTS:
        said = result.stdout.split(f"began ./{script}.py")[1].split(f"ended ./{script}.py")[0]
        assert "score" in said, script


@every_script
def test_help_lists_every_flag_and_the_command(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, script, "--help")
    text = capsys.readouterr().out
    assert exit.value.code == 0 and f"python {script}.py --env " in text
    words = set(text.replace(",", " ").split())
    for field in dataclasses.fields(importlib.import_module(script).Args):
        assert "--" + field.name.replace("_", "-") in words


# --- Bad input ---


BAD = {
    "unknown task": (["--env", "halfcheeta-medium"], "did you mean halfcheetah"),
    "unknown quality": (["--env", "hopper-mediun"], "did you mean medium"),
    "no quality": (["--env", "hopper"], "hopper-medium"),
    "unknown split": (["--env", "hopper-medium", "--split", "2x3"], "1x3, 3x1"),
    "no data for it": (["--env", "ant-medium-expert"], "ant"),
    "no data for a factory": (["--env", ENV], "FILE.hdf5"),
    "no such file": (["--dataset", "missing.hdf5"], "missing.hdf5"),
    "zero": (["--batch-size", "0"], "--batch-size is 0"),
    "negative": (["--deployments", "-1"], "--deployments is -1"),
    "huge seed": (["--seed", "99999999999999999999"], "at most 9223372036854775807"),
    "zero deployment": (["--deployment-steps", "0"], "--deployment-steps is 0"),
    "negative alpha": (["--alpha", "-1"], "--alpha is -1"),
    "not a number": (["--learning-rate", "nan"], "--learning-rate is nan"),
    "empty size": (["--dataset-size", "0"], "--dataset-size is 0"),
    "more drawn than there is": (["--no-replacement", "--batch-size", "600"], "--candidates 512"),
    "no run": (["--resume", "nowhere"], "nowhere is not a run folder"),
    "no offline run": (["--offline-checkpoint", "nowhere"], "nowhere is not a run folder"),
    "too few references": (["DATA", "--deployments", "1"], "--references 2000"),
    "folder is a file": (
        ["DATA", "--deployments", "1", "--references", "5", "--run-dir", "DATA/runs"],
        "cannot write",
    ),
    "large gamma": (["--gamma", "1.5"], "--gamma is 1.5; it must be at least 0 and at most 1"),
    "no target actions": (["--num-target-actions", "0"], "--num-target-actions is 0"),
}
if not torch.cuda.is_available():
    BAD["no CUDA"] = (["--device", "cuda"], "no CUDA device")
SHORT = ["unknown task", "zero", "large gamma", "no run", "too few references", "folder is a file"]
OWN = {
    "otc_awac": {
        "temperature": (["--temperature", "0"], "--temperature is 0.0; it must be more than 0"),
        "weights": (["--weight-max", "-1"], "--weight-max is -1.0"),
        "rate": (["--actor-learning-rate", "-1e-4"], "--actor-learning-rate is -0.0001"),
    },
    "otc_cql": {
        "penalty": (["--cql-alpha", "-5"], "--cql-alpha is -5.0"),
        "penalty actions": (["--num-penalty-actions", "0"], "--num-penalty-actions is 0"),
        "tau": (["--tau", "2"], "--tau is 2.0; it must be at least 0 and at most 1"),
    },
    "otc_td3bc": {
        "delay": (["--policy-delay", "0"], "--policy-delay is 0; it must be at least 1"),
        "noise": (["--policy-noise", "-0.2"], "--policy-noise is -0.2"),
        "cloning": (["--bc-alpha", "inf"], "--bc-alpha is inf"),
    },
    "otc_bremen": {
        "models": (["--num-models", "0"], "--num-models is 0; it must be at least 1"),
        "KL": (["--kl-limit", "0"], "--kl-limit is 0.0; it must be more than 0"),
        "lambda": (["--gae-lambda", "1.5"], "--gae-lambda is 1.5"),
        "cloning": (["--clone-updates", "-1"], "--clone-updates is -1; it must be at least 0"),
        "rollouts": (["--rollouts", "0"], "--rollouts is 0"),
        "cloned only": ([], "--offline-updates 2: with --clone-updates 50000"),
        "no improvement": (
            ["--deployments", "1", "--finetune-updates", "50"],
            "--improve-every 100: with --finetune-updates 50",
        ),
    },
    "omar": {
        "coefficient": (["--omar-coefficient", "2"], "--omar-coefficient is 2.0"),
        "noise": (["--penalty-noise", "0"], "--penalty-noise is 0.0; it must be more than 0"),
        "unit": (["--value-unit", "0"], "--value-unit is 0.0; it must be more than 0"),
        "elites": (["--refit", "elite", "--elites", "11"], "at most --sampler-samples 10"),
        "centralised": (
            ["--critic", "centralised", "--deployments", "1", "--references", "5"],
            "--critic centralised has no Q(s, a_i) for --distance value",
        ),
    },
    "icq": {
        "rewards": (["--reward-scale", "0"], "--reward-scale is 0.0; it must be more than 0"),
        "temperature": (["--temperature", "0"], "--temperature is 0.0; it must be more than 0"),
        "of the target": (["--target-temperature", "0"], "--target-temperature is 0.0"),
    },
    "omsd": {
        "one stage": (["--policy-updates", "2"], "--policy-updates 2: less than --offline-updates"),
        "noise levels": (
            ["--policy-updates", "1", "--t-min", "0.5", "--t-max", "0.2"],
            "--t-min 0.5: at most --t-max 0.2",
        ),
        "beta": (["--beta", "-1"], "--beta is -1.0"),
        "order": (["--policy-updates", "1", "--order", "0,2"], "expected index, random, or such"),
        "order's words": (["--policy-updates", "1", "--order", "last"], "or such as 1,0"),
    },
}
CASES = [("otc_bcq", *case) for case in BAD.items()]
CASES += [
    (script, name, BAD[name])
    for script in OWN
    for name in SHORT
    if script in WITH_OTC or "--deployments" not in BAD[name][0]
]
CASES += [(script, *case) for script, cases in OWN.items() for case in cases.items()]


@pytest.mark.parametrize(
    ("script", "case"), [(s, c) for s, _, c in CASES], ids=[f"{s} {name}" for s, name, _ in CASES]
)
def test_bad_input_is_two_lines_status_2_and_nothing_written(
    tmp_path, monkeypatch, capsys, data, script, case
):
    argv, words = case
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    if argv[:1] == ["DATA"]:
        argv = ["--env", ENV, "--dataset", "point.hdf5", *argv[1:]]
    elif argv[:1] not in (["--env"], ["--dataset"]):  # a short run, were it not refused
        short = ["--offline-updates", "2"] + ["--deployments", "0"] * (script in WITH_OTC)
        argv = ["--env", ENV, "--dataset", "point.hdf5", *short, *argv]
    argv = [word.replace("DATA", "point.hdf5") for word in argv]
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, script, *argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and words in error, error
    assert len(error.strip().splitlines()) <= 2 and "Traceback" not in error
    assert sorted(f.name for f in tmp_path.iterdir()) == ["point.hdf5", "steps.hdf5"]


def test_a_link_that_leads_nowhere_is_no_place_for_runs(tmp_path, data, fails):
    (tmp_path / "runs").symlink_to(tmp_path / "missing")
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    fails("cannot write there", "otc_bcq", *argv)


UNKNOWN = [(s, ["--sampling", "otcc"]) for s in WITH_OTC] + [
    (s, ["--no-such-flag"]) for s in SCRIPTS
]
UNKNOWN += [("otc_bcq", ["--device", "gpu"]), ("otc_bremen", ["--termination", "sometimes"])]


@pytest.mark.parametrize(("script", "argv"), UNKNOWN, ids=str)
def test_unknown_choices_and_flags_exit_with_2(monkeypatch, capsys, script, argv):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, script, *argv)
    assert exit.value.code == 2


def test_only_the_policy_is_taken_from_an_offline_checkpoint(tmp_path, monkeypatch, data):
    """Whatever the strategy of its own run: alpha and the distance are the new run's."""
    common = ["--env", ENV, "--dataset", data, *tiny("otc_bcq")]
    starts = {
        "uniform": ["--sampling", "uniform"],
        "embedding": ["--distance", "embedding", "--alpha", 3, "--embedding-dim", 7],
    }
    for name, flags in starts.items():
        argv = [*common, *flags, "--deployments", int(name != "uniform")]
        run(monkeypatch, "otc_bcq", *argv, "--run-dir", tmp_path / name)
        start = ["--offline-checkpoint", only(tmp_path / name), "--run-dir", tmp_path / f"{name}-2"]
        for distance in ("value", "embedding"):
            run(monkeypatch, "otc_bcq", *common, *start, "--distance", distance, "--alpha", 1.5)
            folder = only(tmp_path / f"{name}-2", f"*otc-{distance}*")
            alphas = scalars(folder)["otc/alpha_agent_0"]
            assert alphas[1] == 1.5 and np.isfinite(alphas[2])
            rows = list(csv.DictReader((folder / "returns.csv").open()))
            assert rows[0]["alpha_agent_0"] == "1.5"
    both = [
        (only(tmp_path / f"{name}-2", "*otc-embedding*") / "returns.csv").read_text()
        for name in starts
    ]
    assert both[0] == both[1]


def test_unreadable_and_unfit_checkpoints(tmp_path, monkeypatch, data, fails):
    common = ["--env", ENV, "--dataset", data, *tiny("otc_bcq")]
    run(monkeypatch, "otc_bcq", *common, "--run-dir", tmp_path / "a", "--sampling", "uniform")
    folder = only(tmp_path / "a")
    before = {f: f.read_bytes() for f in folder.iterdir()}
    fails("--seed is 1 there, not 2", "otc_bcq", "--resume", folder, "--seed", 2)
    fails("--alpha is 1.0 there, not 2.0", "otc_bcq", "--resume", folder, "--alpha", 2.0)
    start = ["otc_bcq", *common, "--run-dir", tmp_path / "b", "--offline-checkpoint", folder]
    fails("--seed 1, not 7", *start, "--seed", 7)
    assert before == {f: f.read_bytes() for f in folder.iterdir()}
    content = (folder / "offline.pt").read_bytes()
    for spoiled in (content[: len(content) // 2], b"something else", b""):
        (folder / "offline.pt").write_bytes(spoiled)
        fails("not a readable checkpoint", *start)
    torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")
    fails("not a readable checkpoint", "otc_bcq", "--resume", folder)
    earlier = {"agent": {}, "sampler": {}, "progress": (0, 0), "script": "otc_bcq"}
    torch.save(earlier, folder / "checkpoint.pt")
    code = checkpoints.read_record(folder)["code"]
    fails(f"of another version; continue it with commit {code}", "otc_bcq", "--resume", folder)


def test_a_copied_or_renamed_run_is_itself(tmp_path, monkeypatch, data, fails):
    """A copy of one seed's run goes on by itself; several seeds' folders need each other."""
    common = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--sampling", "uniform"]
    run(monkeypatch, "otc_bcq", *common, "--run-dir", tmp_path / "a")
    before = {f: f.read_bytes() for f in only(tmp_path / "a").iterdir()}
    shutil.copytree(only(tmp_path / "a"), tmp_path / "copy")
    run(monkeypatch, "otc_bcq", "--resume", tmp_path / "copy")
    assert before == {f: f.read_bytes() for f in only(tmp_path / "a").iterdir()}
    assert len(list((tmp_path / "copy").glob("events*"))) == 2
    run(monkeypatch, "otc_bcq", *common, "--num-seeds", 2, "--run-dir", tmp_path / "c")
    first = sorted((tmp_path / "c").iterdir())[0]
    first.rename(tmp_path / "c" / "mine")
    fails("mine was copied or renamed", "otc_bcq", "--resume", tmp_path / "c" / "mine")


@every_script
def test_a_run_of_one_script_is_refused_by_others(tmp_path, monkeypatch, data, fails, script):
    common = ["--env", ENV, "--dataset", data]
    short = ["--deployments", 0] if script in WITH_OTC else []
    run(monkeypatch, script, *common, *tiny(script), *short, "--run-dir", tmp_path / "a")
    folder = only(tmp_path / "a")
    before = {f: f.read_bytes() for f in folder.iterdir()}
    for other in sorted(set(SCRIPTS) - {script})[:3] + ["otc_bcq"] * (script != "otc_bcq"):
        start = ["--run-dir", tmp_path / "b", "--offline-checkpoint", folder]
        if other in WITH_OTC:
            fails(f"is a run of {script}, not {other}", other, *common, *tiny(other), *start)
        fails(f"{folder} is a run of {script}, not", other, "--resume", folder)
    assert before == {f: f.read_bytes() for f in folder.iterdir()}


def test_a_run_on_omars_data_has_its_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    module = importlib.import_module("otc_td3bc")
    (tmp_path / "obs_0.npy").touch()
    for dataset, returns in [(str(tmp_path), [-283.97, 3568.81]), ("built-in", [-286.2, 1649.2])]:
        args = module.Args(env="halfcheetah-local", dataset=dataset, run_dir=str(tmp_path))
        run = runs.Run(args, "otc_td3bc")
        for k, episode_return in enumerate(returns):
            run.record_return(k, 0, [[episode_return]], torch.ones(1, 2))
        run.close()
        found = [row["normalized_score"] for row in run.rows[0]]
        assert found == pytest.approx([0, 100])
