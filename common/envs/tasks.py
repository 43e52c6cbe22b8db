"""The table of tasks, and what their returns are measured by."""

from dataclasses import dataclass, field
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
    views: tuple[tuple[int, ...], ...] = ()
    """entries of the full state that each agent observes; (): all, unless the task is local"""
    actuators: tuple[int, ...] = ()
    """the robot's actuators in the order in which the agents share them; (): its own"""
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
# docs/results/datasets/team_evaluation.csv
SIMPLE_SPREAD = {1: (32.6, 200.9), 2: (90.9, 392.9), 4: (246.2, 476.2), 5: (335.9, 394.6)}
# SMAX's maps on which the allies are of one type, and SMAC's. A victory pays 1 in SMAX, all damage
# together 1 as well; in SMAC with its default rewards a victory brings the return to 20.
SMAX_MAPS = ("3m", "8m", "25m", "5m_vs_6m", "10m_vs_11m", "27m_vs_30m", "3s_vs_5z", "6h_vs_8z")
SMAC_MAPS = (
    "3m 8m 25m 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m 2m_vs_1z 2s_vs_1sc 3s_vs_3z 3s_vs_4z "
    "3s_vs_5z 6h_vs_8z 2c_vs_64zg corridor so_many_baneling"
).split()
# A shield that has regenerated pays anew: a return of 20 is no victory
SMAC_SHIELDS = ("2m_vs_1z", "3s_vs_3z", "3s_vs_4z", "3s_vs_5z", "6h_vs_8z")
# Returns of an untrained policy and of the experts behind Barde et al.'s data, whose scores are
# shares of the expert's. Entries of the state: cosines and sines of both joints' angles, target x
# and y, both velocities, fingertip minus target
REACHER = "mujoco", "Reacher-v5", "2x1", -11.144625, -4.2370844
INNER, OUTER, TARGET = (0, 2, 6), (1, 3, 7), (4, 5)
# Of Ant's state: per leg hip and ankle, angle and velocity each; torso height, orientation, angular
# and linear velocity. And the legs' actuators, which begin with leg 4's
LEGS = tuple((5 + 2 * k, 19 + 2 * k, 6 + 2 * k, 20 + 2 * k) for k in range(4))
TORSO = (0, 1, 2, 3, 4, 16, 17, 18, 13, 14, 15)
ANT = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}
TASKS = {
    "halfcheetah": Task("mujoco", "HalfCheetah-v5", "2x3", -280.178953, 12135.0),
    # v5's own model has another friction on the right foot than the one D4RL's data comes from
    "walker2d": Task(
        "mujoco", "Walker2d-v5", "2x3", 1.629008, 4592.3, {"xml_file": "walker2d.xml"}
    ),
    "hopper": Task("mujoco", "Hopper-v5", "3x1", -20.272305, 3234.3),
    # D4RL's contact forces are all zero, and so is what they cost
    "ant": Task("mujoco", "Ant-v5", "4x2", -325.6, 3879.7, ANT),
    # Each agent sees and moves the same leg, the first one also sees the torso
    "ant-local": Task(
        "mujoco",
        "Ant-v5",
        "4x2",
        -325.6,
        3879.7,
        ANT,
        views=(TORSO + LEGS[0], *LEGS[1:]),
        actuators=(2, 3, 4, 5, 6, 7, 0, 1),
    ),
    "reacher-full": Task(*REACHER),
    "reacher-independent": Task(*REACHER, views=(INNER + TARGET, OUTER + TARGET)),
    "reacher-leader": Task(*REACHER, views=(INNER + OUTER + TARGET, INNER + OUTER)),
    # Returns of the built-in random and expert data, from docs/results/datasets/team_datasets.csv
    "halfcheetah-local": Task("mujoco", "HalfCheetah-v5", "2x3", -286.2, 1649.2, local=True),
    # D4RL's goals and horizons; its reference returns (docs/environments.md)
    "maze2d-umaze": Task("maze", "U_MAZE", "", 23.85, 161.86, {"goal": (1, 1), "limit": 300}),
    "maze2d-medium": Task("maze", "MEDIUM_MAZE", "", 13.13, 277.39, {"goal": (6, 6), "limit": 600}),
    "maze2d-large": Task("maze", "LARGE_MAZE", "", 6.7, 273.99, {"goal": (7, 9), "limit": 800}),
    # Uniform actions, and full agreement
    **{f"bandit-{n}": Task("bandit", "", "", 0.0, 1.0, {"num_agents": n}) for n in (2, 3)},
    "predator-prey": Task("particle", "predator-prey", "", 0.07, 26.8),
    # Of today's world: uniform actions, and the best reply to the partner
    "wind": Task("particle", "wind", "", 0.21, 20.7),
    "wind-grid": Task("grid", "wind-grid", "", 0.53, 46.1),
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
    # The score is the percentage of agreement; -joint: one agent chooses for both
    "coordination-game": Task("matrix_game", "coordination-game", "", 0.0, 1.0),
    "coordination-game-joint": Task(
        "matrix_game", "coordination-game", "", 0.0, 1.0, kwargs={"joint": True}
    ),
    **{name: Task("smax", name, win_return=1.5) for name in SMAX_MAPS},
    # Returns of random actions and of the last policy of the built-in data's training, from
    # docs/results/datasets/smax_evaluation.csv
    "5m_vs_6m": Task("smax", "5m_vs_6m", "", 0.137, 1.602, win_return=1.5),
    **{
        f"smac-{name}": Task("smac", name, win_return=None if name in SMAC_SHIELDS else 19.99)
        for name in SMAC_MAPS
    },
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
BATCHED = ("particle", "mpe", "smax", "bandit")

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


def check_task(task: str) -> None:
    """Raises InputError for a name that is neither in `TASKS` nor package.module:factory."""
    if ":" not in task and task not in TASKS:
        hint = nearest(task, TASKS)
        raise InputError(f"unknown task {task!r}: {hint} (or package.module:factory)")


def win_rate(task: str, returns: list[float]) -> float | None:
    """Share of episodes that were won, by their returns; None where nothing is won or lost."""
    row = TASKS.get(task)
    if row is None or row.win_return is None:
        return None
    return float(np.mean(np.asarray(returns) >= row.win_return))


def normalized_score(
    task: str,
    returns: np.ndarray | float,
    omar_data: bool = False,
    references: tuple[float, float] | None = None,
) -> np.ndarray:
    """Score of `returns` (any shape): random 0, expert 100; nan where the task has neither.

    With `omar_data`, of a run on OMAR's released data: by `OMAR_RETURNS`, where the task is there.
    `references` are an own task's returns of score 0 and 100.
    """
    check_task(task)
    row = TASKS.get(task)
    low, high = (row.random_return, row.expert_return) if row else references or (None, None)
    if omar_data and task in OMAR_RETURNS:
        low, high = OMAR_RETURNS[task]
    if low is None or high is None:
        return np.full(np.shape(returns), np.nan)
    return 100 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)
