"""SMAC, StarCraft II's micromanagement, through its own package: `smac-5m_vs_6m` and the other maps
on which the allies are of one type.

It needs the package (https://github.com/oxwhirl/smac, not the one called smac on PyPI) and the
game; the tests run on a stand-in with the same interface. SMAX, which needs neither, has the maps
without the prefix (common/envs/smax.py); the two are different tasks.

SMAC's no-op, action 0, is legal for the dead alone: here their mask is all zeros, see `VecEnv`.
"""

import warnings
from functools import partial

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

from common import InputError
from common.envs.parallel import ParallelTeam
from common.envs.tasks import TASKS
from common.envs.vec import VecEnv

NO_OP = 0


def game(task: str):
    """SMAC's class. Raises InputError where it is not installed."""
    try:
        from smac.env import StarCraft2Env
    except ImportError as error:
        reason = f"{task} needs SMAC ({error}): https://github.com/oxwhirl/smac, and StarCraft II"
        raise InputError(reason) from None
    return StarCraft2Env


class SmacParallelEnv(ParallelEnv):
    """A map for PettingZoo. Observations are {"observation", "action_mask"}; a dead agent stays
    until the team's episode ends, with a mask of zeros. The game starts with the first reset, and
    anew with every seed."""

    def __init__(self, task: str, render_mode: str | None = None):
        if render_mode is not None:
            raise InputError(f"render_mode {render_mode!r}: {task} has no pictures")
        self.task, self.render_mode = task, None
        # Without continuing_episode a step does not tell that it was the time limit's
        self.make = partial(game(task), map_name=TASKS[task].env_id, continuing_episode=True)
        self.env = self.make()
        info = self.env.get_env_info()
        self.metadata = {"name": task, "render_modes": []}
        self.max_episode_steps = info["episode_limit"]
        self.possible_agents = [f"agent_{i}" for i in range(info["n_agents"])]
        self.agents: list[str] = []
        seen = Dict(
            {
                "observation": Box(-np.inf, np.inf, (info["obs_shape"],), np.float32),
                "action_mask": Box(0, 1, (info["n_actions"],), np.int8),
            }
        )
        self.observation_spaces = dict.fromkeys(self.possible_agents, seen)
        self.action_spaces = {a: Discrete(info["n_actions"]) for a in self.possible_agents}

    def observation_space(self, agent: str) -> Dict:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Discrete:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:  # SMAC takes one when it is made only
            self.env.close()
            self.env = self.make(seed=seed)
        self.env.reset()
        self.agents = self.possible_agents[:]
        return self._own(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            warnings.warn("the episode has ended: call reset first", stacklevel=2)
            return {}, {}, {}, {}, {}
        alive = self.legal.any(axis=1)
        joint = [
            int(actions[agent]) if lives else NO_OP
            for agent, lives in zip(self.possible_agents, alive, strict=True)
        ]
        reward, ended, info = self.env.step(joint)
        # Where the game itself failed SMAC ends the episode without a word of who won
        truncated = bool(ended and (info.get("episode_limit") or "battle_won" not in info))
        outcome = float(reward), bool(ended) and not truncated, truncated
        outcome = (dict.fromkeys(self.agents, value) for value in outcome)
        infos = {a: {"won": info.get("battle_won", False)} for a in self.agents}
        results = (self._own(), *outcome, infos)
        if ended:
            self.agents = []
        return results

    def _own(self) -> dict[str, dict[str, np.ndarray]]:
        self.legal = np.array(self.env.get_avail_actions(), np.int8)
        self.legal[self.legal[:, NO_OP] == 1] = 0
        seen = zip(self.possible_agents, self.env.get_obs(), self.legal, strict=True)
        return {
            agent: {"observation": np.array(obs, np.float32), "action_mask": legal.copy()}
            for agent, obs, legal in seen
        }

    def state(self) -> np.ndarray:
        """SMAC's full state."""
        return np.array(self.env.get_state(), np.float32)

    def close(self) -> None:
        self.env.close()


def make_vec(task: str, num_envs: int, seed: int) -> VecEnv:
    """See `common.envs.make_vec`; every team is a game of its own."""
    teams = [ParallelTeam(task, parallel_env(task)) for _ in range(num_envs)]
    return VecEnv(teams, seed)


def parallel_env(task: str, render_mode: str | None = None) -> SmacParallelEnv:
    """See `common.envs.parallel_env`."""
    return SmacParallelEnv(task, render_mode)
