"""Any PettingZoo ParallelEnv with Box spaces, or with Discrete actions, as a team.

`package.module:factory` names a callable without arguments that makes the environment.

- The team's reward is the mean over its agents.
- The team's episode ends when any agent's does: terminated if any agent is, or if an agent is
  missing from the observations though none was truncated; truncated if any agent is.
- Observations and actions are flattened. Where the agents' sizes differ, the smaller ones are
  padded: observations with zeros, action bounds with [-1, 1] (so that scaling to them works); what
  a policy puts there never reaches the environment.
- With Discrete actions, of one number for all agents, an agent's observations are a Box, then all
  its actions are legal, or a Dict of `observation` and `action_mask`. A dead agent stays until the
  episode ends, with a mask of zeros, and is told to take action 0.
- An episode has at most the environment's own `max_episode_steps`, or 1000 where it has none.
"""

import sys
from collections.abc import Callable
from importlib import import_module

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

from common import InputError, nearest
from common.envs.vec import VecEnv, choose, own_entries


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
                if kind == "action" and isinstance(space, Discrete):
                    continue
                if kind == "observation" and isinstance(space, Dict):
                    if set(space) == {"observation", "action_mask"}:
                        space = space["observation"]
                if not isinstance(space, Box):
                    raise InputError(f"{what}, expected a Box")
                if kind == "action" and not space.is_bounded():
                    raise InputError(f"{what}, expected finite bounds")
        self.spaces = [env.action_space(agent) for agent in self.agents]
        self.discrete = any(isinstance(space, Discrete) for space in self.spaces)
        seen = [env.observation_space(agent) for agent in self.agents]
        seen = [space["observation"] if isinstance(space, Dict) else space for space in seen]
        self.obs_sizes = [int(np.prod(space.shape)) for space in seen]
        self.num_agents = len(self.agents)
        self.obs_dim, self.own_obs = max(self.obs_sizes), own_entries(self.obs_sizes)
        if self.discrete:
            sizes = {getattr(space, "n", None) for space in self.spaces}
            if len(sizes) > 1:
                raise InputError(f"{name!r}: the agents' action spaces differ: {self.spaces}")
            self.action_sizes = [int(self.spaces[0].n)] * self.num_agents
            self.action_low = np.zeros((self.num_agents, self.action_sizes[0]), np.float32)
            self.action_high = np.ones_like(self.action_low)
            self.num_features, self.obs_dim = self.obs_dim, self.obs_dim + self.action_sizes[0]
            if self.own_obs is not None:  # masks stand behind the padding
                legal = np.ones((self.num_agents, self.action_sizes[0]), bool)
                self.own_obs = np.concatenate([self.own_obs, legal], axis=1)
        else:
            self.action_sizes = [int(np.prod(space.shape)) for space in self.spaces]
            self.action_high = np.ones((self.num_agents, max(self.action_sizes)), dtype=np.float32)
            self.action_low = -self.action_high
            for i, space in enumerate(self.spaces):
                self.action_low[i, : self.action_sizes[i]] = space.low.ravel()
                self.action_high[i, : self.action_sizes[i]] = space.high.ravel()
        self.own_actions = own_entries(self.action_sizes)
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
        if self.discrete:
            played = choose(actions, self.obs[:, self.num_features :] > 0, idle=0)
            starts = [int(space.start) for space in self.spaces]
            own = dict(zip(self.agents, (played + starts).tolist(), strict=True))
        else:
            # rounding can carry a scaled action just over a bound, which some environments refuse
            actions = np.clip(actions, self.action_low, self.action_high)
            own = {}
            for i, agent in enumerate(self.agents):
                space, size = self.spaces[i], self.action_sizes[i]
                own[agent] = actions[i, :size].reshape(space.shape).astype(space.dtype)
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
                seen = observations[agent]
                if self.discrete:
                    is_dict = isinstance(seen, dict)
                    self.obs[i, self.num_features :] = seen["action_mask"] if is_dict else 1
                    seen = seen["observation"] if is_dict else seen
                self.obs[i, : self.obs_sizes[i]] = np.ravel(seen)
        return self.obs

    def close(self) -> None:
        self.env.close()


def make_vec(task: str, num_envs: int, seed: int) -> VecEnv:
    """See `common.envs.make_vec`."""
    teams = [ParallelTeam(task) for _ in range(num_envs)]
    for kind, sizes in (("observations", teams[0].obs_sizes), ("actions", teams[0].action_sizes)):
        if len(set(sizes)) > 1:
            note = (
                f"{task}: the agents' {kind} have sizes {sizes}, padded with zeros to {max(sizes)}"
            )
            print(note, file=sys.stderr)
    return VecEnv(teams, seed)


def parallel_env(task: str, render_mode: str | None = None) -> ParallelEnv:
    """See `common.envs.parallel_env`; `render_mode`, where given, is handed to the factory."""
    factory = find_factory(task)
    return factory() if render_mode is None else factory(render_mode=render_mode)
