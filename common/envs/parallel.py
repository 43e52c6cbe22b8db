"""Any PettingZoo ParallelEnv with Box spaces as a team.

`package.module:factory` names a callable without arguments that makes the environment.

- The team's reward is the mean over its agents.
- The team's episode ends when any agent's does: terminated if any agent is, or if an agent is
  missing from the observations though none was truncated; truncated if any agent is.
- Observations and actions are flattened. Where the agents' sizes differ, the smaller ones are
  padded: observations with zeros, action bounds with [-1, 1] (so that scaling to them works); what
  a policy puts there never reaches the environment.
- An episode has at most the environment's own `max_episode_steps`, or 1000 where it has none.
"""

import sys
from collections.abc import Callable
from importlib import import_module

import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

from common import InputError, nearest
from common.envs import VecEnv


def find_factory(name: str) -> Callable[..., ParallelEnv]:
    """The callable that `package.module:factory` names. Raises InputError if there is none."""
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise InputError(f"{name!r} names no environment: expected package.module:factory")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"cannot import {module_name!r} of {name!r}: {error}\n"
            "expected a module that Python finds (beside the script, or on PYTHONPATH)"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        hint = nearest(factory_name, names) if names else "the module defines none"
        raise InputError(f"{module_name!r} has no function {factory_name!r}: {hint}")
    return factory


class ParallelTeam:
    """One team for VecEnv, of what `name` makes or of an `env` that is there already.

    Raises InputError if the environment cannot be used.
    """

    def __init__(self, name: str, env: ParallelEnv | None = None):
        env = find_factory(name)() if env is None else env
        if not isinstance(env, ParallelEnv):
            raise InputError(
                f"{name!r} made a {type(env).__name__}, expected a pettingzoo.ParallelEnv "
                "(pettingzoo.utils.aec_to_parallel converts an AECEnv)"
            )
        self.env, self.name = env, name
        self.agents = list(getattr(env, "possible_agents", []))
        if not self.agents:
            raise InputError(f"{name!r} has no possible_agents, expected the names of its agents")
        for agent in self.agents:
            for kind in ("observation", "action"):
                space = getattr(env, f"{kind}_space")(agent)
                what = f"{name!r}: the {kind} space of agent {agent!r} is {space}"
                if not isinstance(space, Box):
                    raise InputError(f"{what}, expected a Box")
                if kind == "action" and not space.is_bounded():
                    raise InputError(f"{what}, expected finite bounds")
        self.spaces = [env.action_space(agent) for agent in self.agents]
        self.action_sizes = [int(np.prod(space.shape)) for space in self.spaces]
        self.obs_sizes = [int(np.prod(env.observation_space(a).shape)) for a in self.agents]
        self.num_agents = len(self.agents)
        self.obs_dim = max(self.obs_sizes)
        self.action_high = np.ones((self.num_agents, max(self.action_sizes)), dtype=np.float32)
        self.action_low = -self.action_high
        for i, space in enumerate(self.spaces):
            self.action_low[i, : self.action_sizes[i]] = space.low.ravel()
            self.action_high[i, : self.action_sizes[i]] = space.high.ravel()
        self.max_episode_steps = getattr(env, "max_episode_steps", None) or 1000
        self.obs = np.zeros((self.num_agents, self.obs_dim), dtype=np.float32)

    def reset(self, seed: int | None) -> np.ndarray:
        observations, _ = self.env.reset(seed=seed)
        missing = [agent for agent in self.agents if agent not in observations]
        if missing:
            raise InputError(
                f"{self.name!r}: reset gave no observation to agent {missing[0]!r}, "
                "expected one for each of possible_agents"
            )
        return self._fill(observations)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        # rounding can carry a scaled action just over a bound, which some environments refuse
        actions = np.clip(actions, self.action_low, self.action_high)
        own = {}
        for i, agent in enumerate(self.agents):
            space = self.spaces[i]
            own[agent] = actions[i, : self.action_sizes[i]].reshape(space.shape).astype(space.dtype)
        observations, rewards, terminations, truncations, _ = self.env.step(own)
        truncated = any(truncations.values())
        missing = any(agent not in observations for agent in self.agents)
        terminated = any(terminations.values()) or (missing and not truncated)
        reward = sum(rewards.get(agent, 0.0) for agent in self.agents) / self.num_agents
        return self._fill(observations), reward, terminated, truncated

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """See `VecEnv.set_deployment`: handed to the environment, if it has this method."""
        if hasattr(self.env, "set_deployment"):
            self.env.set_deployment(k, num_deployments)

    def _fill(self, observations: dict) -> np.ndarray:
        """(N, obs_dim); an agent that is missing keeps its last observation."""
        for i, agent in enumerate(self.agents):
            if agent in observations:
                self.obs[i, : self.obs_sizes[i]] = np.ravel(observations[agent])
        return self.obs

    def close(self) -> None:
        self.env.close()


def make_vec(task: str, num_envs: int, seed: int, split: str | None = None) -> VecEnv:
    """See `common.envs.make_vec`."""
    _refuse_split(task, split)
    teams = [ParallelTeam(task) for _ in range(num_envs)]
    for kind, sizes in (("observations", teams[0].obs_sizes), ("actions", teams[0].action_sizes)):
        if len(set(sizes)) > 1:
            note = (
                f"{task}: the agents' {kind} have sizes {sizes}, padded with zeros to {max(sizes)}"
            )
            print(note, file=sys.stderr)
    return VecEnv(teams, seed)


def parallel_env(
    task: str, split: str | None = None, render_mode: str | None = None
) -> ParallelEnv:
    """See `common.envs.parallel_env`; `render_mode`, where given, is handed to the factory."""
    _refuse_split(task, split)
    factory = find_factory(task)
    return factory() if render_mode is None else factory(render_mode=render_mode)


def _refuse_split(task: str, split: str | None) -> None:
    if split is not None:
        raise InputError(f"split {split!r} cannot be applied to {task!r}: its agents are its own")
