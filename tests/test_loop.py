"""What Algorithm 1's lines in a script call: acting, deploying, evaluating."""

import csv
import json

import h5py
import numpy as np
import pytest
import torch

from common import loop
from tests.helpers import assert_same, only, run, tiny
from tests.tiny_task import ENV, Point


class Counting:
    """An environment that ends its episodes after seven steps, and says who acted how."""

    num_agents, obs_dim, action_dim, max_episode_steps = 3, 1, 2, 7

    def __init__(self, num_envs):
        self.num_envs, self.time, self.seen = num_envs, 0, []

    def reset(self, seed):
        return np.zeros((self.num_envs, 3, 1), np.float32)

    def to_box(self, actions):
        return actions

    def step(self, actions):
        self.seen.append(actions[:, :, 0].copy())
        self.time += 1
        obs, no = self.reset(None), np.zeros(self.num_envs, bool)
        return obs, np.ones(self.num_envs, np.float32), no, no | (self.time % 7 == 0), obs


class Marking:
    """Acts 0, explores 1."""

    def act(self, obs):
        return torch.zeros(len(obs), obs.shape[1], 2)

    def explore(self, obs):
        return torch.ones(len(obs), obs.shape[1], 2)


@pytest.mark.parametrize("steps", [30, 31, 2])
@pytest.mark.parametrize("exploration", ["none", "sequential"])
def test_one_agent_at_a_time_explores_for_its_share_of_exactly_m_steps(exploration, steps):
    envs = Counting(num_envs=2)
    found, ended = loop.collect(envs, Marking(), steps, 0, torch.device("cpu"), exploration)
    seen = np.stack(envs.seen)  # (steps, S, N)
    assert len(seen) == steps and (found["actions"][..., 0].swapaxes(0, 1) == seen).all()
    assert ended.tolist() == [steps // 7] * 2
    assert found["explorer"].shape == (2, steps) and found["explorer"].dtype == np.int8
    if exploration == "none":
        assert not seen.any() and (found["explorer"] == -1).all()
        return
    assert (seen.sum(axis=2) == 1).all()
    assert (found["explorer"].T == seen.argmax(axis=2)).all()
    explorer = found["explorer"][0].astype(int)
    assert (np.diff(explorer) >= 0).all()  # in turn
    shares = np.bincount(explorer, minlength=3)
    assert shares.max() - shares.min() <= 1


def test_every_team_acts_by_its_own_seeds_learners():
    """Agent n of seed s in environment e gets the action that group s * N + n takes there."""
    S, E, N = 2, 3, 4
    obs = np.arange(S * E * N * 2, dtype=np.float32).reshape(S * E, N, 2)

    class Naming:
        def act(self, obs):  # (G, E, 2) -> group, and what it saw
            group = torch.arange(len(obs)).view(-1, 1, 1).expand(-1, obs.shape[1], 1)
            return torch.cat([group, obs], dim=2)

        def explore(self, obs):
            return -1 - self.act(obs)

    for explorer in (-1, 2):
        policy = loop.team_policy(Naming(), np.zeros_like(obs), S, torch.device("cpu"))
        actions = policy(obs, explorer)
        assert actions.shape == (S * E, N, 3)
        for s in range(S):
            for e in range(E):
                for n in range(N):
                    expected = np.array([s * N + n, *obs[s * E + e, n]])
                    expected = -1 - expected if n == explorer else expected
                    np.testing.assert_array_equal(actions[s * E + e, n], expected)


def test_an_evaluation_is_the_first_episode_of_every_environment():
    """Ends at different times, by termination or limit, and nothing of what follows counts."""

    class Countdown:
        num_envs, num_agents = 4, 1
        lengths = np.array([2, 5, 1, 3])

        def reset(self, seed):
            self.time = np.zeros(4, int)
            return np.zeros((4, 1, 1), np.float32)

        def to_box(self, actions):
            return actions

        def step(self, actions):
            self.time += 1
            ends = self.time == self.lengths
            rewards = 10.0 ** np.arange(4)
            self.time[ends] = 0  # the next episode begins
            obs = np.zeros((4, 1, 1), np.float32)
            return obs, rewards, ends & (np.arange(4) % 2 == 0), ends & (np.arange(4) % 2 == 1), obs

    class Idle:
        def act(self, obs):
            return obs

    returns = loop.episode_returns(Countdown(), Idle(), 2, 0, torch.device("cpu"))
    assert returns == [[2.0, 50.0], [100.0, 3000.0]]


def test_a_run_knows_what_the_datas_episodes_return(tmp_path, monkeypatch, data):
    run(
        monkeypatch,
        "otc_bcq",
        *["--env", ENV, "--dataset", data, "--run-dir", tmp_path / "runs"],
        *tiny("otc_bcq"),
    )
    with h5py.File(data) as file:
        rewards, ends = file["rewards"][...], np.flatnonzero(file["timeouts"][...]) + 1
    pieces = np.split(rewards, ends[:-1] if ends[-1] == len(rewards) else ends)[:-1]
    found = json.loads((only(tmp_path / "runs") / "args.json").read_text())["data_return"]
    assert found == pytest.approx(np.mean([piece.sum() for piece in pieces]), rel=1e-5)


def test_how_often_a_run_is_evaluated_changes_no_policy(tmp_path, monkeypatch, data):
    """BCQ's policies draw random numbers when they act."""
    argv = "--env", ENV, "--dataset", data, *tiny("otc_bcq")
    often = "--eval-every", "10", "--eval-episodes", "3"
    for name, flags in {"seldom": (), "often": often}.items():
        run(monkeypatch, "otc_bcq", *argv, *flags, "--run-dir", tmp_path / name)
    paths = (only(tmp_path / name) / "checkpoint.pt" for name in ("seldom", "often"))
    seldom, often = (torch.load(path, weights_only=True)["agent"] for path in paths)
    assert_same(seldom, often)


class TwoLengths(Point):
    """Episodes of 10 or of 100 steps, either as likely; every step pays 1."""

    max_episode_steps = 100

    def reset(self, seed=None, options=None):
        found = super().reset(seed, options)
        self.length = self.random.choice([10, 100])
        return found

    def step(self, actions):
        obs, rewards, terminated, _, infos = super().step(actions)
        rewards, ends = dict.fromkeys(rewards, 1.0), self.time == self.length
        self.agents = [] if ends else self.possible_agents[:]
        return (
            obs,
            rewards,
            dict.fromkeys(terminated, ends),
            dict.fromkeys(terminated, False),
            infos,
        )


@pytest.mark.parametrize("steps", [60, 400])
def test_short_episodes_count_no_more_than_long_ones(tmp_path, monkeypatch, data, steps):
    """Whatever M: of the episodes that end within it most are short, the longer ones are cut."""
    flags = ["--env", f"{__name__}:TwoLengths", "--dataset", data, *tiny("otc_bcq")]
    flags += ["--deployment-steps", steps, "--eval-episodes", 400, "--sampling", "uniform"]
    run(monkeypatch, "otc_bcq", *flags, "--eval-every", 60, "--run-dir", tmp_path / "runs")
    with (only(tmp_path / "runs") / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:  # the mean is 55, its standard error 2.25
        assert row["episodes"] == "400" and 46 < float(row["mean_return"]) < 64
