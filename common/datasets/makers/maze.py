"""The built-in data of the mazes: a controller walks to one random goal after another, in pieces.

As in D4RL: a proportional-derivative controller follows the shortest path through the middles of
cells, its actions are noisy, and it goes on from where it is when it has reached its goal or the
time limit has passed; such a row has `timeouts`, none is terminal. `rewards` are the task's, for
its own fixed goal.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import h5py
import mujoco
import numpy as np

from common.datasets.makers.workers import write_pieces
from common.envs.maze import OFFSET, MazeTeam

VERSION = 1
"""names the files; another one where their content changes"""
P_GAIN, D_GAIN = 10.0, -1.0
CLOSE = 0.1
"""a waypoint within this distance has been reached"""
NOISE = 0.5
"""standard deviation of what is added to the data's actions, which are then clipped to [-1, 1]"""
PIECE_ROWS = 10_000
"""rows of a walk, a piece of work; a file depends on it"""

Cell = tuple[int, int]


def shortest_path(cells: list[Cell], start: Cell, goal: Cell) -> list[Cell]:
    """The cells after `start` up to `goal`, each beside the one before; [goal] where it is both."""
    following, queue = {goal: goal}, deque([goal])
    while start not in following:
        cell = queue.popleft()
        for move in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            beside = cell[0] + move[0], cell[1] + move[1]
            if beside in cells and beside not in following:
                following[beside] = cell
                queue.append(beside)
    path = [following[start]]
    while path[-1] != goal:
        path.append(following[path[-1]])
    return path


class Controller:
    """Walks a maze's ball to a goal cell. Waypoints on the way are drawn by `rng` between a cell's
    middle and its coordinates, as D4RL's are."""

    def __init__(self, cells: list[Cell], rng: np.random.Generator):
        self.cells, self.rng = cells, rng
        self.waypoints: list[np.ndarray] = []

    def walk_to(self, goal: Cell, position: np.ndarray) -> None:
        """Plan a path from a position (2,)."""
        row, column = np.round(position + OFFSET).astype(int).tolist()
        path = shortest_path(self.cells, (row, column), goal)
        self.waypoints = [cell - self.rng.uniform(0, OFFSET, 2) for cell in path[:-1]]
        self.waypoints.append(np.array(goal, dtype=np.float64))

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, bool]:
        """The force (2,) in [-1, 1] at obs (4,), and whether the goal has been reached."""
        ahead = self.waypoints[0] - obs[:2]
        close = bool(ahead @ ahead < CLOSE**2)
        if close and len(self.waypoints) > 1:
            self.waypoints.pop(0)
            return self.act(obs)
        return np.clip(P_GAIN * ahead + D_GAIN * obs[2:], -1, 1), close


@dataclass
class Walk:
    """A piece of work: so many rows of a task's data, from a fresh start."""

    task: str
    seed: np.random.SeedSequence
    rows: int

    def roll(self) -> dict[str, np.ndarray]:
        """The rows, D4RL's keys; the last one has `timeouts`, reached or not."""
        team, rng = MazeTeam(self.task), np.random.default_rng(self.seed)
        controller = Controller(team.cells, rng)
        obs = np.empty((self.rows + 1, 4), dtype=np.float64)
        goals, actions = np.empty((2, self.rows, 2), dtype=np.float32)
        rewards = np.empty(self.rows, dtype=np.float32)
        timeouts = np.zeros(self.rows, dtype=bool)
        noise = NOISE * rng.standard_normal((self.rows, 2))
        obs[0] = team.reset(int(rng.integers(2**32)))
        elapsed, goal = 0, None
        for t in range(self.rows):
            if goal is None:
                goal, elapsed = team.cells[rng.integers(len(team.cells))], 0
                controller.walk_to(goal, obs[t, :2])
            action, reached = controller.act(obs[t])
            goals[t], actions[t] = goal, np.clip(action + noise[t], -1, 1)
            obs[t + 1], rewards[t], _, _ = team.step(actions[t])
            elapsed += 1
            if reached or elapsed == team.max_episode_steps:
                timeouts[t], goal = True, None
        timeouts[-1] = True
        team.close()
        states = obs.astype(np.float32)
        return {
            "observations": states[:-1],
            "actions": actions,
            "rewards": rewards,
            "next_observations": states[1:],
            "terminals": np.zeros(self.rows, dtype=bool),
            "timeouts": timeouts,
            "infos/goal": goals,
            "infos/qpos": obs[:-1, :2],
            "infos/qvel": obs[:-1, 2:],
        }


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file."""
    starts = range(0, size, PIECE_ROWS)
    seeds = np.random.SeedSequence(0).spawn(len(starts))
    pieces = [
        Walk(task, seed, min(PIECE_ROWS, size - start))
        for start, seed in zip(starts, seeds, strict=True)
    ]
    write_pieces(file, pieces, size, bar, num_workers)
    file["metadata/algorithm"] = "waypoint controller"
    for module in (mujoco, np):
        file[f"metadata/versions/{module.__name__}"] = module.__version__
