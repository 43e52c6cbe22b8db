"""The coordination game: whether agents that learn from the same data agree on one of two equally
good conventions, with nothing else to learn.

Two agents choose left or right at the same time; both are paid 1 where they chose the same, else 0.
Nothing is to be seen. docs/environments.md says what its source leaves open.
"""

import warnings

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

from common import InputError
from common.envs.parallel import ParallelTeam
from common.envs.particle import blank, disc
from common.envs.tasks import AGENT_COLOURS, TASKS
from common.envs.vec import VecEnv

LEFT, RIGHT = 0, 1


def rewards_of(choices: np.ndarray) -> np.ndarray:
    """1 where both agents chose the same, else 0: choices (..., 2) of LEFT and RIGHT -> (...)."""
    return (choices[..., 0] == choices[..., 1]).astype(np.float32)


class CoordinationGame(ParallelEnv):
    """The game for PettingZoo.

    Args:
        task: its name, for the metadata.
        steps: choices in an episode; the last one is a termination.
        joint: one agent chooses for both, action 2 a_1 + a_2 of four.

    An agent observes the constant 1, (1,).
    """

    def __init__(
        self, task: str, render_mode: str | None = None, steps: int = 1, joint: bool = False
    ):
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode {render_mode!r}: {task} has only rgb_array")
        self.metadata = {"name": task, "render_modes": ["rgb_array"], "render_fps": 2}
        self.render_mode, self.max_episode_steps, self.joint = render_mode, steps, joint
        self.possible_agents = ["agent_0"] if joint else ["agent_0", "agent_1"]
        self.agents: list[str] = []
        self.observation_spaces = {a: Box(0, 1, (1,), np.float32) for a in self.possible_agents}
        self.action_spaces = {a: Discrete(4 if joint else 2) for a in self.possible_agents}
        self.elapsed, self.choices = 0, None

    def observation_space(self, agent: str) -> Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Discrete:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents, self.elapsed, self.choices = self.possible_agents[:], 0, None
        return self._observe(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            warnings.warn("the episode has ended: call reset first", stacklevel=2)
            return {}, {}, {}, {}, {}
        chosen = [int(actions[agent]) for agent in self.possible_agents]
        self.choices = np.array(divmod(chosen[0], 2) if self.joint else chosen)
        self.elapsed += 1
        outcome = float(rewards_of(self.choices)), self.elapsed == self.max_episode_steps, False
        outcome = (dict.fromkeys(self.agents, value) for value in outcome)
        results = (self._observe(), *outcome, {agent: {} for agent in self.agents})
        if self.elapsed == self.max_episode_steps:
            self.agents = []
        return results

    def _observe(self) -> dict[str, np.ndarray]:
        return {agent: np.ones(1, np.float32) for agent in self.agents}

    def state(self) -> np.ndarray:
        """What every agent observes."""
        return np.ones(1, np.float32)

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else draw(self.choices)

    def close(self) -> None:
        pass


def make_vec(task: str, num_envs: int, seed: int) -> VecEnv:
    """See `common.envs.make_vec`."""
    return VecEnv([ParallelTeam(task, parallel_env(task)) for _ in range(num_envs)], seed)


def parallel_env(task: str, render_mode: str | None = None) -> CoordinationGame:
    """See `common.envs.parallel_env`."""
    return CoordinationGame(task, render_mode, **TASKS[task].kwargs)


def draw(choices: np.ndarray | None, size: int = 240) -> np.ndarray:
    """A picture (size, size, 3) uint8: each agent's disc, one above the other, on the side that it
    chose; in the middle before the first choice."""
    image, scale = blank(1, size)
    for i, y in enumerate((0.4, -0.4)):
        for x in (-0.5, 0.5):
            disc(image, scale, x, y, 0.22, (150, 150, 150), ring=2.0)
        x = 0 if choices is None else int(choices[i]) - 0.5
        disc(image, scale, x, y, 0.18, AGENT_COLOURS[i])
    return image.round().astype(np.uint8)
