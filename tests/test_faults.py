"""Nothing silent, nothing lost: what is refused, in how many words, and how a run goes on."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import filelock
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import otc_td3bc
from benchmarks import restored
from common import InputError, checkpoints, datasets, loop, runs
from common.datasets import readers
from common.envs import make_vec, workers
from common.envs.parallel import ParallelTeam
from tests.helpers import QUICK, assert_same, is_running, only, run, scalars, state_of, tiny
from tests.tiny_task import ENV, Point, Steps

ROOT = Path(__file__).parent.parent


def refused(capsys, call, *arguments):
    """What a run that must end with status 2 says: at most three lines, no traceback."""
    with pytest.raises(SystemExit) as exit:
        call(*arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 2, said
    lines = said[said.index("error: ") :].strip().splitlines()
    assert "Traceback" not in said and len(lines) <= 3 and max(map(len, lines)) <= 520
    return "\n".join(lines)


@pytest.fixture
def argv(tmp_path, data):
    return ["--env", ENV, "--dataset", data, *tiny("otc_td3bc"), "--run-dir", tmp_path / "runs"]


# --- Numbers that stop being finite ---


class NotANumber(Point):
    """Of one kind, at the 95th step since it was made."""

    kind, count = "obs", 0

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        self.count += 1
        if self.count == 95:
            spoilt = obs if self.kind == "obs" else rewards
            spoilt["y"] = spoilt["y"] * np.nan
        return obs, rewards, *rest


class NoReward(NotANumber):
    kind = "reward"


@pytest.mark.parametrize("task", [NotANumber, NoReward])
def test_an_environments_nan_ends_the_run_and_it_can_go_on(
    tmp_path, monkeypatch, capsys, argv, task
):
    argv[1] = f"{__name__}:{task.__name__}"
    argv += ["--eval-episodes", 1]
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *argv)
    kind = "observation" if task is NotANumber else "reward"
    assert f"gave a {kind} that is not finite (nan)" in said and "continue with --resume" in said
    folder = only(tmp_path / "runs")
    monkeypatch.setattr(task, "step", Point.step)
    run(monkeypatch, "otc_td3bc", "--resume", folder)
    rows = (folder / "returns.csv").read_text()
    assert rows.count("\n") == 4 and "nan" not in rows.split("\n", 1)[1].replace(",nan,", ",")


def test_a_training_that_diverges_says_so(tmp_path, monkeypatch, capsys, argv):
    argv += ["--critic-learning-rate", "1e9", "--offline-updates", "400", "--eval-every", "400"]
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *argv)
    assert "is not finite after" in said and "seed 1, agent" in said


SHARED = Point()


def shared():
    return SHARED


def test_one_environment_is_not_many():
    with pytest.raises(InputError, match="the same environment twice"):
        make_vec(f"{__name__}:shared", 2, 0)


def changing():
    env = Point()
    env.max_episode_steps = next(LIMITS)
    return env


LIMITS = itertools.count(5)


def test_environments_that_differ_are_refused():
    with pytest.raises(InputError, match="the limit of its steps differs between env.*: 5, 6"):
        make_vec(f"{__name__}:changing", 2, 0)


def test_numbers_that_are_none_are_told_apart():
    """An environment's first observation, and a policy's action."""
    policy = torch.nn.Module()
    policy.act = lambda obs: obs[..., :1] * torch.nan
    for task, who in (("NotFirst", "the environment gave a observation"), ("Point", "the policy")):
        envs = make_vec(f"{__name__}:{task}", 2, 0)
        with pytest.raises(InputError, match=f"{who}.* not finite"):
            loop.episode_returns(envs, policy, 1, (1, 0), torch.device("cpu"))


def test_what_diverged_is_in_no_checkpoint(tmp_path, monkeypatch, capsys, argv):
    argv += ["--critic-learning-rate", "1e9", "--offline-updates", "400", "--eval-every", "400"]
    argv += ["--log-every", 400, "--checkpoint-every", 20]
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *argv)
    assert "is not finite after" in said
    assert not (only(tmp_path / "runs") / "checkpoint.pt").exists()


def test_a_stop_saves_nothing_that_diverged(tmp_path, monkeypatch, capsys, argv):
    """Nor over a good checkpoint: at 20 all is well, at 30 a loss is nan and a signal comes."""
    update, count = otc_td3bc.TD3BC.update, []

    def spoilt(self, *args):
        losses = update(self, *args)
        count.append(1)
        if len(count) == 30:
            losses["losses/qf1_loss"] = losses["losses/qf1_loss"] * torch.nan
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    monkeypatch.setattr(otc_td3bc.TD3BC, "update", spoilt)
    argv += ["--log-every", 60, "--checkpoint-every", 20]
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *argv)
    assert "is not finite after 30 updates" in said
    path = only(tmp_path / "runs") / "checkpoint.pt"
    assert torch.load(path, weights_only=True)["progress"] == (0, 20)


def test_numbers_beyond_float32s_squares_are_refused_by_row(tmp_path, data):
    path = copy_of(data, tmp_path / "huge.hdf5")
    with h5py.File(path, "a") as file:
        file["observations"][17, 0] = -1e25
    with pytest.raises(InputError, match="observations has 1e.25 in row 17"):
        datasets.load(ENV, str(path))


class Locked(Point):
    """The second joint's bounds are equal."""

    def action_space(self, agent):
        return Box(np.array([-2, 0.3], np.float32), np.array([2, 0.3], np.float32))


def test_a_joint_that_cannot_move_is_nobodys(tmp_path):
    n = 40
    with h5py.File(tmp_path / "locked.hdf5", "w") as file:
        file["observations"] = file["next_observations"] = np.zeros((n, 2), np.float32)
        actions = np.random.default_rng(0).uniform(-2, 2, (n, 2, 2)).astype(np.float32)
        actions[:, :, 1] = 0.3
        file["actions"] = actions.reshape(n, 4)
        file["rewards"], file["terminals"] = np.zeros(n), np.zeros(n)
        file["timeouts"] = np.arange(n) % 20 == 19
    name = f"{__name__}:Locked"
    team, vec = datasets.load(name, str(tmp_path / "locked.hdf5")), make_vec(name, 1, 0)
    np.testing.assert_allclose(team.actions[:, :, 0], actions[:, :, 0] / 2, atol=1e-6)
    assert (team.actions[:, :, 1] == 0).all() and team.own_actions.tolist() == [[True, False]] * 2
    np.testing.assert_allclose(vec.to_box(team.actions), actions, atol=1e-6)


class Scenery(Point):
    """Agent y can move nothing."""

    def action_space(self, agent):
        return super().action_space(agent) if agent == "x" else Box(0.3, 0.3, (1,), np.float32)


def test_an_agent_that_can_move_nothing_is_refused(fails, data):
    words = "agent 1 can move nothing, its box of actions is a point"
    with h5py.File(data, "a") as file:
        file["actions"][:, 1] = 0.3
    fails(words, "bc", "--env", f"{__name__}:Scenery", "--dataset", data, *tiny("bc"))


class OwnViews(Point):
    """Each agent sees its own coordinate twice."""

    def _each(self, value):
        its = super()._each(value)
        if isinstance(value, np.ndarray):
            its = {a: np.repeat(value[i], 2) for i, a in enumerate(self.agents)}
        return its


class LateViews(OwnViews):
    """At first they see the same."""

    def reset(self, seed=None, options=None):
        obs, infos = super().reset(seed, options)
        return {agent: 0 * seen for agent, seen in obs.items()}, infos


ONE_VIEW = "the data has one observation for all agents, and the task's agents see different ones"


@pytest.mark.parametrize("script", ["bc", "otc_td3bc"])
def test_data_of_one_view_is_refused_where_agents_see_different_ones(fails, data, script):
    fails(ONE_VIEW, script, "--env", f"{__name__}:OwnViews", "--dataset", data, *tiny(script))


def test_they_may_do_so_only_later(argv, monkeypatch, capsys):
    argv[1] = f"{__name__}:LateViews"
    assert ONE_VIEW in refused(capsys, run, monkeypatch, "otc_td3bc", *argv)


def copy_of(data, path):
    path.write_bytes(Path(data).read_bytes())
    return path


def test_a_single_transition_has_finite_scales(tmp_path, monkeypatch, argv):
    argv += ["--dataset-size", 1, "--deployments", 0]
    run(monkeypatch, "otc_td3bc", *argv)
    agent = state_of(only(tmp_path / "runs") / "checkpoint.pt")["agent"]
    assert agent["obs_std"].flatten().tolist() == pytest.approx([1e-3] * 4)


# --- What a run depends on ---


@pytest.fixture
def stopped(tmp_path, monkeypatch, argv):
    """A finished run's folder, and its arguments; its checkpoint is that before the last return."""
    run(monkeypatch, "otc_td3bc", *argv)
    return only(tmp_path / "runs")


def test_other_data_is_refused_and_data_that_has_moved_is_not(
    tmp_path, monkeypatch, capsys, data, argv
):
    mine = copy_of(data, tmp_path / "mine.hdf5")
    argv[3] = mine
    run(monkeypatch, "otc_td3bc", *argv)
    folder = only(tmp_path / "runs")
    moved = mine.rename(tmp_path / "moved.hdf5")
    refused(capsys, run, monkeypatch, "otc_td3bc", "--resume", folder)  # no such file
    run(monkeypatch, "otc_td3bc", "--resume", folder, "--dataset", moved)
    start = ["--offline-checkpoint", folder, "--run-dir", tmp_path / "more", *argv[4:-2]]
    run(monkeypatch, "otc_td3bc", *start, "--dataset", moved)
    with h5py.File(moved, "a") as file:
        file["rewards"][500] += 0.01
    for flags in (["--resume", folder], start):
        said = refused(capsys, run, monkeypatch, "otc_td3bc", *flags, "--dataset", moved)
        assert "the data is not what it was: 1,000 transitions with checksum" in said
    moved.rename(mine)
    with pytest.raises(InputError, match="the data is not what it was"):
        restored.restore(str(folder))  # for the programs that look into a run


def test_a_flipped_bit_is_found_or_does_not_matter(stopped):
    """Of 120 flipped bits all over the file; torch itself checks no checksum."""
    path, random = stopped / "checkpoint.pt", np.random.default_rng(0)
    whole = path.read_bytes()
    true, found = checkpoints.read_checkpoint(stopped, "checkpoint.pt", "otc_td3bc"), 0
    for bit in random.integers(0, 8 * len(whole), 120).tolist():
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            state = checkpoints.read_checkpoint(stopped, "checkpoint.pt", "otc_td3bc")
        except InputError as error:
            assert len(str(error)) < 400
            found += 1
        else:
            assert_same(state, true)
    assert found > 60


def test_a_checkpoint_of_other_shapes_is_refused(stopped, monkeypatch, capsys):
    """An optimiser's too, whose fused step would read beyond the end of its memory."""
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    moments = state["agent"]["_extra_state"][0]["state"][0]

    def spoil_moments(state):
        state["agent"]["_extra_state"][0]["state"][0] = {
            name: x[..., :1].contiguous() if x.dim() else x for name, x in moments.items()
        }

    def spoil_replay(state):
        state["replay"]["rewards"] = state["replay"]["rewards"][..., :1]

    def spoil_progress(state):
        state["progress"] = (1, 2, 3)

    for spoil in (spoil_moments, spoil_replay, spoil_progress):
        its = torch.load(path, weights_only=True)
        spoil(its)
        whole = path.read_bytes()
        torch.save(its, path)
        said = refused(capsys, run, monkeypatch, "otc_td3bc", "--resume", stopped)
        assert "does not fit" in said, said
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("gamma", 0.5, "the checkpoint was trained with --gamma 0.99, not 0.5"),
        ("seed", "1", "seed is '1'"),
        ("sampling", "both", "sampling is 'both'"),
        ("batch_size", None, "batch_size is None"),
        ("dataset", ["a"], r"dataset is \['a'\]"),
    ],
)
def test_args_json_may_not_differ_from_the_checkpoint(
    stopped, monkeypatch, capsys, name, value, what
):
    record = json.loads((stopped / "args.json").read_text())
    record["args"][name] = value
    (stopped / "args.json").write_text(json.dumps(record))
    said = refused(capsys, run, monkeypatch, "otc_td3bc", "--resume", stopped)
    assert what.replace("\\", "") in said


def test_an_earlier_runs_args_json_is_read_with_care(stopped, monkeypatch, capsys, argv):
    record = json.loads((stopped / "args.json").read_text())
    record["args"]["gamma"] = "x"
    (stopped / "args.json").write_text(json.dumps(record))
    start = ["--offline-checkpoint", stopped, *argv]
    assert "gamma is 'x'" in refused(capsys, run, monkeypatch, "otc_td3bc", *start)


def test_who_holds_the_policy_is_said(stopped, tmp_path, monkeypatch, capsys, argv):
    argv[-1] = tmp_path / "second"
    run(monkeypatch, "otc_td3bc", "--offline-checkpoint", stopped, *argv)
    start = ["--offline-checkpoint", only(tmp_path / "second"), *argv]
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *start)
    assert f"its policy is that of {stopped}" in said


def test_other_code_is_said(stopped, monkeypatch, capsys):
    record = json.loads((stopped / "args.json").read_text())
    monkeypatch.setattr(runs, "code_version", lambda: "abc")
    for code, times in (("abc", 0), ("0123456789ab", 1)):
        (stopped / "args.json").write_text(json.dumps(record | {"code": code}))
        run(monkeypatch, "otc_td3bc", "--resume", stopped)
        assert capsys.readouterr().err.count(f"begun with code {code}") == times


def test_the_policys_number_of_updates_is_its_own(stopped, tmp_path, monkeypatch, capsys, argv):
    more = ["--offline-checkpoint", stopped, *argv, "--offline-updates", 61]
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *more)
    assert "the checkpoint was trained with --offline-updates" in said and "not 61" in said


def test_a_seeds_missing_folder_is_said(tmp_path, monkeypatch, capsys, argv):
    run(monkeypatch, "otc_td3bc", *argv, "--num-seeds", 2)
    first, second = sorted((tmp_path / "runs").iterdir())
    shutil.rmtree(second)
    said = refused(capsys, run, monkeypatch, "otc_td3bc", "--resume", first)
    assert f"{second}, of its seeds, is missing" in said and not second.exists()
    more = ["--offline-checkpoint", first, *argv[:-1], tmp_path / "more", "--num-seeds", 2]
    run(monkeypatch, "otc_td3bc", *more)  # which needs the first alone


def test_a_policy_is_kept_whenever_the_run_is_stopped(tmp_path, monkeypatch, argv):
    save = runs.Run.save

    def dies(self, state, name="checkpoint.pt"):
        if name == "policy_0.pt":
            raise RuntimeError("stopped here")
        save(self, state, name)

    monkeypatch.setattr(runs.Run, "save", dies)
    with pytest.raises(RuntimeError, match="stopped here"):
        run(monkeypatch, "otc_td3bc", *argv, "--save-policies")
    monkeypatch.setattr(runs.Run, "save", save)
    folder = only(tmp_path / "runs")
    run(monkeypatch, "otc_td3bc", "--resume", folder)
    assert (folder / "policy_0.pt").exists()


def test_two_processes_do_not_write_one_run(stopped, monkeypatch, capsys):
    code = (
        "import filelock, sys, time\n"
        f"with filelock.FileLock({str(stopped / '.lock')!r}):\n"
        "    print('held', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        said = refused(capsys, run, monkeypatch, "otc_td3bc", "--resume", stopped)
        assert "is being written by another process" in said
    finally:
        other.kill()
        other.wait()
    run(monkeypatch, "otc_td3bc", "--resume", stopped)


def test_a_run_that_went_on_while_its_data_was_loaded_is_not_put_back(stopped, monkeypatch, capsys):
    """Another process may write the run between the reading of its checkpoint and the lock."""
    load = datasets.load

    def slowly(*args):
        path = stopped / "checkpoint.pt"
        checkpoints.write_beside(path, path.read_bytes())  # it went on
        return load(*args)

    monkeypatch.setattr(datasets, "load", slowly)
    before = sorted(path.name for path in stopped.iterdir())
    said = refused(capsys, run, monkeypatch, "otc_td3bc", "--resume", stopped)
    assert "another process went on with" in said
    assert sorted(path.name for path in stopped.iterdir()) == before
    monkeypatch.undo()
    run(monkeypatch, "otc_td3bc", "--resume", stopped)


# --- Data files ---


def declared(file, name, shape):
    del file[name]
    file.create_dataset(name, shape, "f4", chunks=(10, *shape[1:]))


def half_written(file, name, shape):
    declared(file, name, shape)
    file[name][: shape[0] // 2] = 1


def linked(file, name, shape):
    del file[name]
    file[name] = h5py.ExternalLink("other.hdf5", name)


def outside(file, name, shape):
    del file[name]
    place = Path(file.filename).with_name("raw")
    place.write_bytes(bytes(4 * int(np.prod(shape))))
    file.create_dataset(name, shape, "f4", external=[(str(place), 0, h5py.h5f.UNLIMITED)])


def virtual(file, name, shape):
    del file[name]
    layout = h5py.VirtualLayout(shape, "f4")
    layout[:] = h5py.VirtualSource("gone.hdf5", name, shape)
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("spoil", [declared, half_written, linked, outside, virtual])
def test_numbers_that_are_not_in_the_file_are_refused(tmp_path, data, spoil):
    path = copy_of(data, tmp_path / "spoilt.hdf5")
    with h5py.File(path, "a") as file:
        spoil(file, "rewards", file["rewards"].shape)
    with pytest.raises(InputError, match="rewards (was declared|is a link)|numbers of rewards"):
        datasets.load(ENV, str(path))


def test_episodes_that_run_into_one_another_are_refused(tmp_path, data):
    path = copy_of(data, tmp_path / "long.hdf5")
    with h5py.File(path, "a") as file:
        file["timeouts"][...] = 0
    with pytest.raises(InputError, match="rows from row 0 on are one episode.* at most 20"):
        datasets.load(ENV, str(path))


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_a_damaged_built_in_file_is_found(tmp_path, monkeypatch, name):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path))
    datasets.load("navigation-random", size=300)
    path = only(tmp_path, "*.hdf5")
    with h5py.File(path) as file:
        where = file[name].id.get_offset()
    content = bytearray(path.read_bytes())
    content[where + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"is damaged in {name}: delete it"):
        datasets.load("navigation-random", size=300)


class Episode:
    def __init__(self, **changes):
        self.observations, self.actions = np.zeros((4, 2)), np.zeros((3, 2))
        self.rewards, self.terminations = np.zeros(3), np.zeros(3)
        self.truncations = np.zeros(3)
        vars(self).update(changes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"terminations": np.full(3, 2.5)}, "episode 1: terminations has values other than 0"),
        ({"truncations": np.array(["no"] * 3)}, "episode 1: truncations are not arrays of numbers"),
        ({"terminations": np.full(3, np.nan)}, "episode 1: terminations has values other"),
        ({"actions": np.zeros((4, 2))}, "episode 1: 4 actions for 3 rewards"),
        ({"observations": np.zeros((3, 2))}, "episode 1: 3 observations for 3 rewards"),
    ],
)
def test_minaris_episodes_are_checked(monkeypatch, changes, what):
    minari = pytest.importorskip("minari")

    class Dataset:
        def iterate_episodes(self):
            return iter([Episode(), Episode(**changes)])

    monkeypatch.setattr(minari, "load_dataset", lambda name: Dataset())
    with pytest.raises(InputError, match=what):
        readers.read_minari("own/task-v0")


# --- Own tasks ---


class NeedsArguments(Point):
    def __init__(self, size):
        self.size = size


class Exits(Point):
    def __init__(self):
        raise SystemExit(3)


class ExitsInReset(Point):
    def reset(self, seed=None, options=None):
        sys.exit()


class ExitsInStep(Point):
    def step(self, actions):
        sys.exit(0)


class OldReset(Point):
    def reset(self, seed=None, options=None):
        return super().reset(seed, options)[0]


class OldStep(Point):
    def step(self, actions):
        obs, rewards, _, truncations, infos = super().step(actions)
        return obs, rewards, truncations, infos


class NoSpaces(Point):
    def observation_space(self, agent):
        return self.observation_spaces[agent]


class NoSeed(Point):
    def reset(self):
        return super().reset(0)


class WordObs(Point):
    def step(self, actions):
        obs, *rest = super().step(actions)
        return {agent: ["a", "b"] for agent in obs}, *rest


class WordReward(Point):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, dict.fromkeys(rewards, "much"), *rest


class ManyFlags(Point):
    def step(self, actions):
        obs, rewards, _, truncations, infos = super().step(actions)
        return obs, rewards, dict.fromkeys(obs, np.zeros(2)), truncations, infos


class NoMask(Steps):
    def reset(self, seed=None, options=None):
        obs, infos = super().reset(seed, options)
        return {a: {"observation": seen["observation"]} for a, seen in obs.items()}, infos


class OwnFault(Point):
    def step(self, actions):
        return {}["the user's own mistake"]


class SetOfAgents(Point):
    possible_agents = {"x", "y"}


class NobodyThere(Point):
    possible_agents = None


class Twins(Point):
    possible_agents = ["x", "x"]


class Unbounded(Point):
    def action_space(self, agent):
        most = np.finfo(np.float32).max
        return Box(-most, most, (1,), np.float32)


class Blind(Point):
    def observation_space(self, agent):
        return Box(-1, 1, (0,), np.float32)


class OthersRewards(Point):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, {f"agent_{agent}": value for agent, value in rewards.items()}, *rest


class MaskInInfo(Steps):
    def observation_space(self, agent):
        return Point.observation_space(self, agent)

    def reset(self, seed=None, options=None):
        obs, _ = super().reset(seed, options)
        masks = {agent: {"action_mask": seen["action_mask"]} for agent, seen in obs.items()}
        return {agent: seen["observation"] for agent, seen in obs.items()}, masks


class ManyRewards(Point):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, dict.fromkeys(rewards, np.zeros(3)), *rest


class NoRewards(Point):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, dict.fromkeys(rewards), *rest


class OneFlag(Point):
    def step(self, actions):
        obs, rewards, _, truncations, infos = super().step(actions)
        return obs, rewards, False, truncations, infos


class ShortObs(Point):
    def reset(self, seed=None, options=None):
        obs, infos = super().reset(seed, options)
        return {agent: seen[:1] for agent, seen in obs.items()}, infos


class LongObs(Point):
    def step(self, actions):
        obs, *rest = super().step(actions)
        return {agent: np.append(seen, 0.0) for agent, seen in obs.items()}, *rest


class NoLimit(Point):
    max_episode_steps = math.inf


class NotFirst(Point):
    def reset(self, seed=None, options=None):
        obs, infos = super().reset(seed, options)
        return {agent: seen * np.nan for agent, seen in obs.items()}, infos


class OneReference(Point):
    reference_returns = 5


class WrittenReferences(Point):
    reference_returns = "ab"


class SameReferences(Point):
    reference_returns = 1, 1


class ArrayReward(Point):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, dict.fromkeys(rewards, np.array([0.25], np.float32)), *rest


@pytest.mark.parametrize(
    ("task", "what"),
    [
        (NeedsArguments, "NeedsArguments.. failed, TypeError: .*size.*\n.*needs no arguments"),
        (Exits, "failed, SystemExit: 3"),
        (ExitsInReset, "reset ends all, SystemExit"),
        (ExitsInStep, "step ends all, SystemExit: 0 .test_faults.py"),
        (OldReset, r"reset returned dict, expected \(observations, infos\)"),
        (OldStep, r"step returned 4 parts, expected \(observations, rewards, terminations"),
        (ManyRewards, r"step gave a reward of shape \(3,\), expected one number"),
        (SetOfAgents, "expected a list of different names"),
        (NobodyThere, "has no possible_agents, expected the names of its agents"),
        (Twins, r"possible_agents \['x', 'x'\], expected a list of different names"),
        (Unbounded, "expected finite bounds, and float32 their distance"),
        (Blind, "its agents observe no number at all"),
        (OthersRewards, "step gave a reward to 'agent_x', which is none of the agents"),
        (MaskInInfo, "gave agent 'x' an action_mask in its info, expected observations of Dict"),
        (NoSpaces, "the spaces of agents .* cannot be used, AttributeError: .*observation_spaces"),
        (NoSeed, r"reset takes no seed, expected reset\(seed=None, options=None\)"),
        (WordObs, "the observation that agent 'x' got cannot be used, ValueError: could not"),
        (WordReward, "the reward 'much' that step gave cannot be used, ValueError: could not"),
        (ManyFlags, "a flag that step gave cannot be used, ValueError: The truth value"),
        (NoMask, "the observation that agent 'x' got cannot be used, KeyError: 'action_mask'"),
        (NoRewards, "step gave a reward of None, expected one number"),
        (OneFlag, "step gave terminations as bool, expected a dictionary"),
        (ShortObs, "observation or action mask of 1 numbers, where its space has 2"),
        (LongObs, "observation or action mask of 3 numbers, where its space has 2"),
        (NoLimit, "max_episode_steps inf, expected a whole number of steps"),
        (OneReference, "reference_returns 5, expected two different numbers"),
        (WrittenReferences, "reference_returns ab, expected two different numbers"),
        (SameReferences, r"reference_returns \(1, 1\), expected two different numbers"),
    ],
)
def test_tasks_that_cannot_be_used_are_refused_in_words(task, what):
    with pytest.raises(InputError, match=what):
        team = ParallelTeam(f"{__name__}:{task.__name__}")
        team.reset(0)
        team.step(np.zeros((2, 1)))


class Exact(Point):
    """Bounds that are no float32."""

    def action_space(self, agent):
        return Box(-0.1, 0.1, (1,), np.float64)

    def step(self, actions):
        assert all(self.action_space(agent).contains(action) for agent, action in actions.items())
        return super().step(actions)


class Levels(Point):
    def action_space(self, agent):
        return Box(0, 2, (1,), np.int64)

    def step(self, actions):
        self.levels = {agent: int(action[0]) for agent, action in actions.items()}
        assert all(action.dtype == np.int64 for action in actions.values())
        return super().step(actions)


def test_actions_are_played_within_the_box_in_its_own_type():
    vec = make_vec(f"{__name__}:Exact", 1, 0)
    vec.reset()
    vec.step(vec.to_box(np.array([[[1.0], [-1.0]]], np.float32)))
    vec = make_vec(f"{__name__}:Levels", 1, 0)
    vec.reset()
    for asked, level in ((-1.0, 0), (-0.51, 0), (-0.01, 1), (0.49, 1), (0.51, 2), (1.0, 2)):
        vec.step(vec.to_box(np.array([[[asked], [-asked]]], np.float32)))
        assert vec.teams[0].env.levels == {"x": level, "y": 2 - level}, asked


class Amperes(Point):
    def action_space(self, agent):
        return Box(-1e-6, 1e-6, (1,), np.float32)


class Wide(Point):
    low, high = np.float32(-460.42657), np.float32(273.92337)

    def action_space(self, agent):
        return Box(self.low, self.high, (1,), np.float32)


def test_how_far_actions_may_leave_the_box_is_the_boxs_measure(tmp_path, data):
    path = copy_of(data, tmp_path / "other.hdf5")
    with h5py.File(path, "a") as file:
        file["actions"][...] = file["actions"][...] * 5e-6  # of [-2, 2]: ten times outside
    with pytest.raises(InputError, match="actions leave the box"):
        datasets.load(f"{__name__}:Amperes", str(path))
    with h5py.File(path, "a") as file:
        file["actions"][...] = Wide.low + (np.float32(1) + 1) / 2 * (Wide.high - Wide.low)
        assert file["actions"][0, 0] > Wide.high  # by rounding
    assert (datasets.load(f"{__name__}:Wide", str(path)).actions == 1).all()


class NoLastObs(Point):
    def step(self, actions):
        obs, *rest = super().step(actions)
        return obs if self.agents else {}, *rest


def test_a_missing_last_observation_is_said_once(capsys):
    vec = make_vec(f"{__name__}:NoLastObs", 1, 0)
    vec.reset()
    for _ in range(60):
        vec.step(np.zeros((1, 2, 1), np.float32))
    assert capsys.readouterr().err.count("gave no observation to agent 'x' where the episode") == 1


ORDER = ["x", "y"]


class Ordered(Point):
    possible_agents = property(lambda self: ORDER)


def test_other_agents_orders_are_no_continuation(tmp_path, argv, monkeypatch, capsys):
    argv[1] = f"{__name__}:Ordered"
    run(monkeypatch, "otc_td3bc", *argv)
    folder = only(tmp_path / "runs")
    monkeypatch.setitem(globals(), "ORDER", ["y", "x"])
    for flag in ("--resume", "--offline-checkpoint"):
        more = () if flag == "--resume" else argv
        said = refused(capsys, run, monkeypatch, "otc_td3bc", *more, flag, folder)
        assert "the task is not what it was: agents ['y', 'x'], at most 20 steps" in said


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def f(:", "SyntaxError: .*syn.py, line 1"),
        ("raise KeyError(3)", r"KeyError: 3 \(syn.py, line 1\)"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_fails_is_said(tmp_path, monkeypatch, text, what):
    (tmp_path / "syn.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"cannot import 'syn' of 'syn:f', {what}"):
        make_vec("syn:f", 1, 0)


class LateFault(Point):
    deployment = 0

    def set_deployment(self, k, num_deployments):
        self.deployment = k

    def step(self, actions):
        return super().step(actions) if not self.deployment else {}["the user's own mistake"]


def test_a_tasks_fault_leaves_a_word_how_to_go_on(tmp_path, argv, monkeypatch, capsys):
    argv[1] = f"{__name__}:LateFault"
    with pytest.raises(KeyError, match="own mistake"):
        run(monkeypatch, "otc_td3bc", *argv)
    assert f"continue with --resume {only(tmp_path / 'runs')}" in capsys.readouterr().err


def test_a_tasks_own_faults_keep_their_traceback():
    team = ParallelTeam(f"{__name__}:OwnFault")
    team.reset(0)
    with pytest.raises(KeyError, match="own mistake"):
        team.step(np.zeros((2, 1)))


def test_a_reward_may_be_an_array_of_one():
    team = ParallelTeam(f"{__name__}:ArrayReward")
    team.reset(0)
    assert team.step(np.zeros((2, 1)))[1] == 0.25


def test_the_example_of_an_own_task_trains(tmp_path, monkeypatch, capsys):
    from examples.own_task import write_data

    write_data(tmp_path / "carts.hdf5", episodes=40)
    argv = ["--env", "examples.own_task:Carts", "--dataset", tmp_path / "carts.hdf5"]
    argv += [*tiny("otc_td3bc"), "--run-dir", tmp_path / "runs"]
    run(monkeypatch, "otc_td3bc", *argv)
    rows = list(csv.DictReader((only(tmp_path / "runs") / "returns.csv").open()))
    for row in rows:
        expected = 100 * (float(row["mean_return"]) + 49) / 40
        assert float(row["normalized_score"]) == pytest.approx(expected)
    assert "max_episode_steps" not in capsys.readouterr().err


def test_the_example_of_an_own_task_is_one_of_pettingzoos(tmp_path):
    from pettingzoo.test import parallel_api_test

    from examples.own_task import Carts

    parallel_api_test(Carts(), num_cycles=60)
    command = [sys.executable, "-m", "examples.own_task"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "own_task.hdf5").write_text("kept")
    for argv, status in ((["--help"], 0), ([], 2)):
        done = subprocess.run([*command, *argv], cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == status
    assert b"own_task.hdf5 exists already" in done.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


class Endless(Point):
    max_episode_steps = None

    def step(self, actions):
        self.time = -1
        return super().step(actions)


def test_a_limit_that_is_assumed_is_said_once(capsys):
    for _ in range(3):
        vec = make_vec(f"{__name__}:Endless", 1, 0)
    assert vec.max_episode_steps == 1000
    assert capsys.readouterr().err.count("no max_episode_steps: an episode is cut after 1000") == 1


# --- Stops and streams ---


def handlers():
    return [signal.getsignal(getattr(signal, name)) for name in runs.SIGNALS]


def test_no_handler_closes_the_log_while_it_is_written(monkeypatch, argv):
    """TensorBoard's writer has a lock: a handler that closes it meanwhile would wait for ever."""
    calls = []
    for name in ("log", "record_return", "record_offline"):
        method = getattr(runs.Run, name)

        def watched(self, *args, method=method, **kwargs):
            calls.append(self.at_stop)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(runs.Run, name, watched)
    run(monkeypatch, "otc_td3bc", *argv)
    assert len(calls) > 10 and not any(calls)


def test_main_gives_the_signals_back(tmp_path, argv, data):
    def args(**changes):
        quick = {"offline_updates": 20, "deployments": 1, "deployment_steps": 40, "references": 20}
        quick |= {"finetune_updates": 5, "eval_episodes": 1, "hidden_size": 8, "candidates": 32}
        quick |= {"distance_candidates": 50, "run_dir": str(tmp_path / "r"), "device": "cpu"}
        return otc_td3bc.Args(**({"env": ENV, "dataset": str(data)} | quick | changes))

    before = handlers()
    with contextlib.redirect_stdout(io.StringIO()):
        otc_td3bc.main(args())
    assert handlers() == before
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(InputError, match="not finite"):
        otc_td3bc.main(args(env=f"{__name__}:NotANumber", offline_updates=200, eval_every=20))
    assert handlers() == before
    failed = []

    def in_thread():
        try:
            otc_td3bc.main(args())
        except BaseException as error:
            failed.append(error)

    with contextlib.redirect_stdout(io.StringIO()):
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
    assert not failed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_amid_an_offline_evaluation_is_heard_and_nothing_is_lost(
    tmp_path, monkeypatch, argv, number
):
    """Equal to the undisturbed run, each point of TensorBoard once."""
    even_under_nohup = vars(signal) | {"getsignal": lambda number: signal.SIG_DFL}
    monkeypatch.setattr(runs, "signal", types.SimpleNamespace(**even_under_nohup))
    slow = [*argv, "--offline-updates", 60, "--eval-every", 30]
    run(monkeypatch, "otc_td3bc", *slow[:-4], "--run-dir", tmp_path / "whole")
    steps, step = [], Point.step

    def interrupting(self, actions):
        steps.append(1)
        if len(steps) == 25:  # amid the first evaluation
            os.kill(os.getpid(), number)
        return step(self, actions)

    monkeypatch.setattr(Point, "step", interrupting)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "otc_td3bc", *slow[:-4])
    assert exit.value.code == 128 + number and len(steps) < 30
    monkeypatch.setattr(Point, "step", step)
    folder = only(tmp_path / "runs")
    run(monkeypatch, "otc_td3bc", "--resume", folder)
    whole = only(tmp_path / "whole")
    assert (folder / "returns.csv").read_text() == (whole / "returns.csv").read_text()
    assert_same(state_of(folder / "checkpoint.pt"), state_of(whole / "checkpoint.pt"))
    found, expected = (
        {tag: values for tag, values in scalars(x).items() if not tag.startswith("time/")}
        for x in (folder, whole)
    )
    assert_same(found, expected)


def test_a_full_disk_ends_in_words_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch, capsys, argv
):
    written, replace = [], os.replace

    def full(source, target):
        written.append(target)
        if len(written) == 4:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    said = refused(capsys, run, monkeypatch, "otc_td3bc", *argv)
    folder = only(tmp_path / "runs")
    assert "No space left on device" in said and f"continue with --resume {folder}" in said
    assert not list(folder.glob("*.partial"))
    monkeypatch.setattr(os, "replace", replace)
    run(monkeypatch, "otc_td3bc", "--resume", folder)
    assert (folder / "returns.csv").read_text().count("\n") == 4


def test_a_folder_that_goes_while_it_is_written_is_said(tmp_path, monkeypatch, capsys, argv):
    replace = os.replace

    def gone(source, target):
        if Path(target).name == "checkpoint.pt":
            shutil.rmtree(Path(target).parent)
        replace(source, target)

    monkeypatch.setattr(os, "replace", gone)
    assert "No such file or directory" in refused(capsys, run, monkeypatch, "otc_td3bc", *argv)


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError()])
def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch, argv, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    run(monkeypatch, "otc_td3bc", *argv)
    assert (only(tmp_path / "runs") / "returns.csv").read_text().count("\n") == 4


def test_a_pipe_and_a_name_without_end_are_no_files(tmp_path, monkeypatch, capsys, argv):
    os.mkfifo(tmp_path / "pipe.hdf5")
    for name in (tmp_path / "pipe.hdf5", tmp_path / f"{'x' * 5000}.hdf5"):
        argv[3] = name
        assert str(name)[:40] in refused(capsys, run, monkeypatch, "otc_td3bc", *argv)


@pytest.mark.parametrize("writes", [12, 93])
def test_a_disk_that_fills_while_tensorboard_writes_ends_in_words(tmp_path, argv, writes):
    """Its own thread meets the error, and meets it again when the writers are closed; the last of a
    run's writes come after its last checkpoint."""
    code = (
        "import sys\n"
        "from tensorboard.summary.writer.record_writer import RecordWriter\n"
        "write, count = RecordWriter.write, [0]\n"
        "def full(self, data):\n"
        "    count[0] += 1\n"
        f"    if count[0] > {writes}:\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    write(self, data)\n"
        "RecordWriter.write = full\n"
        "import otc_td3bc\n"
        "from common import cli\n"
        "cli.cli(otc_td3bc.main, otc_td3bc.Args)"
    )
    flags = [*map(str, argv), "--log-every", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr


def process(argv, **options):
    command = [sys.executable, str(ROOT / "otc_td3bc.py"), *map(str, argv)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **options
    )


def test_streams_may_be_closed(tmp_path, argv):
    """None, or one that nobody reads any more, ends the run in a line or not at all."""
    for streams in ("<&- >&- 2>&-", "2>&-", "<&-"):
        command = " ".join(map(str, [sys.executable, ROOT / "otc_td3bc.py", *argv]))
        command += f" --run-dir {tmp_path / str(len(streams))} --env-workers 1 {streams}"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", command], capture_output=True, env=env)
        assert done.returncode == 0, (streams, done.stderr)
        assert (only(tmp_path / str(len(streams))) / "returns.csv").read_text().count("\n") == 4
    its = process(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    its.stdout.close()
    said = its.stderr.read()
    assert its.wait() == 2 and "Traceback" not in said and "BrokenPipe" in said


def test_a_worker_that_is_killed_ends_the_run_in_words():
    vec = make_vec(ENV, 4, 0, num_workers=1)
    try:
        vec.reset()
        vec.processes[0].kill()
        with pytest.raises(InputError, match="an environment process ended with status -9"):
            for _ in range(3):
                vec.step(np.zeros((4, 2, 1), np.float32))
    finally:
        vec.close()


def test_a_full_shared_memory_is_replaced_by_the_disk(monkeypatch):
    allocate, tried = os.posix_fallocate, []

    def full(fd, start, size):
        tried.append(fd)
        if len(tried) == 1:
            raise OSError(28, "No space left on device")
        allocate(fd, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    vec = make_vec(ENV, 4, 0, num_workers=1)
    try:
        assert vec.reset().shape == (4, 2, 2) and len(tried) == 2
    finally:
        vec.close()


@pytest.mark.parametrize("delay", [0, 0.2, 0.6, 3])
def test_a_worker_whose_parent_is_killed_ends(delay):
    """Also one that is just starting: after 3 s it steps, or waits for orders."""
    code = (
        "from common.envs import make_vec\nimport subprocess, time\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n        print(self.pid, flush=True)\n"
        "subprocess.Popen = Popen\n"
        f"vec = make_vec({ENV!r}, 4, 0, num_workers=1)\nvec.reset()\ntime.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    pid = int(parent.stdout.readline())
    time.sleep(delay)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it waits for ever")


def test_where_no_process_can_be_shared_with_there_is_one(monkeypatch):
    monkeypatch.setattr("common.envs.os.name", "nt")
    assert not isinstance(make_vec(ENV, 4, 0, num_workers=2), workers.WorkerVecEnv)


def test_no_home_is_said(monkeypatch):
    from common import expanded

    with pytest.raises(InputError, match="~nobody_here/x"):
        expanded("~nobody_here/x")


def test_long_messages_are_cut(capsys):
    from common.cli import say

    say("x" * 30_000)
    assert len(capsys.readouterr().err) < 600


def test_without_deployments_the_table_shows_one_policy(monkeypatch, capsys, argv):
    run(monkeypatch, "otc_td3bc", *argv, "--deployments", 0)
    table = capsys.readouterr().out.split("\n\n")[-2]
    assert "improvement" not in table and table.split()[:3] == ["seed", "pi^0", "score"]


def test_what_is_printed_can_be_copied(tmp_path, argv, monkeypatch, capsys):
    home = tmp_path / "home of [mine]"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    argv[argv.index("--run-dir") + 1] = "~/my runs"
    run(monkeypatch, "otc_td3bc", *argv)
    folder = only(home / "my runs")
    printed = capsys.readouterr().out
    assert f"tools.render --run '{folder}' --out" in printed
    assert f"tensorboard --logdir '{home / 'my runs'}'" in printed  # a shell expands no quoted ~


def test_numpys_numbers_and_paths_are_arguments_too(tmp_path, data):
    options = {k[2:].replace("-", "_"): v for k, v in QUICK.items()}
    names = {field.name for field in dataclasses.fields(otc_td3bc.Args)}
    options = {k: v for k, v in options.items() if k in names}
    args = otc_td3bc.Args(
        **options | {"seed": np.int64(3), "gamma": np.float32(0.5)},
        env=ENV,
        dataset=Path(data),
        run_dir=tmp_path / "runs",
    )
    otc_td3bc.main(args)
    found = json.loads((only(tmp_path / "runs") / "args.json").read_text())["args"]
    assert (found["seed"], found["gamma"], found["dataset"]) == (3, 0.5, str(data))
