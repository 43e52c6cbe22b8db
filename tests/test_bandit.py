"""The two-mode bandit: its reward by hand, its data, its face for PettingZoo, its picture."""

import itertools

import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from common import InputError
from common.datasets import load, makers
from common.envs import make_vec, normalized_score, parallel_env

TASKS = ["bandit-2", "bandit-3"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("task", TASKS)
def test_the_reward_is_the_mean_product_of_two_agents(task):
    vec, rng = make_vec(task, 50, 0), np.random.default_rng(0)
    obs = vec.reset()
    assert obs.shape == (50, vec.num_agents, 5) and (obs == 1).all()
    actions = rng.uniform(-1.5, 1.5, (50, vec.num_agents, 1))
    next_obs, rewards, terminations, _, final_obs = vec.step(actions)
    for team, reward in zip(np.clip(actions[:, :, 0], -1, 1), rewards, strict=True):
        products = [a * b for a, b in itertools.combinations(team, 2)]
        assert reward == pytest.approx(np.mean(products), abs=1e-6)
    assert terminations.all() and (next_obs == 1).all() and (final_obs == 1).all()
    for value, agree in ((1, 1.0), (-1, 1.0), (0.8, 0.64)):
        assert vec.step(np.full_like(actions, value))[1] == pytest.approx(agree)
    assert normalized_score(task, 1.0) == 100


@pytest.mark.parametrize("task", TASKS)
def test_half_of_the_data_is_near_either_mode(task):
    data = load(task, size=20_000)
    n = data.actions.shape[1]
    assert data.obs.shape == (20_000, 1, 5) and (data.obs == 1).all()
    assert data.terminations.all() and not data.truncations.any()
    signs = np.sign(data.actions[:, :, 0])
    assert (signs == signs[:, :1]).mean() > 0.999 and (signs[:, 0] > 0).sum() == 10_000
    for mode in (-1, 1):
        team = data.actions[signs[:, 0] == mode, :, 0]
        # of N(.8, .1) clipped at 1
        assert team.mean(0) == pytest.approx(np.full(n, 0.799 * mode), abs=4e-3)
        assert team.std(0) == pytest.approx(np.full(n, 0.098), abs=3e-3)
        assert np.abs(np.corrcoef(team.T)[0, 1]) < 0.05
    assert data.mean_return() == pytest.approx(0.639, abs=3e-3)


def test_names(tmp_path):
    assert makers.built_in_path("bandit-2", "", 1_000_000).name == "bandit-2-1000000-v1.hdf5"
    with pytest.raises(InputError, match="one set of data, expected --env bandit-2"):
        load("bandit-2-medium")
    with pytest.raises(InputError, match="did you mean bandit-"):
        load("bandit-4")


@pytest.mark.parametrize("task", TASKS)
def test_pettingzoo(task):
    parallel_api_test(parallel_env(task), num_cycles=60)
    env = parallel_env(task)
    env.reset(seed=0)
    _, rewards, terminations, *_ = env.step({agent: [0.5] for agent in env.possible_agents})
    assert set(rewards.values()) == {0.25} and all(terminations.values()) and not env.agents


def test_a_picture_has_every_action_in_its_place():
    env = parallel_env("bandit-2", render_mode="rgb_array")
    env.reset(seed=0)
    env.step({"agent_0": [-0.8], "agent_1": [0.4]})
    picture = env.render().astype(int)
    for colour, x in (((31, 119, 180), -0.8), ((255, 127, 14), 0.4)):
        _, columns = np.nonzero((np.abs(picture - colour) < 3).all(2))
        assert columns.mean() == pytest.approx(120 + 120 / 1.1 * x, abs=1)
