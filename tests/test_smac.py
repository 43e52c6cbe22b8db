"""SMAC's adapter, on a stand-in with SMAC's interface."""

import sys
import types

import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from common import InputError
from common.envs import TASKS, make_vec, parallel_env
from common.envs.tasks import win_rate

TASK = "smac-5m_vs_6m"


class StandIn:
    """Three agents, four actions (no-op, stop, two attacks), six steps; agent 2 dies at step 2. As
    SMAC it tells of its time limit only where it was made with continuing_episode, and of a game
    that failed (8m, step 2) nothing."""

    made = []

    def __init__(self, map_name, seed=None, continuing_episode=False):
        self.continuing_episode = continuing_episode
        self.map_name, self.seed, self.played, self.closed = map_name, seed, [], False
        self.limit = 6
        StandIn.made.append(self)

    def get_env_info(self):
        sizes = {"state_shape": 4, "obs_shape": 2, "n_actions": 4, "n_agents": 3}
        return {**sizes, "episode_limit": self.limit}

    def reset(self):
        self.time = 0
        return self.get_obs(), self.get_state()

    def get_obs(self):
        return [np.array([i, self.time], float) for i in range(3)]

    def get_state(self):
        return np.full(4, self.time)

    def get_avail_actions(self):
        alive = [[0, 1, 1, self.time % 2], [0, 1, 0, 1], [0, 1, 1, 1]]
        return [[1, 0, 0, 0] if i == 2 and self.time >= 2 else alive[i] for i in range(3)]

    def step(self, actions):
        for action, legal in zip(actions, self.get_avail_actions(), strict=True):
            assert legal[action], "illegal"
        self.played.append(list(actions))
        self.time += 1
        if self.map_name == "8m" and self.time == 2:
            return 0, True, {}
        won = self.map_name == "3m" and self.time == 3
        info = {"battle_won": won}
        if self.time == self.limit and self.continuing_episode:
            info["episode_limit"] = True
        return 20.0 if won else 0.5, won or self.time == self.limit, info

    def close(self):
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch):
    StandIn.made = []
    package, env = types.ModuleType("smac"), types.ModuleType("smac.env")
    env.StarCraft2Env = StandIn
    monkeypatch.setitem(sys.modules, "smac", package)
    monkeypatch.setitem(sys.modules, "smac.env", env)
    return StandIn


def test_without_smac_one_line_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "smac", None)
    with pytest.raises(InputError, match="^smac-5m_vs_6m needs SMAC .*StarCraft II$"):
        make_vec(TASK, 1, 0)


def test_the_dead_have_no_legal_action_and_are_told_the_no_op(stand_in):
    vec = make_vec(TASK, 1, 7)
    assert vec.discrete and (vec.num_agents, vec.obs_dim, vec.action_dim) == (3, 6, 4)
    assert vec.max_episode_steps == 6
    obs = vec.reset()
    game = stand_in.made[-1]
    assert game.map_name == "5m_vs_6m" and game.seed is not None
    assert all(each.closed for each in stand_in.made[:-1])
    ends = []
    for t in range(8):
        time = t % 6
        expected = np.array([[0, 1, 1, time % 2], [0, 1, 0, 1], [0, 1, 1, 1]], np.float32)
        expected[2] *= time < 2
        assert np.array_equal(obs[0, :, 2:], expected)
        assert np.array_equal(obs[0, :, :2], [[0, time], [1, time], [2, time]])
        actions = np.zeros((1, 3, 4), np.float32)
        actions[0, :, 2] = 1  # illegal for agent 1, and agent 2 may be dead
        obs, rewards, terminations, truncations, final_obs = vec.step(actions)
        assert rewards[0] == 0.5 and final_obs[0, 0, 1] == time + 1
        ends.append((bool(terminations[0]), bool(truncations[0])))
        assert game.played[-1] == [2, 1, 2 if time < 2 else 0]
    assert ends == [(False, t == 5) for t in range(8)]
    assert len([each for each in stand_in.made if not each.closed]) == 1


def test_a_victory_is_a_termination(stand_in):
    vec = make_vec("smac-3m", 1, 0)
    vec.reset()
    actions = np.tile(np.array([0, 1, 0, 0], np.float32), (1, 3, 1))
    outcomes = [vec.step(actions)[1:4] for _ in range(3)]
    assert [bool(o[1][0]) for o in outcomes] == [False, False, True]
    assert not any(o[2][0] for o in outcomes)
    assert TASKS["smac-3m"].win_return == pytest.approx(20, abs=0.1)


def test_a_game_that_failed_is_a_cut(stand_in):
    vec = make_vec("smac-8m", 1, 0)
    vec.reset()
    actions = np.tile(np.array([0, 1, 0, 0], np.float32), (1, 3, 1))
    outcomes = [vec.step(actions)[2:4] for _ in range(2)]
    assert [(bool(a[0]), bool(b[0])) for a, b in outcomes] == [(False, False), (False, True)]


def test_returns_tell_no_victory_where_shields_pay():
    """A Protoss enemy's shield pays anew after it has regenerated."""
    zealots = "2m_vs_1z", "3s_vs_3z", "3s_vs_4z", "3s_vs_5z", "6h_vs_8z"
    assert all(TASKS[f"smac-{name}"].win_return is None for name in zealots)
    assert win_rate("smac-3s_vs_5z", [25.0]) is None and win_rate("smac-3m", [20.0]) == 1


def test_pettingzoos_own_test_passes(stand_in):
    parallel_api_test(parallel_env(TASK), num_cycles=30)


def test_no_split_and_no_pictures(stand_in):
    with pytest.raises(InputError, match="no joints"):
        make_vec(TASK, 1, 0, "2x3")
    with pytest.raises(InputError, match="no pictures"):
        parallel_env(TASK, render_mode="rgb_array")
