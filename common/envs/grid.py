"""`wind-grid`: the team of benchmarks.tabular_team as a task, the discrete brother of `wind`.

One agent pushes a token on a grid towards a goal; a partner that is no learner pushes it as well,
and is not seen. In the data the partner acts at random. From `set_deployment(1)` on it has a
policy, another push in every cell, drawn once and for all. Not the paper's.
"""

import warnings

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

from common import InputError
from common.envs.parallel import ParallelTeam
from common.envs.particle import blank, disc
from common.envs.tasks import AGENT_COLOURS
from common.envs.vec import VecEnv

SIZE, STEPS = 13, 50
MOVES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
PUSH = 2
"""cells that either's action moves the token"""
GOAL = np.array([SIZE - 3, SIZE - 3])


def policy() -> np.ndarray:
    """The partner's action of today in every cell, (SIZE, SIZE)."""
    return np.random.default_rng(0).integers(len(MOVES), size=(SIZE, SIZE))


class WindGrid(ParallelEnv):
    """The task for PettingZoo. Its agent sees the token's row and column, one-hot each, (26,), and
    chooses of staying and the four directions; a step that ends on the goal or beside it pays 1."""

    max_episode_steps = STEPS

    def __init__(self, render_mode: str | None = None):
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode {render_mode!r}: wind-grid has only rgb_array")
        self.metadata = {"name": "wind-grid", "render_modes": ["rgb_array"], "render_fps": 4}
        self.render_mode, self.possible_agents = render_mode, ["agent_0"]
        self.agents: list[str] = []
        self.observation_spaces = {"agent_0": Box(0, 1, (2 * SIZE,), np.float32)}
        self.action_spaces = {"agent_0": Discrete(len(MOVES))}
        self.policy, self.has_policy = policy(), False
        self.random = np.random.default_rng()

    def observation_space(self, agent: str) -> Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Discrete:
        return self.action_spaces[agent]

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """The partner's policy is the same in all deployments; in 0 it acts at random."""
        self.has_policy = k >= 1

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.elapsed = self.possible_agents[:], 0
        self.cell = self.random.integers(SIZE, size=2)
        return self._observe(), {"agent_0": {}}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            warnings.warn("the episode has ended: call reset first", stacklevel=2)
            return {}, {}, {}, {}, {}
        partners = self.policy[tuple(self.cell)]
        if not self.has_policy:
            partners = self.random.integers(len(MOVES))
        push = MOVES[int(actions["agent_0"])] + MOVES[partners]
        self.cell = np.clip(self.cell + PUSH * push, 0, SIZE - 1)
        self.elapsed += 1
        reward = float(np.abs(self.cell - GOAL).sum() <= 1)
        over = self.elapsed == STEPS
        obs = self._observe()
        self.agents = [] if over else self.agents
        return obs, {"agent_0": reward}, {"agent_0": False}, {"agent_0": over}, {"agent_0": {}}

    def _observe(self) -> dict[str, np.ndarray]:
        return {"agent_0": self.state()}

    def state(self) -> np.ndarray:
        """What the agent observes."""
        return np.eye(SIZE, dtype=np.float32)[self.cell].ravel()

    def render(self) -> np.ndarray | None:
        """A picture (240, 240, 3) uint8: the goal's cells, and the token."""
        if self.render_mode is None:
            return None
        image, scale = blank(1, 240)
        for cell in GOAL + MOVES:
            disc(image, scale, *place(cell), 0.07, (170, 210, 170))
        disc(image, scale, *place(self.cell), 0.06, AGENT_COLOURS[0])
        return image.round().astype(np.uint8)

    def close(self) -> None:
        pass


def place(cell: np.ndarray) -> tuple[float, float]:
    """Its middle in the picture, in [-1, 1]^2."""
    x, y = (2 * cell + 1) / SIZE - 1
    return float(x), float(y)


def make_vec(task: str, num_envs: int, seed: int) -> VecEnv:
    """See `common.envs.make_vec`."""
    return VecEnv([ParallelTeam(task, WindGrid()) for _ in range(num_envs)], seed)


def parallel_env(task: str, render_mode: str | None = None) -> WindGrid:
    """See `common.envs.parallel_env`."""
    return WindGrid(render_mode)
