"""Datasets: names, D4RL's layout, sizes, download, Minari, the check, bad input."""

import http.server
import re
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

from common import InputError
from common.datasets import files, load, makers, names, parse_env, readers
from common.envs import make_vec
from tools import check_data

ARRAYS = ("obs", "actions", "rewards", "next_obs", "terminations", "truncations")


def raw(n=60, obs_dim=17, act_dim=6, ends=None, seed=0):
    """Arrays in D4RL's layout, episodes of several lengths; `ends` maps a row to its flag."""
    rng = np.random.default_rng(seed)
    ends = {9: "timeouts", 24: "terminals", 44: "timeouts"} if ends is None else ends
    states = rng.normal(size=(n + 1, obs_dim)).astype(np.float32)
    data = {
        "observations": states[:-1].copy(),
        "next_observations": states[1:].copy(),
        "actions": rng.uniform(-1, 1, (n, act_dim)).astype(np.float32),
        "rewards": np.arange(n, dtype=np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    for row, flag in ends.items():
        data[flag][row] = True
        data["next_observations"][row] = rng.normal(size=obs_dim)
    return data


def write(path, data):
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file[key] = values
    return str(path)


def same(a, b):
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ARRAYS)


# --- Layout ---


def test_file_becomes_a_team(tmp_path):
    data = raw()
    team = load("halfcheetah-medium", write(tmp_path / "a.hdf5", data))
    assert team.obs.shape == team.next_obs.shape == (60, 1, 17)
    assert team.actions.shape == (60, 2, 3)
    np.testing.assert_array_equal(team.obs[:, 0], data["observations"])
    np.testing.assert_array_equal(team.next_obs[:, 0], data["next_observations"])
    np.testing.assert_array_equal(team.actions.reshape(60, 6), data["actions"])
    np.testing.assert_array_equal(np.flatnonzero(team.terminations), [24])
    # the file's end cuts its last episode
    np.testing.assert_array_equal(np.flatnonzero(team.truncations), [9, 44, 59])
    for key in ("obs", "actions", "rewards", "next_obs"):
        assert getattr(team, key).dtype == np.float32
    assert team.source == f"file: 60 transitions, {tmp_path / 'a.hdf5'}"
    assert load("halfcheetah", str(tmp_path / "a.hdf5"), split="6x1").actions.shape == (60, 6, 1)


def test_oddities_do_not_matter(tmp_path):
    """float64, (n, 1) rewards and flags, uint8 and float flags, compressed chunks, other keys."""
    plain = load("hopper", write(tmp_path / "a.hdf5", raw(obs_dim=11, act_dim=3)))
    odd = {k: v.astype(np.float64) for k, v in raw(obs_dim=11, act_dim=3).items()}
    odd["rewards"] = odd["rewards"][:, None]
    odd["terminals"] = odd["terminals"][:, None].astype(np.uint8)
    odd["infos/action_log_probs"] = np.zeros(3)
    path = tmp_path / "b.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in odd.items():
            file.create_dataset(key, data=values, chunks=True, compression="gzip")
    assert same(plain, load("hopper", str(path)))


def test_with_and_without_next_observations_agree(tmp_path):
    # two episodes' ends in a row: the second has one row, and nothing of it is left
    data = raw(ends={9: "timeouts", 24: "terminals", 25: "timeouts", 44: "timeouts"})
    full = load("halfcheetah", write(tmp_path / "a.hdf5", data))
    del data["next_observations"]
    shifted = load("halfcheetah", write(tmp_path / "b.hdf5", data))
    keep = np.setdiff1d(np.arange(60), [9, 25, 44, 59])
    for key in ("obs", "actions", "rewards", "terminations"):
        np.testing.assert_array_equal(getattr(shifted, key), getattr(full, key)[keep])
    ongoing = ~shifted.terminations
    np.testing.assert_array_equal(shifted.next_obs[ongoing], full.next_obs[keep][ongoing])
    # a dropped last row leaves the end to the row before
    np.testing.assert_array_equal(keep[shifted.truncations], [8, 43, 58])
    assert "what follows its ends is not known" in shifted.source
    assert "follows" not in full.source


@pytest.mark.parametrize("width", [111, 105, 27])
def test_ant_without_contact_forces(tmp_path, width):
    data = raw(obs_dim=width, act_dim=8)
    team = load("ant", write(tmp_path / "a.hdf5", data))
    np.testing.assert_array_equal(team.next_obs[:, 0], data["next_observations"][:, :27])
    assert team.actions.shape == (60, 4, 2)


def test_actions_are_clipped_within_tolerance(tmp_path):
    data = raw()
    data["actions"][3, 2] = 1 + 5e-6
    team = load("halfcheetah", write(tmp_path / "a.hdf5", data))
    assert team.actions.max() == 1


def test_agent_sees_no_other_agents_actions(tmp_path):
    data = raw()
    team = load("halfcheetah", write(tmp_path / "a.hdf5", data))
    data["actions"][:, 3:] = np.random.default_rng(9).uniform(-1, 1, (60, 3))
    other = load("halfcheetah", write(tmp_path / "b.hdf5", data))
    own, unchanged, changed = team.agent(0), other.agent(0), other.agent(1)
    assert own["obs"].shape == (60, 17) and own["actions"].shape == (60, 3)
    for key in own:
        assert own[key].tobytes() == unchanged[key].tobytes()
    assert not np.array_equal(team.agent(1)["actions"], changed["actions"])
    assert own["actions"].base is None  # a copy: what it is part of does not come along


class Pair(ParallelEnv):
    """Two agents that see different things."""

    possible_agents = ["a", "b"]
    metadata = {"name": "pair"}
    max_episode_steps = 10

    def observation_space(self, agent):
        return Box(-1, 1, (4,))

    def action_space(self, agent):
        return Box(-2, 2, (3,))

    def close(self):
        pass


def test_parallel_env_with_own_observations(tmp_path):
    env = f"{__name__}:Pair"
    data = raw(obs_dim=8, act_dim=6)
    data["actions"] *= 2
    team = load(env, write(tmp_path / "a.hdf5", data))
    assert team.obs.shape == (60, 2, 4)
    np.testing.assert_array_equal(team.agent(1)["obs"], data["observations"][:, 4:])
    with pytest.raises(InputError, match="expected FILE.hdf5"):
        load(env, "d4rl")


# --- OMAR's folders ---


def omar(folder, n=100, num_agents=3, obs_dim=12, act_dim=2, states=None, seed=0):
    """Arrays as OMAR's buffers write them, float64; all agents' rewards but agent 0's are 0."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(num_agents):
        arrays = {
            "obs": rng.normal(size=(n, obs_dim)),
            "next_obs": rng.normal(size=(n, obs_dim)),
            "acs": rng.uniform(-0.1, 0.1, (n, act_dim)),
            "rews": np.arange(n) * (i == 0) * float(num_agents),
            "dones": np.zeros(n),
        }
        if states is not None:
            arrays |= {"states": states[:-1], "next_states": states[1:]}
        for name, array in arrays.items():
            np.save(folder / f"{name}_{i}.npy", array)
    return str(folder)


def test_omars_folder(tmp_path):
    path = omar(tmp_path / "seed_0_data")
    team = load("cooperative-navigation-3-medium", path)  # 3 agents, 12 numbers, 25 steps
    assert team.source == f"OMAR's layout: 100 transitions, {path}"
    assert team.obs.shape == (100, 3, 12) and team.actions.shape == (100, 3, 2)
    for i in range(3):
        own = {k: np.load(f"{path}/{k}_{i}.npy") for k in ("obs", "next_obs", "acs")}
        agent = team.agent(i)
        np.testing.assert_allclose(agent["obs"], own["obs"], rtol=1e-6)
        np.testing.assert_allclose(agent["next_obs"], own["next_obs"], rtol=1e-6)
        np.testing.assert_allclose(agent["actions"], 10 * own["acs"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(team.rewards, np.arange(100), rtol=1e-6)  # the agents' mean
    # whole episodes as the task's: the time limit ended them, as no done says
    assert np.flatnonzero(team.truncations).tolist() == [24, 49, 74, 99]
    assert not team.terminations.any()
    assert len(load("cooperative-navigation-3", path, size=30)) == 30
    path = omar(tmp_path / "named-as-minari-v2", seed=1)
    assert "OMAR" in load("cooperative-navigation-3", path).source
    with pytest.raises(InputError, match="no such file: .*obs_0.npy"):
        load("cooperative-navigation-3", str(tmp_path))


def test_omars_folder_of_views_as_wide_as_the_state_wants_the_state(tmp_path):
    """Two reacher-independent agents with 5 of 10 numbers each."""
    states = np.random.default_rng(0).normal(size=(101, 10)).astype(np.float32)
    omar(tmp_path / "views", 100, 2, 5, 1)
    with pytest.raises(InputError, match="no such file: .*states_0.npy"):
        load("reacher-independent", str(tmp_path / "views"))
    team = load("reacher-independent", omar(tmp_path / "a", 100, 2, 5, 1, states))
    np.testing.assert_array_equal(team.obs[:, 0], states[:-1, [0, 2, 6, 4, 5]])


def test_omars_folder_keeps_each_ants_actions(tmp_path):
    """The robot numbers its actuators otherwise; and a part of the rows keeps who is padded."""
    states = np.random.default_rng(0).normal(size=(101, 27)).astype(np.float32)
    path = omar(tmp_path / "a", 100, 4, 15, 2, states)
    for size in (None, 30, 3):
        team = load("ant-local", path, size=size)
        assert len(team) == (size or 100) and team.own_obs.sum(axis=1).tolist() == [15, 4, 4, 4]
        for i in range(4):
            own = np.load(f"{path}/acs_{i}.npy")[: len(team)]
            np.testing.assert_allclose(team.actions[:, i], own, rtol=1e-5)


def test_the_prey_is_not_one_of_the_agents(tmp_path):
    path = tmp_path / "a"
    omar(path)
    np.save(path / "obs_3.npy", np.zeros((100, 10)))
    vec = types.SimpleNamespace(num_agents=3, obs_dim=12, action_dim=2, max_episode_steps=25)
    for task in ("simple-tag", "simple-world"):
        assert readers.read_omar(path, task, vec)["observations"].shape == (100, 36)
    with pytest.raises(InputError, match="for agents 0, 1, 2, 3; simple-spread has 3"):
        readers.read_omar(path, "simple-spread", vec)


@pytest.mark.parametrize(
    "n, done, terminations, truncations",
    [
        (100, 49, [], [24, 49, 74, 99]),  # at the time limit: that is what it means
        (100, 30, [30], [99]),  # episodes of other lengths
        (90, None, [], [24, 49, 74, 89]),  # the last episode is cut
        (90, 49, [], [24, 49, 74, 89]),
    ],
)
def test_ends_of_omars_episodes(tmp_path, n, done, terminations, truncations):
    path = omar(tmp_path / "a", n)
    if done is not None:  # of one agent is enough
        np.save(f"{path}/dones_1.npy", (np.arange(n) == done).astype(np.float64)[:, None])
    team = load("cooperative-navigation-3", path)
    assert np.flatnonzero(team.terminations).tolist() == terminations
    assert np.flatnonzero(team.truncations).tolist() == truncations


def test_local_observations_out_of_full_states(tmp_path):
    """D4RL's files and OMAR's states hold the full state of halfcheetah-local."""
    data = raw(ends={})
    team = load("halfcheetah-local", write(tmp_path / "a.hdf5", data))
    seen = make_vec("halfcheetah-local", 1, 0).seen
    assert team.obs.shape == (60, 2, 11)
    np.testing.assert_array_equal(team.obs, data["observations"][:, seen])
    np.testing.assert_array_equal(team.next_obs, data["next_observations"][:, seen])
    laid_out = {**data, "observations": data["observations"][:, seen].reshape(60, 22)}
    laid_out["next_observations"] = data["next_observations"][:, seen].reshape(60, 22)
    assert same(team, load("halfcheetah-local", write(tmp_path / "b.hdf5", laid_out)))
    states = np.append(data["observations"], data["next_observations"][-1:], axis=0)
    path = omar(tmp_path / "c", 60, 2, obs_dim=6, act_dim=3, states=states)
    theirs = load("halfcheetah-local", path)
    np.testing.assert_array_equal(theirs.obs, team.obs)
    np.testing.assert_array_equal(theirs.next_obs, team.next_obs)
    for i in range(2):
        (tmp_path / "c" / f"states_{i}.npy").unlink()
    with pytest.raises(InputError, match=r"obs_0.npy has shape \(60, 6\), expected \(60, 11\)"):
        load("halfcheetah-local", path)
    shared = {**data, "observations": data["observations"][:, :11]}
    with pytest.raises(InputError, match="width 11, expected 17 or 22 for halfcheetah-local"):
        load("halfcheetah-local", write(tmp_path / "d.hdf5", shared))


def replace_by(name, array):
    return lambda folder: np.save(folder / name, array)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (remove("acs_1.npy"), "no such file: .*acs_1.npy"),
        (remove(*(f"obs_{i}.npy" for i in range(3))), "no such file: .*obs_0.npy"),
        (remove("obs_1.npy"), "for agents 0, 2; cooperative-navigation-3 has 3"),
        (replace_by("obs_3.npy", np.zeros((100, 12))), "for agents 0, 1, 2, 3; .* has 3"),
        (replace_by("obs_2.npy", np.zeros((100, 11))), r"obs_2.npy has shape \(100, 11\), expec"),
        (replace_by("acs_0.npy", np.zeros((100, 5))), r"shape \(100, 5\), expected \(100, 2\)"),
        (replace_by("rews_1.npy", np.zeros(99)), r"rews_1.npy has shape \(99,\), expected"),
        (replace_by("dones_2.npy", np.full(100, 0.5)), "dones has values other than 0 and 1"),
        (replace_by("acs_0.npy", np.full((100, 2), 0.2)), "leave the box .* by up to 0.1"),
        (replace_by("obs_0.npy", np.full((100, 12), np.nan)), "observations has a non-finite"),
        (replace_by("rews_0.npy", np.full(100, "x")), "rews_0.npy is not an array of numbers"),
        (replace_by("rews_0.npy", np.float64(1)), "rews_0.npy is not an array of numbers"),
        (replace_by("rews_0.npy", np.array([None] * 100)), "rews_0.npy is no readable array"),
        (
            lambda folder: (folder / "obs_1.npy").write_bytes(b"PK\3\4"),
            "obs_1.npy is no readable arr",
        ),
        (lambda folder: (folder / "obs_1.npy").write_bytes(b""), "obs_1.npy is no readable array"),
    ],
)
def test_bad_omar_folders(tmp_path, spoil, message):
    path = omar(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        load("cooperative-navigation-3", path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


# --- Sizes ---


@pytest.mark.parametrize("size", [1, 7, 10, 33, 59, 60])
def test_size_is_exact(tmp_path, size):
    path = write(tmp_path / "a.hdf5", raw())
    whole, team = load("halfcheetah", path), load("halfcheetah", path, size=size)
    assert len(team) == size and team.truncations[-1]
    rows = team.rewards.astype(int)  # rewards number the rows
    assert (np.diff(rows) > 0).all()
    for key in ("obs", "actions", "next_obs", "terminations"):
        np.testing.assert_array_equal(getattr(team, key), getattr(whole, key)[rows])
    # only at an end does a row's successor not follow
    jumps = np.flatnonzero(np.diff(rows) > 1)
    assert (team.terminations | team.truncations)[jumps].all()


def test_a_small_part_spans_the_file(tmp_path):
    n = 20_000
    path = write(tmp_path / "a.hdf5", raw(n, ends={t: "timeouts" for t in range(99, n, 100)}))
    team = load("halfcheetah", path, size=1000)
    starts = team.rewards[::100]
    assert len(team) == 1000 and starts[0] == 0 and starts[-1] > 0.85 * n
    assert np.diff(starts).max() - np.diff(starts).min() <= 100
    assert "1,000 transitions of 20,000" in team.source


# --- Names and bad input ---


def test_names():
    assert parse_env("hopper-medium-replay") == ("hopper", "medium-replay")
    assert parse_env("hopper") == ("hopper", "")
    assert parse_env("a.b:c-d") == ("a.b:c-d", "")


@pytest.mark.parametrize(
    "env, dataset, size, message",
    [
        ("halfchetah-medium", "built-in", None, "unknown task 'halfchetah'.*halfcheetah"),
        ("hopper-medum", "built-in", None, "unknown data quality 'medum'.*medium"),
        ("hopper-medium", "bilt-in", None, "unknown --dataset 'bilt-in'.*built-in"),
        ("hopper-expert", "built-in", None, "no built-in data for hopper-expert"),
        ("ant-medium-expert", "built-in", None, "no built-in data for ant-medium-expert"),
        ("hopper", "built-in", None, "names no data quality.*hopper-medium"),
        ("hopper-medium", "built-in", 0, "--dataset-size 0: expected at least 1"),
        ("hopper-medium", "d4rl", -5, "--dataset-size -5: expected at least 1"),
        ("hopper-expert-mix", "d4rl", None, "d4rl has no data of hopper-expert-mix: .* hopper-ran"),
        ("reacher-full-expert-mix", "d4rl", None, "no data of reacher-full-.*: expected built-in"),
        ("navigation-random", "minari", None, "minari has no data of navigation-random"),
        ("hopper-medium-replay", "built-in", 402_001, "expected at most 402000"),
        ("hopper-medium", "no/such.hdf5", None, "no such file: no/such.hdf5"),
        ("no.such:env", "built-in", None, "expected FILE.hdf5"),
    ],
)
def test_bad_names_and_sizes(tmp_path, monkeypatch, env, dataset, size, message):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    with pytest.raises(InputError, match=message):
        load(env, dataset, size)
    assert list(tmp_path.iterdir()) == []


def test_bad_split(tmp_path):
    with pytest.raises(InputError, match="split '5x1'"):
        load("halfcheetah", write(tmp_path / "a.hdf5", raw()), split="5x1")


def drop(*keys):
    return lambda data: [data.pop(key) for key in keys]


def put(key, row, value):
    return lambda data: data[key].__setitem__(row, value)


def change(key, function):
    return lambda data: data.update({key: function(data[key])})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop("actions", "timeouts"), "no actions, timeouts; it has .*observations"),
        (lambda data: data.clear(), "it has nothing"),
        (change("rewards", lambda x: x[:-1]), "differ in length: .*rewards 59"),
        (change("next_observations", lambda x: x[1:]), "differ in length"),
        (lambda data: data.update({k: v[:0] for k, v in data.items()}), "no transitions"),
        (change("observations", lambda x: x[:, :11]), "observations has width 11, expected 17"),
        (change("next_observations", lambda x: x[:, :11]), "next_observations has width 11"),
        (change("actions", lambda x: x[:, :3]), "actions has width 3, expected 6 for halfcheetah"),
        (change("rewards", lambda x: np.stack([x, x], 1)), "rewards has width 2, expected 1"),
        (put("observations", (5, 2), np.nan), "observations has a non-finite value in row 5"),
        (put("next_observations", (6, 0), np.inf), "next_observations has a non-finite value"),
        (put("actions", (7, 0), np.nan), "actions has a non-finite value in row 7"),
        (put("rewards", 8, -np.inf), "rewards has a non-finite value in row 8"),
        (put("actions", (7, 0), -1.5), "leave the box of halfcheetah, -1 to 1, by up to 0.5"),
        (change("terminals", lambda x: x * 2.0), "terminals has values other than 0 and 1"),
        (change("rewards", lambda x: x.astype("S8")), "rewards is not an array of numbers"),
        (change("rewards", lambda x: 3.0), "rewards is not an array of numbers"),
    ],
)
def test_bad_files(tmp_path, spoil, message):
    data = raw()
    spoil(data)
    path = write(tmp_path / "a.hdf5", data)
    with pytest.raises(InputError, match=message) as caught:
        load("halfcheetah", path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_no_row_is_left(tmp_path):
    data = raw(1, ends={})
    del data["next_observations"]
    with pytest.raises(InputError, match="no row's next state is known"):
        load("halfcheetah", write(tmp_path / "a.hdf5", data))


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "a.hdf5"
    write(path, raw(5000))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="no readable HDF5 file"):
            load("halfcheetah", str(path))
    write(path, raw())
    with pytest.raises(InputError, match="--dataset-size 61: .* has only 60 transitions"):
        load("halfcheetah", str(path), size=61)


# --- Built-in ---


def test_built_in_is_made_once(tmp_path, monkeypatch):
    made = []

    def make(task, quality, size, path):
        made.append((task, quality, size))
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, raw(size, obs_dim=11, act_dim=3, ends={}))

    monkeypatch.setattr(makers, "make", make)
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    teams = [load("hopper-medium-replay", size=50) for _ in range(2)]
    assert made == [("hopper", "medium-replay", 50)] and same(*teams)
    path = makers.built_in_path("hopper", "medium-replay", 50)
    assert path.exists() and str(path) in teams[0].source and "not D4RL" in teams[0].source
    path.unlink()
    monkeypatch.setitem(names.BUILT_IN_SIZES["hopper"], "medium", 70)
    assert len(load("hopper-medium")) == 70  # no size: the whole set


# --- D4RL ---


def test_one_agents_view_is_not_taken_for_everybodys(tmp_path):
    obs_dim = make_vec("simple-spread", 1, 0).obs_dim
    for width, fits in ((obs_dim, False), (3 * obs_dim, True)):
        write(tmp_path / "data.hdf5", raw(obs_dim=width, act_dim=6))
        if fits:
            assert load("simple-spread", str(tmp_path / "data.hdf5")).obs.shape[1] == 3
            continue
        with pytest.raises(InputError, match=f"width {width}, expected {3 * width}"):
            load("simple-spread", str(tmp_path / "data.hdf5"))


def test_a_folder_is_no_minari_id(tmp_path, monkeypatch):
    (tmp_path / "HalfCheetah-v2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="obs_0.npy"):
        load("halfcheetah-local", "HalfCheetah-v2")


class Server:
    """Serves `content` under every name; the next answers are cut after `cuts` bytes each."""

    def __init__(self, content):
        self.content, self.cuts, self.ranges, self.status = content, [], True, None
        self.requests = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.requests.append((self.path, asked))
                if server.status:
                    return self.send_error(server.status)
                start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
                if start >= len(server.content):
                    return self.send_error(416)
                body = server.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cuts.pop(0) if server.cuts else None])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    write(tmp_path / "served.hdf5", raw(40_000, obs_dim=11, act_dim=3))
    server = Server((tmp_path / "served.hdf5").read_bytes())
    monkeypatch.setattr(files, "D4RL_URL", server.url)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def place(tmp_path):
    return tmp_path / "d4rl" / "hopper_medium_replay-v2.hdf5"


def test_download(server, place, capsys):
    team = load("hopper-medium-replay", "d4rl")
    assert len(team) == 40_000 and team.source.startswith("D4RL hopper_medium_replay-v2: 40,000")
    assert server.requests == [("/hopper_medium_replay-v2.hdf5", None)]
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    assert place.read_bytes() == server.content
    progress = capsys.readouterr().err
    assert re.search(r"sha256 [0-9a-f]{64} ", progress) and "100%" in progress
    load("hopper-medium-replay", "d4rl")
    assert len(server.requests) == 1  # found


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_download_continues(server, place, ranges):
    server.ranges, server.cuts = ranges, [3_000_000]
    size = len(server.content)
    with pytest.raises(InputError, match=f"cut off after 3000000 of {size} bytes"):
        load("hopper-medium-replay", "d4rl")
    assert not place.exists()
    assert place.with_name(place.name + ".partial").stat().st_size == 3_000_000
    load("hopper-medium-replay", "d4rl")
    assert server.requests[1][1] == "bytes=3000000-"
    assert place.read_bytes() == server.content
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_two_downloads_at_once_are_one(server, place, monkeypatch, capsys):
    """The second waits for the first, which is slow, and takes its file."""
    begun, read = threading.Event(), files._fetch

    def slowly(*args):
        begun.set()
        time.sleep(0.5)
        read(*args)

    monkeypatch.setattr(files, "_fetch", slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(load, "hopper-medium-replay", "d4rl")
        begun.wait()
        second = pool.submit(load, "hopper-medium-replay", "d4rl")
        assert len(first.result()) == len(second.result()) == 40_000
    assert len(server.requests) == 1 and place.read_bytes() == server.content
    assert "waiting for another process" in capsys.readouterr().err
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_partial_as_long_as_the_file_restarts(server, place):
    place.parent.mkdir()
    place.with_name(place.name + ".partial").write_bytes(b"x" * len(server.content))
    load("hopper-medium-replay", "d4rl")
    assert place.read_bytes() == server.content


def test_download_fails(server, place):
    server.status = 404
    with pytest.raises(InputError) as caught:
        load("hopper-medium-replay", "d4rl")
    message = str(caught.value)
    assert f"{server.url}{place.name}" in message and "404" in message and str(place) in message
    assert "\n" not in message
    server.status, server.content = None, b"<html>log in first</html>"
    with pytest.raises(InputError, match="sent no HDF5 file"):
        load("hopper-medium-replay", "d4rl")
    assert list(place.parent.iterdir()) == []


def test_download_without_network(server, place, monkeypatch):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(InputError, match="refused.*by hand"):
        load("hopper-medium-replay", "d4rl")
    assert list(place.parent.iterdir()) == []


# --- Minari ---


@pytest.mark.parametrize("task", ["hopper", "ant-local", "reacher-leader"])
def test_minari_is_asked_for_the_robot_whatever_its_agents_see(task, monkeypatch):
    asked = []
    monkeypatch.setattr(readers, "read_minari", lambda name: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(f"{task}-medium", "minari")
    assert asked == [f"mujoco/{task.partition('-')[0]}/medium-v0"]


def test_minari_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(InputError, match=r'pip install "minari\[hdf5,hf\]"'):
        load("hopper-medium", "minari")


@pytest.mark.filterwarnings("ignore")  # what the made dataset's description lacks
def test_minari(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = raw(30, obs_dim=11, act_dim=3, ends={9: "timeouts", 24: "terminals"})
    buffers = []
    for k, (start, end) in enumerate([(0, 10), (10, 25), (25, 30)]):
        rows = slice(start, end)
        last = data["next_observations"][end - 1 : end]
        buffer = minari.data_collector.EpisodeBuffer(
            id=k,
            observations=list(np.concatenate([data["observations"][rows], last])),
            actions=list(data["actions"][rows]),
            rewards=list(data["rewards"][rows]),
            terminations=list(data["terminals"][rows]),
            truncations=list(data["timeouts"][rows]),
        )
        buffers.append(buffer)
    for name in ("mujoco/hopper/medium-v0", "own-v3"):
        minari.create_dataset_from_buffers(
            name,
            buffers,
            observation_space=Box(-np.inf, np.inf, (11,), np.float32),
            action_space=Box(-1, 1, (3,), np.float32),
        )
    expected = load("hopper", write(tmp_path / "a.hdf5", data))
    for name in ("minari", "own-v3"):
        team = load("hopper-medium", name)
        assert same(team, expected) and team.source.startswith("Minari: 30 transitions, ")
    assert len(load("hopper-medium", "minari", size=12)) == 12

    def refuse(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(minari.storage.local.hosting, "download_dataset", refuse)
    with pytest.raises(InputError, match="cannot load Minari mujoco/hopper/expert-v0: no network"):
        load("hopper-expert", "minari")
    with pytest.raises(InputError, match="observations has width 11"):
        load("walker2d", "own-v3")


# --- The check ---


def simulate(task, n=300):
    """A D4RL file of random play, its rows' states before their actions."""
    vec, rng = make_vec(task, 1, 4), np.random.default_rng(4)
    rows = {key: [] for key in (*readers.KEYS, "next_observations", "infos/qpos", "infos/qvel")}
    obs = vec.reset()
    for _ in range(n):
        qpos, qvel = vec.qpos_qvel()
        action = rng.uniform(-1, 1, (1, vec.num_agents, vec.action_dim)).astype(np.float32)
        next_obs, reward, terminal, timeout, final_obs = vec.step(action)
        row = (obs[0, 0], action.ravel(), reward[0], terminal[0], timeout[0], final_obs[0, 0])
        for key, value in zip(rows, (*row, qpos[0], qvel[0]), strict=True):
            rows[key].append(value)
        obs = next_obs
    return {key: np.array(values) for key, values in rows.items()}


@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "ant"])
@pytest.mark.parametrize("has_next", [True, False])
def test_check_agrees(tmp_path, capsys, task, has_next):
    data = simulate(task)
    if not has_next:
        del data["next_observations"]
    path = write(tmp_path / f"{task}_random-v2.hdf5", data)
    assert check_data.main([path, "--rows", "200"]) == 0  # the task is in the file's name
    text = capsys.readouterr().out
    assert f"200 rows replayed in {task}" in text and "simulator agree" in text
    assert "bonus" not in text or task == "hopper"
    found = check_data.replay(tmp_path / f"{task}_random-v2.hdf5", task, rows=200)
    assert len(found["rewards"]) == 200 and found["observations"].max() < 1e-5
    assert found["next_observations"][~found["terminals"]].max() < 1e-5
    if task != "ant":
        assert found["rewards"].max() < 1e-5


def spoil_next(data):
    data["next_observations"][:, 3] += 0.01


def spoil_rewards(data):
    data["rewards"][::2] += 0.01


def spoil_order(data):  # the state after the action instead of before it
    for key in ("infos/qpos", "infos/qvel"):
        data[key] = np.roll(data[key], -1, axis=0)


@pytest.mark.parametrize("spoil", [spoil_next, spoil_rewards, spoil_order])
def test_check_disagrees(tmp_path, capsys, spoil):
    data = simulate("hopper", 150)
    spoil(data)
    path = write(tmp_path / "a.hdf5", data)
    assert check_data.main([path, "--env", "hopper-medium"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_check_forgives_the_last_step_s_bonus(tmp_path, capsys):
    data = simulate("hopper", 150)
    assert data["terminals"].sum() > 3
    data["rewards"][data["terminals"]] += 1
    assert check_data.main([write(tmp_path / "hopper.hdf5", data)]) == 0
    assert re.search(
        r"rewards of terminal rows +\d+ +1.00e\+00 .*\n.*bonus", capsys.readouterr().out
    )


def test_check_bad_input(tmp_path, capsys):
    data = simulate("hopper", 20)
    path = write(tmp_path / "a.hdf5", data)
    assert check_data.main([path]) == 2
    assert "which task" in capsys.readouterr().err
    assert check_data.main([path, "--env", "halfcheetah"]) == 2
    assert "observations has width 11, expected 17" in capsys.readouterr().err
    assert check_data.main([path, "--env", "hoper"]) == 2
    assert "did you mean hopper" in capsys.readouterr().err
    data["infos/qvel"] = data["infos/qvel"][:, :5]
    assert check_data.main([write(tmp_path / "b.hdf5", data), "--env", "hopper"]) == 2
    assert "expected infos/qvel of shape (20, 6)" in capsys.readouterr().err
    del data["infos/qpos"]
    assert check_data.main([write(tmp_path / "c.hdf5", data), "--env", "hopper"]) == 2
    assert "found none" in capsys.readouterr().err
