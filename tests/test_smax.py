"""SMAX's maps: batches, PettingZoo, and the built-in data; skipped without JaxMARL."""

import csv
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from common import InputError
from common.datasets import load, parse_env
from common.datasets.makers import mpe as teams
from common.datasets.makers import smax as battles
from common.datasets.names import BUILT_IN_SIZES
from common.envs import TASKS, make_vec, parallel_env, win_rate
from common.envs.tasks import SMAX_MAPS
from tests.helpers import ROOT, only, run

TASK = "5m_vs_6m"
needs_smax = pytest.mark.skipif(
    find_spec("jaxmarl") is None, reason="needs SMAX: pip install -r requirements-smax.txt"
)


def random_actions(vec, obs, rng):
    return battles.random_actor(vec.action_dim)(obs, rng)


# --- Without SMAX ---


def test_where_smax_is_missing_one_line_says_what_to_install(tmp_path):
    """In a process that cannot import it, whether it is installed or not."""
    code = "import sys; sys.modules['jaxmarl'] = None; sys.argv = ['x', *sys.argv[1:]]\n"
    code += "import otc_cql_discrete as s; from common import cli; cli.cli(s.main, s.Args)"
    command = [sys.executable, "-c", code, "--env", f"{TASK}-medium", "--run-dir", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"error: {TASK} needs JaxMARL's SMAX")
    assert line.endswith("pip install -r requirements-smax.txt")
    assert not list(tmp_path.iterdir())


def test_names():
    assert parse_env(f"{TASK}-medium") == (TASK, "medium")
    assert parse_env("smac-5m_vs_6m") == ("smac-5m_vs_6m", "")
    assert set(BUILT_IN_SIZES[TASK]) == {"random", "medium"}
    assert {t for t, row in TASKS.items() if row.family == "smax"} == set(SMAX_MAPS)


def test_an_episode_is_won_by_its_return():
    assert win_rate(TASK, [0.3, 1.0, 2.0, 1.9999]) == 0.5
    assert win_rate("hopper", [2.0]) is None and win_rate("a:b", [2.0]) is None


def test_shipped_policies():
    policies = teams.load_policies(TASK)
    assert policies["w0"].shape[1] == 140 + 11 and policies["w2"].shape[2] == 11
    assert policies["steps"][policies["medium"]] < policies["steps"][policies["expert"]]
    assert teams.policy_file(TASK).stat().st_size < 300_000


def test_a_policys_actions_are_legal_and_as_likely_as_it_says():
    rng = np.random.default_rng(0)
    policy = {"w0": rng.normal(size=(5, 8)), "w1": rng.normal(size=(8, 8)), "b0": np.zeros(8)}
    policy |= {"b1": np.zeros(8), "w2": rng.normal(size=(8, 3)) / 4, "b2": np.zeros(3)}
    obs = np.tile(np.array([0.3, -0.2, 1, 0, 1], np.float32), (20_000, 1, 1))
    found = battles.actor(policy, 3)(obs, rng).mean(axis=(0, 1))
    scores = np.exp(battles.logits(policy, obs[0, 0])) * obs[0, 0, -3:]
    np.testing.assert_allclose(found, scores / scores.sum(), atol=0.015)
    obs[..., -3:] = 0
    for act in (battles.actor(policy, 3), battles.random_actor(3)):
        assert not act(obs, rng).any()  # the dead do nothing


# --- With SMAX ---


@needs_smax
def test_the_table_has_every_map_with_allies_of_one_type():
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    expected = {
        name
        for name, s in MAP_NAME_TO_SCENARIO.items()
        if not s.smacv2_unit_type_generation
        and len(set(s.unit_types[: s.num_allies].tolist())) == 1
    }
    assert set(SMAX_MAPS) == expected


@needs_smax
def test_episodes_of_many_teams():
    vec, rng = make_vec(TASK, 16, 3), np.random.default_rng(0)
    assert (vec.num_agents, vec.obs_dim, vec.action_dim) == (5, 151, 11)
    assert vec.discrete and vec.max_episode_steps == 100
    obs, total, ended = vec.reset(), np.zeros(16), 0
    deaths = np.zeros(16, int)
    for _ in range(60):
        legal = obs[..., -11:]
        assert np.isin(legal, (0, 1)).all()
        dead = ~legal.any(axis=2)
        assert not obs[dead].any()  # nothing is seen
        assert legal[~dead][:, 4].all()  # stop
        assert (dead.sum(axis=1) >= deaths).all()  # nobody comes back
        before = obs
        obs, rewards, terminations, truncations, final_obs = vec.step(random_actions(vec, obs, rng))
        over = terminations | truncations
        assert np.array_equal(obs[~over], final_obs[~over])
        assert obs[over][..., -11:].any(axis=2).all()  # a new team is alive
        lost = ~final_obs[over][..., -11:].any(axis=(1, 2))
        total += rewards
        assert ((total[over] < 1.5) | ~lost).all() and (total <= 2.001).all()
        deaths = np.where(over, 0, (~final_obs[..., -11:].any(axis=2)).sum(axis=1))
        ended += over.sum()
        total[over] = 0
        assert not np.array_equal(before, obs)
    assert ended > 16


@needs_smax
def test_seeds_decide_and_teams_do_not_depend_on_each_other():
    runs_ = []
    for seed in (3, 3, 4):
        vec, rng = make_vec(TASK, 16, 0), np.random.default_rng(0)
        obs = vec.reset((seed, 1))
        for _ in range(30):
            actions = random_actions(vec, obs, rng)
            if len(runs_) == 1:
                actions[1:] = np.roll(actions[1:], 1, axis=3 - 1)  # the others do something else
            obs = vec.step(actions)[0]
        runs_.append(obs)
    assert np.array_equal(runs_[0][0], runs_[1][0])
    assert not np.array_equal(runs_[0][1:], runs_[1][1:])
    assert not np.array_equal(runs_[0][0], runs_[2][0])


@needs_smax
def test_a_team_is_the_same_alone_as_in_pettingzoo():
    vec, env = make_vec(TASK, 1, 0), parallel_env(TASK)
    seed = int(np.random.SeedSequence(5).generate_state(1)[0])
    obs, (seen, _), rng = vec.reset(5), env.reset(seed=seed), np.random.default_rng(0)
    while env.agents:
        for i, agent in enumerate(env.possible_agents):
            parts = [seen[agent]["observation"], seen[agent]["action_mask"]]
            assert np.array_equal(obs[0, i], np.concatenate(parts))
        actions = random_actions(vec, obs, rng)
        played = dict(zip(env.agents, actions[0].argmax(axis=1).tolist(), strict=True))
        seen, rewards, terminations, truncations, _ = env.step(played)
        _, team_rewards, *ends, obs = vec.step(actions)
        assert set(rewards.values()) == {float(team_rewards[0])}
        assert set(terminations.values()) == {bool(ends[0][0])}
        assert set(truncations.values()) == {bool(ends[1][0])}
    assert ends[0][0] or ends[1][0]


@needs_smax
def test_pettingzoos_own_test_passes():
    parallel_api_test(parallel_env(TASK), num_cycles=60)


@needs_smax
def test_a_picture_shows_the_living():
    env = parallel_env(TASK, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (240, 240, 3) and first.dtype == np.uint8
    env.step({agent: 4 for agent in env.agents})
    assert not np.array_equal(first, env.render())


@needs_smax
def test_bad_names():
    with pytest.raises(InputError, match="no joints"):
        make_vec(TASK, 1, 0, "2x3")
    with pytest.raises(InputError, match="this script is for continuous: otc_cql_discrete.py"):
        load(f"{TASK}-medium")
    with pytest.raises(InputError, match="no built-in data for 8m-medium"):
        load("8m-medium", discrete=True)


@needs_smax
def test_built_in_data_and_a_run_on_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    data = load(f"{TASK}-medium", size=3000, discrete=True)
    assert data.obs.shape == (3000, 5, 151) and data.actions.shape == (3000, 5, 11)
    assert "SMAX" in data.source and "not SMAC" in data.source
    legal = data.obs[..., -11:]
    assert (data.actions.sum(2) == legal.any(2)).all() and (data.actions <= legal).all()
    ends = np.flatnonzero(data.terminations | data.truncations)
    starts = np.append(0, ends[:-1] + 1)
    assert data.obs[starts][..., -11:].any(2).all()  # all begin alive
    inside = np.setdiff1d(np.arange(2999), ends)
    assert np.array_equal(data.next_obs[inside], data.obs[inside + 1])
    totals = np.add.reduceat(data.rewards, starts)
    assert totals.max() == pytest.approx(2, abs=1e-4) and totals[totals < 1.99].max() <= 1.001

    argv = ["--env", f"{TASK}-medium", "--dataset-size", 3000, "--run-dir", tmp_path / "runs"]
    argv += ["--offline-updates", 30, "--eval-every", 30, "--deployments", 2, "--eval-episodes", 4]
    argv += ["--deployment-steps", 120, "--references", 100, "--finetune-updates", 10]
    argv += ["--hidden-size", 16, "--exploration", "sequential", "--device", "cpu"]
    run(monkeypatch, "otc_cql_discrete", *argv)
    with (only(tmp_path / "runs") / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(0 <= float(row["win_rate"]) <= 1 for row in rows)
    assert "won by pi^0" in capsys.readouterr().out
