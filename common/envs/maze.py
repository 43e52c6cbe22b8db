"""D4RL's maze2d, sparse: one agent, a ball moved by a force, gets 1 for each step that ends within
0.5 of a fixed goal.

`maze2d-umaze`, `maze2d-medium` and `maze2d-large`. The simulator is gymnasium-robotics' PointMaze,
whose ball and walls are D4RL's; starts, goal, reward, time limit and coordinates are D4RL's, not
PointMaze's. The observation is (x, y) and the velocity (vx, vy): in the maze's rows and columns,
counted downwards and to the right, with the middle of cell (i, j) at (i - 0.2, j - 0.2).
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

from common import InputError
from common.envs.mujoco import mujoco  # MuJoCo's warnings as that file wants them
from common.envs.tasks import AGENT_COLOURS, TASKS
from common.envs.vec import VecEnv

REACH = 0.5
"""at most so far from the goal a step is rewarded"""
OFFSET = 0.2
"""D4RL's ball starts at 1.2 where its walls start at 1: its coordinates are a cell's minus this"""


def point_maze(task: str, render_mode: str | None = None) -> Any:
    """gymnasium-robotics' simulator of a task's maze. Raises InputError if it is not installed."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a notice about other environments
            from gymnasium_robotics.envs.maze import maps
            from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv
    except ImportError as error:
        hint = "pip install gymnasium-robotics==1.4.2"
        raise InputError(f"{task} needs gymnasium-robotics: {hint}") from error
    env = PointMazeEnv(maze_map=getattr(maps, TASKS[task].env_id), render_mode=render_mode)
    Path(env.tmp_xml_file_path).unlink(missing_ok=True)  # it leaves one behind per environment
    return env


class MazeTeam:
    """One team for VecEnv; VecEnv keeps the time limit.

    Positions, velocities and forces (2,) are D4RL's; the simulator's axes are the columns and, from
    below, the rows.
    """

    num_agents = 1
    obs_dim = 4
    action_high = np.ones((1, 2), dtype=np.float32)
    action_low = -action_high

    def __init__(self, task: str, render_mode: str | None = None):
        self.env = point_maze(task, render_mode)
        self.simulator = self.env.point_env
        maze, options = self.env.maze, TASKS[task].kwargs
        self.cells = [tuple(cell) for cell in np.argwhere(np.array(maze.maze_map) == 0).tolist()]
        """the free cells (row, column)"""
        self.goal = np.array(options["goal"], dtype=np.float64)
        self.max_episode_steps = options["limit"]
        middle = maze.cell_rowcol_to_xy(np.zeros(2))  # of cell (0, 0), for the simulator
        self.origin = middle + np.array([OFFSET, -OFFSET])
        self.rng = np.random.default_rng()

    def reset(self, seed: int | None) -> np.ndarray:
        """Start in a free cell, the goal's included -> obs (4,)."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        position = self.cells[self.rng.integers(len(self.cells))] + self.rng.uniform(-0.1, 0.1, 2)
        return self.set_state(position, 0.1 * self.rng.standard_normal(2))

    def set_state(self, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        """Go on from a position and velocity (2,) each -> obs (4,)."""
        (x, y), (vx, vy) = position, velocity
        self.simulator.set_state(self.origin + np.array([y, -x]), np.array([vy, -vx]))
        return self.observe()

    def observe(self) -> np.ndarray:
        """(x, y, vx, vy) float64."""
        (right, up), (v_right, v_up) = self.simulator.data.qpos, self.simulator.data.qvel
        return np.array([self.origin[1] - up, right - self.origin[0], -v_up, v_right])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        x, y = actions.ravel()
        self.simulator.step(np.array([y, -x]))  # which clips the force and the velocity
        obs = self.observe()
        near = (obs[0] - self.goal[0]) ** 2 + (obs[1] - self.goal[1]) ** 2 <= REACH**2
        return obs, float(near), False, False

    def close(self) -> None:
        self.env.close()


def make_vec(task: str, num_envs: int, seed: int) -> VecEnv:
    """See `common.envs.make_vec`."""
    return VecEnv([MazeTeam(task) for _ in range(num_envs)], seed)


# --- PettingZoo ---


class MazeParallelEnv(ParallelEnv):
    """A maze for PettingZoo: a team of one, called agent_0."""

    def __init__(self, task: str, render_mode: str | None = None):
        self.team = MazeTeam(task, render_mode)
        self.render_mode = render_mode
        self.metadata = {**self.team.env.metadata, "name": task}
        self.max_episode_steps = self.team.max_episode_steps
        self.possible_agents, self.agents = ["agent_0"], []
        self.box = Box(-np.inf, np.inf, (4,), np.float64)
        self.force = Box(self.team.action_low[0], self.team.action_high[0])
        self.elapsed = 0
        if render_mode is not None:
            self._stage()

    def _stage(self) -> None:
        """For pictures: the ball in its agent's colour, PointMaze's red sphere at the goal, seen
        from above."""
        team, model = self.team, self.team.simulator.model
        size = max(team.env.maze.map_length, team.env.maze.map_width)
        camera = {"distance": 1.25 * size, "elevation": -90, "azimuth": 90, "lookat": np.zeros(3)}
        team.simulator.mujoco_renderer.default_cam_config = camera
        x, y = team.goal
        team.env.goal = team.origin + np.array([y, -x])
        team.env.update_target_site_pos()
        site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "particle_site")
        model.site_rgba[site] = (*np.array(AGENT_COLOURS[0]) / 255, 1)

    def observation_space(self, agent: str) -> Box:
        return self.box

    def action_space(self, agent: str) -> Box:
        return self.force

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents, self.elapsed = self.possible_agents[:], 0
        return {"agent_0": self.team.reset(seed)}, {"agent_0": {}}

    def step(self, actions: dict[str, np.ndarray]) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            warnings.warn("the episode has ended: call reset first", stacklevel=2)
            return {}, {}, {}, {}, {}
        obs, reward, terminated, _ = self.team.step(actions["agent_0"])
        self.elapsed += 1
        truncated = self.elapsed >= self.max_episode_steps
        if truncated:
            self.agents = []
        return tuple({"agent_0": value} for value in (obs, reward, terminated, truncated, {}))

    def state(self) -> np.ndarray:
        """(4,): what the agent observes."""
        return self.team.observe()

    def render(self) -> np.ndarray | None:
        return self.team.simulator.render()

    def close(self) -> None:
        self.team.close()


def parallel_env(task: str, render_mode: str | None = None) -> MazeParallelEnv:
    """See `common.envs.parallel_env`."""
    return MazeParallelEnv(task, render_mode)
