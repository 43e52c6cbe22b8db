"""wind-grid, the tabular team as a task."""

import h5py
import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from common.datasets import makers
from common.envs import TASKS, make_vec, parallel_env
from common.envs.grid import GOAL, MOVES, PUSH, SIZE, STEPS, policy

CELLS = np.argwhere(np.ones((SIZE, SIZE)))


def exact_values(probabilities, choose, steps=STEPS):
    """Mean return over starts of an episode, by dynamic programming over cells; `choose` of each
    cell's values (S, A) -> (S,)."""
    a, b = np.meshgrid(range(len(MOVES)), range(len(MOVES)), indexing="ij")
    moved = CELLS[:, None, None] + PUSH * (MOVES[a] + MOVES[b])
    ends = np.clip(moved, 0, SIZE - 1)
    rewards = (np.abs(ends - GOAL).sum(-1) <= 1).astype(float)
    index, values = ends[..., 0] * SIZE + ends[..., 1], np.zeros(len(CELLS))
    for _ in range(steps):
        values = choose((probabilities[:, None] * (rewards + values[index])).sum(2))
    return values.mean()


def test_it_is_a_pettingzoo_env_and_draws():
    env = parallel_env("wind-grid", render_mode="rgb_array")
    parallel_api_test(env, num_cycles=120)
    env.reset(seed=0)
    assert env.render().shape == (240, 240, 3)


def test_the_token_goes_where_both_push_it():
    vec = make_vec("wind-grid", 40, 0)
    vec.set_deployment(1, 5)
    obs, random = vec.reset()[:, 0], np.random.default_rng(0)
    for _ in range(20):
        actions = np.eye(len(MOVES), dtype=np.float32)[random.integers(len(MOVES), size=40)]
        cells = np.stack([obs[:, :SIZE].argmax(1), obs[:, SIZE : 2 * SIZE].argmax(1)], axis=1)
        push = MOVES[actions.argmax(1)] + MOVES[policy()[tuple(cells.T)]]
        expected = np.clip(cells + PUSH * push, 0, SIZE - 1)
        next_obs, rewards, ends, cuts, _ = vec.step(actions[:, None])
        obs = next_obs[:, 0]
        found = np.stack([obs[:, :SIZE].argmax(1), obs[:, SIZE : 2 * SIZE].argmax(1)], axis=1)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(rewards, np.abs(expected - GOAL).sum(1) <= 1)
        assert not ends.any() and not cuts.any() and (obs[:, 2 * SIZE :] == 1).all()


def test_its_reference_returns_are_exact():
    """Uniform actions and the best ones against today's partner."""
    today = np.eye(len(MOVES))[policy()[tuple(CELLS.T)]]
    task = TASKS["wind-grid"]
    assert exact_values(today, lambda q: q.mean(1)) == pytest.approx(task.random_return, abs=0.01)
    assert exact_values(today, lambda q: q.max(1)) == pytest.approx(task.expert_return, abs=0.05)


def test_its_data_knows_nothing_of_todays_partner(tmp_path):
    makers.make("wind-grid", "random", 20_000, tmp_path / "data")
    with h5py.File(tmp_path / "data") as file:
        obs, next_obs, actions, rewards, ends = (
            file[key][...]
            for key in ("observations", "next_observations", "actions", "rewards", "timeouts")
        )
    uniform = np.full((len(CELLS), len(MOVES)), 1 / len(MOVES))
    expected = exact_values(uniform, lambda q: q.mean(1)) / STEPS
    assert rewards.mean() == pytest.approx(expected, rel=0.15)
    assert (np.flatnonzero(ends) % STEPS == STEPS - 1).all()
    cells, after = (
        np.stack([x[:, :SIZE].argmax(1), x[:, SIZE : 2 * SIZE].argmax(1)], axis=1)
        for x in (obs, next_obs)
    )
    inside = ((cells >= 4) & (cells < SIZE - 4)).all(1)  # where nothing is clipped
    partners = (after - cells - PUSH * MOVES[actions.argmax(1)])[inside] // PUSH
    counts = [(partners == move).all(1).sum() for move in MOVES]
    assert sum(counts) == inside.sum() and np.ptp(counts) < 6 * np.sqrt(inside.sum() / 5)
