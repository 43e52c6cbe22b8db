"""The reacher tasks, their controllers and data, and what the agents of views see and move."""

import gymnasium as gym
import h5py
import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from common import InputError
from common.datasets import load, makers
from common.datasets.makers import reacher
from common.envs import TASKS, make_vec, normalized_score, parallel_env

REACHERS = ["reacher-full", "reacher-independent", "reacher-leader"]


@pytest.mark.parametrize("task", [*REACHERS, "ant-local"])
def test_parallel_api(task):
    parallel_api_test(parallel_env(task), num_cycles=60)


@pytest.mark.parametrize("task", [*REACHERS, "ant-local"])
def test_views_and_actions_are_parts_of_gymnasiums(task):
    row = TASKS[task]
    plain = gym.make(row.env_id, **row.kwargs)
    vec, env = make_vec(task, 1, 3), parallel_env(task)
    seed = int(np.random.SeedSequence(3).generate_state(1)[0])
    state, _ = plain.reset(seed=seed)
    obs, (own, _) = vec.reset(), env.reset(seed=seed)
    views = row.views or [range(len(state))] * 2
    rng = np.random.default_rng(0)
    for _ in range(55):
        for i, view in enumerate(views):
            expected = state[list(view)].astype(np.float32)
            np.testing.assert_array_equal(obs[0, i, : len(view)], expected)
            assert not obs[0, i, len(view) :].any()
            if env.agents:
                found = own[f"agent_{i}"].astype(np.float32)
                np.testing.assert_array_equal(found, expected)
                assert env.observation_space(f"agent_{i}").shape == expected.shape
        actions = rng.uniform(-0.3, 0.3, (vec.num_agents, vec.action_dim)).astype(np.float32)
        controls = np.empty(actions.size, np.float32)
        controls[list(row.actuators or range(actions.size))] = actions.ravel()
        state, reward, *_ = plain.step(controls)
        obs, rewards, _, truncations, final_obs = vec.step(actions[None])
        assert rewards[0] == np.float32(reward)
        if env.agents:
            own, paid, *_ = env.step({a: actions[i] for i, a in enumerate(env.agents)})
            assert np.float32(paid["agent_1"]) == rewards[0]
        if truncations[0]:
            state, _ = plain.reset()
            break
    assert truncations[0] == (row.env_id == "Reacher-v5")


def test_an_ants_agent_moves_the_leg_that_it_sees():
    vec = make_vec("ant-local", 1, 0)
    for k in range(4):
        moved = np.zeros(4)
        for sign in (-1, 1):
            obs = vec.reset(seed=1)
            actions = np.zeros((1, 4, 2), np.float32)
            actions[0, k] = sign
            obs, *_ = vec.step(actions)
            moved += [np.abs(obs[0, i, [12, 14] if i == 0 else [1, 3]]).sum() for i in range(4)]
        assert moved.argmax() == k, (k, moved)


def test_a_task_of_views_has_its_own_agents_only_and_the_full_one_any_split():
    assert make_vec("reacher-full", 1, 0, "1x2").action_dim == 2
    with pytest.raises(InputError, match="expected one of 2x1"):
        make_vec("reacher-leader", 1, 0, "1x2")


@pytest.mark.parametrize("bend", [-1, 1])
def test_goal_angles_put_the_fingertip_on_the_target(bend):
    rng = np.random.default_rng(0)
    for radius, angle in rng.uniform((0.02, -np.pi), (0.2, np.pi), (50, 2)):
        target = radius * np.array([np.cos(angle), np.sin(angle)])
        q1, q2 = reacher.goal_angles(*target, bend)
        tip = 0.1 * np.array([np.cos(q1), np.sin(q1)])
        tip += 0.11 * np.array([np.cos(q1 + q2), np.sin(q1 + q2)])
        np.testing.assert_allclose(tip, target, atol=1e-9)
        assert np.sign(q2) == bend


def test_the_data_is_both_conventions_expert_and_every_task_sees_its_part(tmp_path, monkeypatch):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path))
    full = load("reacher-full-expert-mix", size=4000)
    returns = full.rewards.reshape(-1, 50).sum(1)
    assert len(full) == 4000 and full.truncations.reshape(-1, 50)[:, -1].all()
    assert 80 < normalized_score("reacher-full", returns.mean()) < 112
    sines = full.next_obs.reshape(-1, 50, 10)[:, -1, 3]  # of the elbow, at the end
    assert (sines[:40] < 0.05).all() and (sines[40:] > -0.05).all()
    assert np.abs(full.actions).max() <= 1 and not full.terminations.any()
    leader = load("reacher-leader-expert-mix", size=4000)
    np.testing.assert_array_equal(leader.actions, full.actions)
    for i, view in enumerate(TASKS["reacher-leader"].views):
        seen = leader.obs[:, i, : len(view)]
        np.testing.assert_array_equal(seen, full.obs[:, 0, list(view)])
    assert not leader.obs[:, 1, 6:].any()


def test_a_file_in_the_robots_order_reaches_the_right_legs(tmp_path):
    n, rng = 20, np.random.default_rng(0)
    data = {
        "observations": rng.normal(size=(n, 111)),
        "actions": rng.uniform(-1, 1, (n, 8)),
        "rewards": rng.normal(size=n),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) == n - 1,
    }
    data["next_observations"] = data["observations"] + 1
    with h5py.File(tmp_path / "ant.hdf5", "w") as file:
        for key, values in data.items():
            file[key] = values
    team = load("ant-local", str(tmp_path / "ant.hdf5"))
    assert team.obs.shape == (n, 4, 15)
    for i, pair in enumerate(([2, 3], [4, 5], [6, 7], [0, 1])):
        np.testing.assert_allclose(team.actions[:, i], data["actions"][:, pair], rtol=1e-6)
    np.testing.assert_allclose(
        team.next_obs[:, 3, :4], data["next_observations"][:, [11, 25, 12, 26]], rtol=1e-6
    )


@pytest.mark.parametrize("quality", ["expert-clockwise", "expert-counter"])
def test_one_convention_is_one_bend(quality):
    assert [piece.bend for piece in reacher.plan("reacher-full", quality, 25_000)] == (
        [-1 if quality == "expert-clockwise" else 1] * 3
    )
    assert sum(piece.rows for piece in reacher.plan("reacher-full", quality, 25_000)) == 25_000
    assert makers.maker_of("reacher-leader") is reacher
