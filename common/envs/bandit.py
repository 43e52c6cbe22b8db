"""The two-mode bandit: one step, one number per agent, and a reward for agreeing with the others.

`bandit-N`. All agents observe the same five ones. The team's reward is the mean product of two
agents' actions: 1 where all take 1 or all take -1, 0 on average where each decides for itself. Its
data knows two ways to agree, `MODES`; docs/environments.md.
"""

import numpy as np
from gymnasium.spaces import Box

from common.envs.particle import ParticleParallelEnv, ParticleVecEnv, blank, disc
from common.envs.tasks import AGENT_COLOURS, TASKS

MODES = (-0.8, 0.8)
"""what all agents of the data do together, give or take"""


class Bandit(ParticleVecEnv):
    """E teams of N agents; `at (N, 1, E)` holds the actions of the last step."""

    num_others = 0
    max_episode_steps = 1
    action_bound = 1.0

    def __init__(self, num_agents: int, num_envs: int, seed: int):
        super().__init__(num_agents, num_envs, seed)
        self.obs_dim, self.action_dim = 5, 1
        self.action_low, self.action_high = self.action_low[:, :1], self.action_high[:, :1]
        self.at = self.at[:, :1]

    def start(self, teams: np.ndarray) -> np.ndarray:
        """See `ParticleVecEnv.start`; every episode starts the same."""
        self.elapsed[teams] = 0
        return self.observe()

    def observe(self) -> np.ndarray:
        """(E, N, 5), ones."""
        return np.ones((self.num_envs, self.num_agents, self.obs_dim), dtype=np.float32)

    def move(self, actions: np.ndarray) -> None:
        self.at = actions.astype(np.float32)

    def judge(self) -> tuple[np.ndarray, np.ndarray]:
        actions, n = self.at[:, 0], self.num_agents
        of_pairs = actions.sum(axis=0) ** 2 - (actions**2).sum(axis=0)
        return of_pairs / np.float32(n * (n - 1)), np.ones(self.num_envs, dtype=bool)


def make_vec(task: str, num_envs: int, seed: int) -> Bandit:
    """See `common.envs.make_vec`."""
    return Bandit(num_envs=num_envs, seed=seed, **TASKS[task].kwargs)


class BanditParallelEnv(ParticleParallelEnv):
    """A bandit for PettingZoo."""

    make_vec = staticmethod(make_vec)

    def observation_box(self) -> Box:
        return Box(1, 1, (self.vec.obs_dim,), np.float32)

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else draw(self.vec)


def parallel_env(task: str, render_mode: str | None = None) -> BanditParallelEnv:
    """See `common.envs.parallel_env`."""
    return BanditParallelEnv(task, render_mode)


def draw(vec: Bandit, team: int = 0, size: int = 240) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one team's last step: an agent is a disc on a line of its
    own, its action's place from left to right; grey rings are the modes of the data."""
    image, scale = blank(1.0, size)
    for i, x in enumerate(vec.at[:, 0, team].tolist()):
        y = 1 - 2 * (i + 1) / (vec.num_agents + 1)
        for mode in MODES:
            disc(image, scale, mode, y, 0.1, (150, 150, 150), ring=2.0)
        disc(image, scale, x, y, 0.06, AGENT_COLOURS[i])
    return image.round().astype(np.uint8)
