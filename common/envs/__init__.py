"""The tasks, and how a task is stepped as a batch of teams.

`TASKS` is the table; each family of tasks is a file beside this one, with `make_vec` and
`parallel_env`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from common import InputError, nearest


@dataclass(frozen=True)
class Task:
    """A row of the table: how the task is built, and the returns its scores are measured by."""

    family: str
    """the file of this folder that builds the task"""
    env_id: str
    """Gymnasium's name, or the name that the family has for it"""
    split: str = ""
    """the usual partition of the joints, AGENTSxJOINTS"""
    random_return: float | None = None
    """reference return of a random policy (score 0): D4RL's, or docs/environments.md's"""
    expert_return: float | None = None
    """reference return of an expert (score 100)"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of `gymnasium.make`, or of the task's class"""
    local: bool = False
    """each agent observes its own joints instead of the full state"""
    win_return: float | None = None
    """an episode with at least this return is won; None: nothing is won or lost"""


# Returns of uniform actions and of scripted play, measured by benchmarks/particle.py
COOPERATIVE_NAVIGATION = {
    2: (-39.7, -7.8),
    3: (-48.8, -9.2),
    4: (-56.1, -10.2),
    5: (-62.2, -10.9),
    6: (-67.5, -11.4),
    7: (-73.5, -11.9),
    8: (-78.5, -12.3),
    9: (-82.9, -12.5),
    10: (-87.2, -12.7),
}
# Returns of uniform actions and of the expert of the built-in data, from
# docs/results/team_evaluation.csv
SIMPLE_SPREAD = {1: (32.6, 200.9), 2: (90.9, 392.9), 4: (246.2, 476.2), 5: (335.9, 394.6)}
# SMAX's maps on which the allies are of one type, and SMAC's. A victory pays 1 in SMAX, all damage
# together 1 as well; in SMAC with its default rewards a victory brings the return to 20.
SMAX_MAPS = ("3m", "8m", "25m", "5m_vs_6m", "10m_vs_11m", "27m_vs_30m", "3s_vs_5z", "6h_vs_8z")
SMAC_MAPS = (
    "3m 8m 25m 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m 2m_vs_1z 2s_vs_1sc 3s_vs_3z 3s_vs_4z "
    "3s_vs_5z 6h_vs_8z 2c_vs_64zg corridor so_many_baneling"
).split()
TASKS = {
    "halfcheetah": Task("mujoco", "HalfCheetah-v5", "2x3", -280.178953, 12135.0),
    # v5's own model has another friction on the right foot than the one D4RL's data comes from
    "walker2d": Task(
        "mujoco", "Walker2d-v5", "2x3", 1.629008, 4592.3, {"xml_file": "walker2d.xml"}
    ),
    "hopper": Task("mujoco", "Hopper-v5", "3x1", -20.272305, 3234.3),
    # D4RL's contact forces are all zero, and so is what they cost
    "ant": Task(
        "mujoco",
        "Ant-v5",
        "4x2",
        -325.6,
        3879.7,
        {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0},
    ),
    # Returns of the built-in random and expert data, from docs/results/team_datasets.csv
    "halfcheetah-local": Task("mujoco", "HalfCheetah-v5", "2x3", -286.2, 1649.2, local=True),
    # D4RL's goals and horizons; its reference returns (docs/environments.md)
    "maze2d-umaze": Task("maze", "U_MAZE", "", 23.85, 161.86, {"goal": (1, 1), "limit": 300}),
    "maze2d-medium": Task("maze", "MEDIUM_MAZE", "", 13.13, 277.39, {"goal": (6, 6), "limit": 600}),
    "maze2d-large": Task("maze", "LARGE_MAZE", "", 6.7, 273.99, {"goal": (7, 9), "limit": 800}),
    "predator-prey": Task("particle", "predator-prey", "", 0.07, 26.8),
    # Ten per episode whose landmark was reached, so that the score is a percentage
    "navigation": Task("particle", "navigation", "", 0.0, 10.0),
    **{
        f"cooperative-navigation-{n}": Task(
            "particle",
            "cooperative-navigation",
            "",
            *references,
            kwargs={"num_agents": n},
        )
        for n, references in COOPERATIVE_NAVIGATION.items()
    },
    "simple-spread": Task("mpe", "simple-spread", "", 162.3, 508.6),
    **{
        f"simple-spread-{n}": Task(
            "mpe", "simple-spread", "", *references, kwargs={"num_agents": n}
        )
        for n, references in SIMPLE_SPREAD.items()
    },
    "simple-tag": Task("mpe", "simple-tag", "", -6.6, 187.4),
    "simple-world": Task("mpe", "simple-world", "", -8.2, 64.2),
    **{name: Task("smax", name, win_return=1.5) for name in SMAX_MAPS},
    # Returns of random actions and of the last policy of the built-in data's training, from
    # docs/results/smax_evaluation.csv
    "5m_vs_6m": Task("smax", "5m_vs_6m", "", 0.137, 1.602, win_return=1.5),
    **{f"smac-{name}": Task("smac", name, win_return=19.99) for name in SMAC_MAPS},
}

# OMAR's (random, expert) returns, as MADiff's appendix G.1 and, for HalfCheetah, other users of its
# data give them: scores of runs on that data
OMAR_RETURNS = {
    "simple-spread": (159.8, 516.8),
    "simple-tag": (-4.1, 185.6),
    "simple-world": (-6.8, 79.5),
    "halfcheetah-local": (-283.97, 3568.81),
}

# Families whose teams step together as arrays
BATCHED = ("particle", "mpe", "smax")

# Of agents 0, 1, ... in every picture (Matplotlib's ten)
AGENT_COLOURS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)


class VecEnv:
    """E teams stepped one after another; the step that ends an episode starts the next.

    A team has `num_agents`, `obs_dim`, `action_low` and `action_high` (N, action_dim),
    `max_episode_steps`, `reset(seed) -> obs`, `close()` and
    `step(actions (N, action_dim)) -> obs, reward, terminated, truncated`;
    its obs is (N, obs_dim), or (obs_dim,) where all agents see the same.

    Where a team has `discrete = True`, its actions are one-hot, and the last `action_dim` entries
    of an agent's obs say which are legal: 1 or 0, all 0 once the agent is dead. Whatever it is
    given, the environment plays the legal action with the largest entry.
    """

    discrete = False

    def __init__(self, teams: Sequence, seed: int):
        self.teams = teams
        self.num_envs = len(teams)
        self.num_agents = teams[0].num_agents
        self.obs_dim = teams[0].obs_dim
        self.action_low, self.action_high = teams[0].action_low, teams[0].action_high
        self.action_dim = self.action_low.shape[1]
        self.max_episode_steps = teams[0].max_episode_steps
        self.discrete = getattr(teams[0], "discrete", False)
        unit_box = bool((self.action_low == -1).all() and (self.action_high == 1).all())
        self.unit_box = unit_box or self.discrete  # actions are played as the learners have them
        self.first_seed = seed
        self.elapsed = np.zeros(self.num_envs, dtype=np.int64)  # steps of each running episode

    def reset(self, seed: int | tuple[int, ...] | None = None) -> np.ndarray:
        """Start an episode in every team -> obs (E, N, obs_dim) float32.

        With a seed (also the first time, with that of `make_vec`), team e is seeded with number e
        of `np.random.SeedSequence(seed).generate_state(E)`; without, its generator goes on.
        """
        seed, self.first_seed = (self.first_seed if seed is None else seed), None
        seeds = [None] * self.num_envs
        if seed is not None:
            seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()
        return self.restart(seeds)

    def restart(self, seeds: list[int | None]) -> np.ndarray:
        """`reset` with each team's own seed, or None for its generator to go on."""
        obs = np.empty((self.num_envs, self.num_agents, self.obs_dim), dtype=np.float32)
        for e, team in enumerate(self.teams):
            obs[e] = team.reset(seeds[e])
        self.elapsed[:] = 0
        return obs

    def to_box(self, actions: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], as the learners have them, in the agents' boxes: (..., N, A)."""
        if self.unit_box:
            return actions
        return self.action_low + (actions + 1) / 2 * (self.action_high - self.action_low)

    def from_box(self, actions: np.ndarray) -> np.ndarray:
        """The inverse of `to_box`."""
        if self.unit_box:
            return actions
        return 2 * (actions - self.action_low) / (self.action_high - self.action_low) - 1

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of every team with actions (E, N, action_dim).

        Returns obs (E, N, obs_dim) float32, rewards (E,) float32, terminations (E,) bool,
        truncations (E,) bool (the time limit) and final_obs (E, N, obs_dim): the true next
        observation. Where an episode ended, obs is the first one of the next episode; elsewhere
        it equals final_obs.
        """
        actions = np.asarray(actions, dtype=np.float32)
        final_obs = np.empty((self.num_envs, self.num_agents, self.obs_dim), dtype=np.float32)
        rewards = np.empty(self.num_envs, dtype=np.float32)
        terminations = np.empty(self.num_envs, dtype=bool)
        truncations = np.empty(self.num_envs, dtype=bool)
        for e, team in enumerate(self.teams):
            final_obs[e], rewards[e], terminations[e], truncations[e] = team.step(actions[e])
        self.elapsed += 1
        truncations |= self.elapsed >= self.max_episode_steps
        obs = final_obs.copy()
        for e in np.flatnonzero(terminations | truncations):
            obs[e] = self.teams[e].reset(None)
            self.elapsed[e] = 0
        return obs, rewards, terminations, truncations, final_obs

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """Say that the steps to come are those of deployment k of K, for the tasks that change
        between deployments; 0 is the world of the offline data, K + 1 the evaluation of pi^K.

        Handed to the teams that have a method of this name; most tasks have none and stay the same.
        """
        for team in self.teams:
            if hasattr(team, "set_deployment"):
                team.set_deployment(k, num_deployments)

    def close(self) -> None:
        for team in self.teams:
            team.close()


def make_vec(
    task: str, num_envs: int, seed: int, split: str | None = None, num_workers: int | None = 0
) -> VecEnv:
    """`num_envs` teams of `task`: a name of `TASKS`, or `package.module:factory` of a ParallelEnv.

    `num_workers` further processes share the stepping with this one; None: one per further core,
    where every process then has two teams or more. The numbers are the same. Tasks that step as one
    batch, the particle tasks, need none.
    Team e's first reset is seeded with number e of
    `np.random.SeedSequence(seed).generate_state(num_envs)`; later ones go on with its generator.
    Raises InputError for an unknown task or split, and for a ParallelEnv that cannot be used.
    """
    if num_envs < 1:
        raise InputError(f"num_envs is {num_envs}, expected at least 1")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    family = _family(task)
    if num_workers is None:
        num_workers = min(num_cores(), num_envs // 2) - 1 if task in TASKS else 0
    is_batched = task in TASKS and TASKS[task].family in BATCHED
    if num_workers > 0 and num_envs > 1 and not is_batched:
        from common.envs.workers import WorkerVecEnv

        return WorkerVecEnv(task, num_envs, seed, split, num_workers)
    return family.make_vec(task, num_envs, seed, **_joints(task, split))


def num_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def parallel_env(task: str, split: str | None = None, render_mode: str | None = None):
    """`task` as a `pettingzoo.ParallelEnv`; the agents of `TASKS` are called agent_0, agent_1, ...

    Raises InputError for an unknown task or split.
    """
    return _family(task).parallel_env(task, render_mode=render_mode, **_joints(task, split))


def win_rate(task: str, returns: list[float]) -> float | None:
    """Share of episodes that were won, by their returns; None where nothing is won or lost."""
    row = TASKS.get(task)
    if row is None or row.win_return is None:
        return None
    return float(np.mean(np.asarray(returns) >= row.win_return))


def choose(actions: np.ndarray, legal: np.ndarray, idle: int) -> np.ndarray:
    """The number of the legal action with the largest entry: both (..., action_dim) -> (...) int32;
    `idle` where none is legal."""
    best = np.where(legal, actions, -np.inf).argmax(axis=-1)
    return np.where(legal.any(axis=-1), best, idle).astype(np.int32)


def normalized_score(task: str, returns: np.ndarray | float, omar_data: bool = False) -> np.ndarray:
    """Score of `returns` (any shape): random 0, expert 100; nan where the task has neither.

    With `omar_data`, of a run on OMAR's released data: by `OMAR_RETURNS`, where the task is there.
    """
    _family(task)
    row = TASKS.get(task)
    low, high = (row.random_return, row.expert_return) if row else (None, None)
    if omar_data and task in OMAR_RETURNS:
        low, high = OMAR_RETURNS[task]
    if low is None or high is None:
        return np.full(np.shape(returns), np.nan)
    return 100 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)


def _family(task: str) -> ModuleType:
    if ":" in task:
        return import_module("common.envs.parallel")
    if task not in TASKS:
        hint = nearest(task, TASKS)
        raise InputError(f"unknown task {task!r}: {hint} (or package.module:factory)")
    return import_module(f"common.envs.{TASKS[task].family}")


def _joints(task: str, split: str | None) -> dict[str, str]:
    """The argument of the families whose agents share the joints of a robot."""
    if split is None:
        return {}
    if task not in TASKS or not TASKS[task].split:
        raise InputError(f"--split {split}: {task} has no joints to divide, its agents are its own")
    return {"split": split}
