"""Environments: equality with Gymnasium, PettingZoo's API, splits, a user's own env, errors."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test

from common import InputError
from common.envs import TASKS, make_vec, normalized_score, parallel_env
from common.envs.tasks import OMAR_RETURNS

REPOSITORY = Path(__file__).parent.parent
PLAIN = {
    "halfcheetah": ("HalfCheetah-v5", {}),
    "walker2d": ("Walker2d-v5", {"xml_file": "walker2d.xml"}),
    "hopper": ("Hopper-v5", {}),
    "ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}),
}


# --- MuJoCo ---


# halfcheetah never terminates and the others do not survive 1000 steps of noise; without actions
# ant stands until its time limit
@pytest.mark.parametrize(
    "task, scale, ends",
    [
        ("halfcheetah", 1.0, "truncated"),
        ("walker2d", 1.0, "terminated"),
        ("hopper", 1.0, "terminated"),
        ("ant", 1.0, "terminated"),
        ("ant", 0.0, "truncated"),
    ],
)
def test_trajectories_equal_gymnasium(task, scale, ends):
    num_envs, seed, env_id, kwargs = 2, 3, *PLAIN[task]
    vec = make_vec(task, num_envs, seed)
    plain = [gym.make(env_id, **kwargs) for _ in range(num_envs)]
    seeds = np.random.SeedSequence(seed).generate_state(num_envs)
    obs = vec.reset()
    assert obs.shape == (num_envs, vec.num_agents, vec.obs_dim) and obs.dtype == np.float32
    for e, env in enumerate(plain):
        first, _ = env.reset(seed=int(seeds[e]))
        assert (obs[e] == first.astype(np.float32)).all()
    generator = np.random.default_rng(0)
    ended = {"terminated": 0, "truncated": 0}
    for _ in range(1100):
        shape = (num_envs, vec.num_agents, vec.action_dim)
        actions = scale * generator.uniform(vec.action_low, vec.action_high, shape)
        actions = actions.astype(np.float32)
        obs, rewards, terminations, truncations, final_obs = vec.step(actions)
        qpos, qvel = vec.qpos_qvel()
        for e, env in enumerate(plain):
            following, reward, terminated, truncated, _ = env.step(actions[e].reshape(-1))
            assert (final_obs[e] == following.astype(np.float32)).all()
            assert rewards[e] == np.float32(reward)
            assert (terminations[e], truncations[e]) == (terminated, truncated)
            ended["terminated"] += terminated
            ended["truncated"] += truncated
            if terminated or truncated:
                following, _ = env.reset()
            assert (obs[e] == following.astype(np.float32)).all()
            assert (qpos[e] == env.unwrapped.data.qpos).all()
            assert (qvel[e] == env.unwrapped.data.qvel).all()
    assert ended[ends] >= num_envs
    vec.close()


@pytest.mark.parametrize("task", [*PLAIN, "halfcheetah-local"])
def test_parallel_api(task, recwarn):
    parallel_api_test(parallel_env(task), num_cycles=1100)
    assert not [w for w in recwarn if "gent" in str(w.message)]


@pytest.mark.parametrize("task", [t for t in TASKS if TASKS[t].family not in ("smac", "smax")])
def test_every_task_says_how_long_an_episode_is(task):
    assert parallel_env(task).max_episode_steps == make_vec(task, 1, 0).max_episode_steps


def test_parallel_env_equals_vec():
    env, vec = parallel_env("hopper"), make_vec("hopper", 1, 5)
    seed = int(np.random.SeedSequence(5).generate_state(1)[0])
    assert env.possible_agents == ["agent_0", "agent_1", "agent_2"]
    observations, _ = env.reset(seed=seed)
    assert (vec.reset()[0, 1] == observations["agent_1"].astype(np.float32)).all()
    while env.agents:
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        joint = np.stack([actions[agent] for agent in env.possible_agents])[None]
        observations, rewards, terminations, truncations, _ = env.step(actions)
        _, team_rewards, team_terminations, team_truncations, final_obs = vec.step(joint)
        assert (final_obs[0, 2] == observations["agent_2"].astype(np.float32)).all()
        assert team_rewards[0] == np.float32(rewards["agent_0"])
        assert team_terminations[0] == terminations["agent_0"]
        assert team_truncations[0] == truncations["agent_0"]
        observations["agent_0"][:] = np.nan  # one agent's array is not another's
        assert np.isfinite(observations["agent_1"]).all()


@pytest.mark.parametrize(
    "task, scenario, kwargs",
    [
        ("halfcheetah", "HalfCheetah", {}),
        ("walker2d", "Walker2d", {}),
        ("hopper", "Hopper", {}),
        (
            "ant",
            "Ant",
            {"include_cfrc_ext_in_observation": False, "local_categories": [["qpos", "qvel"]]},
        ),
    ],
)
def test_agents_have_the_joints_of_mamujoco(task, scenario, kwargs):
    """Sets only: MaMuJoCo reverses a Walker2d leg and numbers Ant's agents from another leg."""
    mamujoco = pytest.importorskip(
        "gymnasium_robotics", reason="gymnasium-robotics (requirements-dev.txt) is not installed"
    ).mamujoco_v1
    split = TASKS[task].split
    theirs = mamujoco.parallel_env(scenario, split, agent_obsk=0, **kwargs)
    theirs = {frozenset(node.act_ids for node in part) for part in theirs.agent_action_partitions}
    env = parallel_env(task)
    env.reset(seed=0)
    ours = set()
    for agent in env.possible_agents:
        actions = {a: np.zeros(env.action_space(a).shape, np.float32) for a in env.agents}
        actions[agent][:] = 0.5
        env.reset(seed=0)
        env.step(actions)
        ours.add(frozenset(np.flatnonzero(env.env.unwrapped.data.ctrl).tolist()))
    assert ours == theirs


def test_local_observations_are_mamujocos():
    mamujoco = pytest.importorskip(
        "gymnasium_robotics", reason="gymnasium-robotics (requirements-dev.txt) is not installed"
    ).mamujoco_v1
    theirs = mamujoco.parallel_env("HalfCheetah", "2x3", agent_obsk=0)
    ours, vec = parallel_env("halfcheetah-local"), make_vec("halfcheetah-local", 1, 3)
    seed = int(np.random.SeedSequence(3).generate_state(1)[0])
    expected, (found, _) = theirs.reset(seed=seed)[0], ours.reset(seed=seed)
    obs = vec.reset()
    generator = np.random.default_rng(0)
    assert obs.shape == (1, 2, 11) and theirs.possible_agents == ours.possible_agents
    for _ in range(50):
        for i, agent in enumerate(ours.possible_agents):
            assert (found[agent] == expected[agent]).all()
            assert ours.observation_space(agent).contains(found[agent])
            assert (obs[0, i] == expected[agent].astype(np.float32)).all()
        joint = generator.uniform(-1, 1, (2, 3)).astype(np.float32)
        actions = dict(zip(ours.possible_agents, joint, strict=True))
        expected, their_rewards, *_ = theirs.step(actions)
        found, our_rewards, *_ = ours.step(actions)
        obs, rewards, *_ = vec.step(joint[None])
        assert our_rewards == pytest.approx(their_rewards, abs=1e-6)
        assert rewards[0] == np.float32(our_rewards["agent_0"])
    assert ours.state().shape == (17,)
    # the state is set and seen through the same agents' eyes
    state = vec.qpos_qvel()
    again = make_vec("halfcheetah-local", 1, 9)
    again.reset()
    assert (again.set_state(0, *(values[0] for values in state)) == obs[0]).all()
    # other splits: every joint is somebody's, the root everybody's
    seen = make_vec("halfcheetah-local", 1, 0, "6x1").seen
    assert seen.shape == (6, 7) and seen[:, 0].tolist() == [2, 3, 4, 5, 6, 7]


def test_usual_splits():
    vecs = {task: make_vec(task, 1, 0) for task in PLAIN}
    shapes = {task: (v.num_agents, v.action_dim, v.obs_dim) for task, v in vecs.items()}
    assert shapes == {
        "halfcheetah": (2, 3, 17),
        "walker2d": (2, 3, 17),
        "hopper": (3, 1, 11),
        "ant": (4, 2, 27),
    }
    assert all(v.max_episode_steps == 1000 for v in vecs.values())
    assert (vecs["hopper"].action_low == -1).all() and (vecs["hopper"].action_high == 1).all()


@pytest.mark.parametrize("split, shape", [("1x6", (1, 6)), ("6x1", (6, 1)), ("3x2", (3, 2))])
def test_a_split_changes_only_who_moves_what(split, shape):
    usual, other = make_vec("walker2d", 1, 7), make_vec("walker2d", 1, 7, split)
    assert (other.num_agents, other.action_dim) == shape == other.action_low.shape
    assert (usual.reset()[:, 0] == other.reset()[:, 0]).all()
    joint = np.linspace(-1, 1, 6, dtype=np.float32)
    ours = usual.step(joint.reshape(1, 2, 3))
    theirs = other.step(joint.reshape(1, *shape))
    assert (ours[-1][:, 0] == theirs[-1][:, -1]).all() and ours[1] == theirs[1]


def test_set_state_continues_a_recorded_trajectory():
    recorded, replayed = make_vec("hopper", 1, 1), make_vec("hopper", 2, 2)
    obs = recorded.reset()
    replayed.reset()
    generator = np.random.default_rng(0)
    for _ in range(100):
        qpos, qvel = recorded.qpos_qvel()
        assert qpos.dtype == qvel.dtype == np.float64
        assert (replayed.set_state(1, qpos[0], qvel[0]) == obs[0]).all()
        action = generator.uniform(-1, 1, (1, 3, 1)).astype(np.float32)
        obs, rewards, *_, final_obs = recorded.step(action)
        _, again, *_, final_again = replayed.step(np.concatenate([action, action]))
        np.testing.assert_allclose(final_again[1], final_obs[0], atol=1e-6)
        np.testing.assert_allclose(again[1], rewards[0], atol=1e-5)


def test_seeds():
    first, same, other = (make_vec("hopper", 2, seed) for seed in (1, 1, 2))
    obs = first.reset()
    assert (obs == same.reset()).all() and (obs != other.reset()).any()
    assert (obs[0] != obs[1]).any()
    second = first.reset()
    assert (second != obs).any() and (second == same.reset()).all()


def test_mujoco_prints_and_writes_nothing(tmp_path):
    code = (
        "from common.envs import TASKS, make_vec, parallel_env\n"
        "for task in (t for t in TASKS if TASKS[t].family not in ('smax', 'smac')):\n"
        "    make_vec(task, 1, 0).reset()\n"
        "    parallel_env(task).reset()\n"
        "import common.envs.mujoco\n"
        "common.envs.mujoco.make_single('halfcheetah').reset()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# --- A user's own ParallelEnv ---


class Team(ParallelEnv):
    """Two agents of unequal sizes; `end` says how an episode ends at step 3, if it does."""

    metadata = {"name": "team"}
    possible_agents = ["left", "right"]
    obs_sizes = {"left": (2,), "right": (1, 3)}
    action_sizes = {"left": (2,), "right": (1,)}

    def __init__(self, end=None, limit=None, render_mode=None):
        self.end, self.render_mode = end, render_mode
        self.received = []
        if limit is not None:
            self.max_episode_steps = limit
        self.observation_spaces = {
            a: Box(-np.inf, np.inf, s, np.float64) for a, s in self.obs_sizes.items()
        }
        self.action_spaces = {a: Box(-2.0, 3.0, s) for a, s in self.action_sizes.items()}

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def _observations(self):
        return {a: np.full(self.obs_sizes[a], self.clock + i) for i, a in enumerate(self.agents)}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.time = self.possible_agents[:], 0
        self.clock = 10.0 * self.random.integers(1000)
        return self._observations(), {a: {} for a in self.agents}

    def step(self, actions):
        for agent, action in actions.items():
            assert action in self.action_space(agent)
        self.received.append(actions)
        self.time += 1
        self.clock += 1
        ends = self.time == 3
        terminations = {a: ends and self.end == "terminated" for a in self.agents}
        # one agent alone is enough
        truncations = {a: ends and self.end == "truncated" and a == "right" for a in self.agents}
        observations = self._observations()
        if ends and self.end == "missing":
            del observations["right"]
        return observations, {"left": 1.0, "right": 3.0}, terminations, truncations, {}


def terminated_team():
    return Team("terminated")


def truncated_team():
    return Team("truncated")


def missing_team():
    return Team("missing")


def limited_team(render_mode=None):
    return Team(limit=5.0, render_mode=render_mode)


def discrete_team():
    env = Team()
    env.action_spaces["right"] = Discrete(5)
    return env


def unbounded_team():
    env = Team()
    env.action_spaces["left"] = Box(-np.inf, np.inf, (2,))
    return env


def late_team():
    env = Team()
    env.possible_agents = ["left", "right", "late"]
    env.observation_spaces["late"] = env.observation_spaces["left"]
    env.action_spaces["late"] = env.action_spaces["left"]
    env.reset = lambda seed=None, options=None: ({"left": np.zeros(2), "right": np.zeros(3)}, {})
    return env


def not_a_team():
    return gym.make("Hopper-v5")


def test_a_users_env_is_padded_and_stepped(capsys):
    vec = make_vec(f"{__name__}:limited_team", 2, 1)
    assert "padded with zeros" in capsys.readouterr().err
    assert (vec.num_envs, vec.num_agents, vec.obs_dim, vec.action_dim) == (2, 2, 3, 2)
    assert vec.max_episode_steps == 5 and isinstance(vec.max_episode_steps, int)
    assert vec.action_low.tolist() == [[-2, -2], [-2, -1]]
    assert vec.action_high.tolist() == [[3, 3], [3, 1]]
    start = vec.reset()
    clock = start[:, 0, 0]
    assert start.shape == (2, 2, 3) and clock[0] != clock[1]
    for e in range(2):
        assert start[e].tolist() == [[clock[e], clock[e], 0], [clock[e] + 1] * 3]
    actions = np.array([[[0.5, -1.0], [2.5, 9.0]], [[4.0, 0.0], [-7.0, 0.0]]], np.float32)
    for t in range(1, 6):
        obs, rewards, terminations, truncations, final_obs = vec.step(actions)
        assert (final_obs[:, 0, 0] == clock + t).all() and (final_obs[:, 0, 2] == 0).all()
        assert rewards.tolist() == [2, 2] and not terminations.any()
        assert (truncations == (t == 5)).all() and ((obs == final_obs).all() == (t < 5))
    received = [team.env.received[0] for team in vec.teams]
    assert received[0]["left"].tolist() == [0.5, -1] and received[0]["right"].tolist() == [2.5]
    assert received[1]["left"].tolist() == [3, 0] and received[1]["right"].tolist() == [-2]
    # the next episode goes on with the same generator
    team = Team()
    team.reset(seed=int(np.random.SeedSequence(1).generate_state(2)[0]))
    assert obs[0, 0, 0] == team.reset()[0]["left"][0]
    assert vec.step(actions)[-1][0, 0, 0] == obs[0, 0, 0] + 1


@pytest.mark.parametrize("end", ["terminated", "truncated", "missing"])
def test_one_agents_end_is_the_teams(end):
    vec = make_vec(f"{__name__}:{end}_team", 1, 0)
    assert vec.max_episode_steps == 1000
    start = vec.reset()
    for t in range(1, 4):
        obs, _, terminations, truncations, final_obs = vec.step(np.zeros((1, 2, 2)))
        assert (terminations[0], truncations[0]) == (
            t == 3 and end != "truncated",
            t == 3 and end == "truncated",
        )
    assert final_obs[0, 0, 0] == start[0, 0, 0] + 3
    assert obs[0, 0, 0] != final_obs[0, 0, 0]


def test_parallel_env_of_a_users_factory():
    assert isinstance(parallel_env(f"{__name__}:limited_team"), Team)
    assert parallel_env(f"{__name__}:limited_team", render_mode="human").render_mode == "human"


# --- Errors and scores ---


@pytest.mark.parametrize(
    "task, split, words",
    [
        ("halfcheeta", None, ["'halfcheeta'", "did you mean halfcheetah"]),
        ("humanoid", None, ["'humanoid'", "package.module:factory"]),
        ("hopper", "2x3", ["'2x3'", "3 joints", "1x3, 3x1"]),
        ("ant", "banana", ["'banana'", "1x8, 2x4, 4x2, 8x1"]),
        ("no_such_module:make", None, ["no_such_module", "PYTHONPATH"]),
        (":make", None, ["package.module:factory"]),
        (f"{__name__}:limited_tem", None, ["'limited_tem'", "did you mean limited_team"]),
        (f"{__name__}:limited_team", "2x3", ["--split 2x3", "its agents are its own"]),
        ("navigation", "1x2", ["--split 1x2", "navigation has no joints"]),
        ("simple-tag", "3x1", ["--split 3x1", "simple-tag has no joints"]),
        (f"{__name__}:discrete_team", None, ["action spaces differ", "Discrete(5)"]),
        (f"{__name__}:unbounded_team", None, ["'left'", "finite bounds"]),
        (f"{__name__}:not_a_team", None, ["expected a pettingzoo.ParallelEnv"]),
    ],
)
def test_errors_name_the_value_and_what_was_expected(task, split, words):
    with pytest.raises(InputError) as error:
        make_vec(task, 1, 0, split)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert str(error.value).count("\n") <= 1


def test_an_agent_must_be_there_from_the_start():
    env = make_vec(f"{__name__}:late_team", 1, 0)
    with pytest.raises(InputError, match="'late'"):
        env.reset()


@pytest.mark.parametrize("num_envs, seed", [(0, 0), (-1, 0), (1, -1)])
def test_counts_and_seeds_are_checked(num_envs, seed):
    with pytest.raises(InputError, match="expected"):
        make_vec("hopper", num_envs, seed)


def test_normalized_score():
    assert normalized_score("hopper", 3234.3) == pytest.approx(100)
    assert normalized_score("halfcheetah", [-280.178953, 12135.0]) == pytest.approx([0, 100])
    assert (
        np.isnan(normalized_score(f"{__name__}:limited_team", np.zeros(3))).tolist() == [True] * 3
    )
    with pytest.raises(InputError):
        normalized_score("hoper", 1.0)


def test_scores_on_omars_data():
    scores = normalized_score("halfcheetah-local", [-286.2, 1649.2])
    assert scores == pytest.approx([0, 100])
    scores = normalized_score("halfcheetah-local", [-283.97, 3568.81], omar_data=True)
    assert scores == pytest.approx([0, 100])
    pairs = {task: pair for task, pair in OMAR_RETURNS.items() if task != "halfcheetah-local"}
    assert pairs == {
        "simple-spread": (159.8, 516.8),
        "simple-tag": (-4.1, 185.6),
        "simple-world": (-6.8, 79.5),
    }
    assert normalized_score("hopper", 3234.3, omar_data=True) == pytest.approx(100)  # has none
