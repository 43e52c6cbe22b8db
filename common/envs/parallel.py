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
- `reference_returns`, where the environment has them, are the returns of score 0 and 100.
"""

import inspect
import math
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from numbers import Real
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

from common import InputError, Stopped, nearest
from common.envs.vec import VecEnv, choose, own_entries


def find_factory(name: str) -> Callable[..., ParallelEnv]:
    """The callable that `package.module:factory` names. Raises InputError if there is none."""
    module_name, _, factory_name = name.partition(":")
    if not module_name or module_name.startswith(".") or not factory_name:
        raise InputError(f"{name!r} names no environment: expected package.module:factory")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"cannot import {module_name!r} of {name!r}: {error}\n"
            "expected a module that Python finds (beside the script, or on PYTHONPATH)"
        ) from error
    except (Exception, SystemExit) as error:  # of its own
        raise InputError(f"cannot import {module_name!r} of {name!r}, {located(error)}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        hint = nearest(factory_name, names) if names else "the module defines none"
        raise InputError(f"{module_name!r} has no function {factory_name!r}: {hint}")
    return factory


def made(name: str, **options) -> ParallelEnv:
    """The environment of `package.module:factory`. Raises InputError where the factory fails."""
    factory = find_factory(name)
    try:
        return factory(**options)
    except (Exception, SystemExit) as error:
        hint = "expected a callable that needs no arguments and makes the environment"
        raise InputError(f"{name}() failed, {located(error)}\n{hint}") from error


def located(error: BaseException) -> str:
    """An error and where it was raised, in a line."""
    if isinstance(error, SyntaxError):  # which names its file and line
        return f"{type(error).__name__}: {error}"
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(at.filename).name}, line {at.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


def results_of(returned, names: tuple[str, ...], where: str) -> tuple:
    """What reset or step returned. Raises InputError unless it has those parts, as PettingZoo has
    them since 1.23."""
    if not isinstance(returned, tuple) or len(returned) != len(names):
        kind = f"{len(returned)} parts" if isinstance(returned, tuple) else type(returned).__name__
        raise InputError(f"{where} returned {kind}, expected ({', '.join(names)})")
    for name, part in zip(names, returned, strict=True):
        if not isinstance(part, dict):
            raise InputError(f"{where} gave {name} as {type(part).__name__}, expected a dictionary")
    return returned


MISFITS = (TypeError, ValueError, KeyError, AttributeError)  # of what is of another kind


def unusable(what: str, error: Exception) -> InputError:
    """What to raise for `what` an environment gave, where reading it ended in one of MISFITS."""
    if isinstance(error, InputError):  # which says it already
        return error
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return InputError(f"{what} cannot be used, {text}")


@cache
def note(text: str) -> None:
    """To stderr, once."""
    print(text, file=sys.stderr)


class ParallelTeam:
    """One team for VecEnv, of what `name` makes or of an `env` that is there already.

    Raises InputError if the environment cannot be used.
    """

    def __init__(self, name: str, env: ParallelEnv | None = None):
        env = made(name) if env is None else env
        if not isinstance(env, ParallelEnv):
            raise InputError(
                f"{name!r} made a {type(env).__name__}, expected a pettingzoo.ParallelEnv "
                "(pettingzoo.utils.aec_to_parallel converts an AECEnv)"
            )
        self.env, self.name = env, name
        possible = getattr(env, "possible_agents", None)
        self.agents = [] if possible is None else list(possible)
        if not self.agents:
            raise InputError(f"{name!r} has no possible_agents, expected the names of its agents")
        if isinstance(possible, set | frozenset) or len(set(self.agents)) < len(self.agents):
            raise InputError(
                f"{name!r} has possible_agents {possible}, expected a list of different names"
            )
        try:
            self.spaces = [env.action_space(agent) for agent in self.agents]
            seen = [env.observation_space(agent) for agent in self.agents]
        except MISFITS as error:
            raise unusable(f"{name!r}: the spaces of agents {self.agents}", error) from error
        self.discrete = any(isinstance(space, Discrete) for space in self.spaces)
        for agent, *spaces in zip(self.agents, seen, self.spaces, strict=True):
            for kind, space in zip(("observation", "action"), spaces, strict=True):
                what = f"{name!r}: the {kind} space of agent {agent!r} is {space}"
                if kind == "action" and isinstance(space, Discrete):
                    continue
                if kind == "observation" and isinstance(space, Dict) and self.discrete:
                    if set(space) == {"observation", "action_mask"}:
                        space = space["observation"]
                if not isinstance(space, Box):
                    raise InputError(f"{what}, expected a Box")
                if kind == "action":
                    size = space.high.astype(np.float64) - space.low
                    if not (size <= np.finfo(np.float32).max).all():
                        raise InputError(
                            f"{what}, expected finite bounds, and float32 their distance"
                        )
        seen = [space["observation"] if isinstance(space, Dict) else space for space in seen]
        self.obs_sizes = [int(np.prod(space.shape)) for space in seen]
        if not any(self.obs_sizes):
            raise InputError(f"{name!r}: its agents observe no number at all")
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
        self.max_episode_steps = getattr(env, "max_episode_steps", None)
        if self.max_episode_steps is None:
            note(f"{name} has no max_episode_steps: an episode is cut after 1000 steps")
            self.max_episode_steps = 1000
        limit = self.max_episode_steps
        if not isinstance(limit, Real) or not 1 <= limit < math.inf or limit != int(limit):
            raise InputError(
                f"{name!r} has max_episode_steps {limit}, expected a whole number of steps"
            )
        self.max_episode_steps = int(limit)
        self.reference_returns = getattr(env, "reference_returns", None)
        if self.reference_returns is not None:
            try:
                low, high = map(float, self.reference_returns)
            except (TypeError, ValueError):
                low, high = math.nan, math.nan
            if not (math.isfinite(low) and math.isfinite(high)) or low == high:
                raise InputError(
                    f"{name!r} has reference_returns {self.reference_returns}, expected two "
                    "different numbers, of score 0 and 100"
                )
        parameters = inspect.signature(env.reset).parameters.values()
        if not any(p.name == "seed" or p.kind == p.VAR_KEYWORD for p in parameters):
            raise InputError(
                f"{name!r}: reset takes no seed, expected reset(seed=None, options=None)"
            )
        self.form = {
            "order of its agents": self.agents,
            "size of its observations": self.obs_sizes,
            "space of its actions": self.spaces,
            "limit of its steps": self.max_episode_steps,
        }
        self.obs = np.zeros((self.num_agents, self.obs_dim), dtype=np.float32)

    def reset(self, seed: int | None) -> np.ndarray:
        returned = self._call(self.env.reset, seed=seed)
        parts = ("observations", "infos")
        observations, infos = results_of(returned, parts, f"{self.name!r}: reset")
        missing = [agent for agent in self.agents if agent not in observations]
        if missing:
            raise InputError(
                f"{self.name!r}: reset gave no observation to agent {missing[0]!r}, "
                "expected one for each of possible_agents"
            )
        for agent in self.agents:
            has_mask = isinstance(infos.get(agent), dict) and "action_mask" in infos[agent]
            if has_mask and not isinstance(observations[agent], dict):
                raise InputError(
                    f"{self.name!r}: reset gave agent {agent!r} an action_mask in its info, "
                    "expected observations of Dict(observation=..., action_mask=...)"
                )
        return self._fill(observations)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        if self.discrete:
            played = choose(actions, self.obs[:, self.num_features :] > 0, idle=0)
            starts = [int(space.start) for space in self.spaces]
            own = dict(zip(self.agents, (played + starts).tolist(), strict=True))
        else:
            own = {}
            for i, (agent, space) in enumerate(zip(self.agents, self.spaces, strict=True)):
                its = actions[i, : self.action_sizes[i]].reshape(space.shape).astype(np.float64)
                its = np.rint(its) if space.dtype.kind in "iu" else its
                # rounding can carry an action just over a bound, which some environments refuse
                own[agent] = np.clip(its, space.low, space.high).astype(space.dtype)
        parts = ("observations", "rewards", "terminations", "truncations", "infos")
        returned = results_of(self._call(self.env.step, own), parts, f"{self.name!r}: step")
        observations, rewards, terminations, truncations, _ = returned
        try:
            truncated, ended = any(truncations.values()), any(terminations.values())
        except MISFITS as error:
            raise unusable(f"{self.name!r}: a flag that step gave", error) from error
        missing = [agent for agent in self.agents if agent not in observations]
        terminated = ended or (bool(missing) and not truncated)
        if missing and truncated and not ended:
            note(
                f"{self.name}: step gave no observation to agent {missing[0]!r} where the episode "
                "was cut; the one before stands for its last"
            )
        strangers = [agent for agent in rewards if agent not in self.agents]
        if strangers:
            raise InputError(
                f"{self.name!r}: step gave a reward to {strangers[0]!r}, which is none of the "
                f"agents {self.agents}"
            )
        reward = sum(self._reward(rewards.get(agent, 0.0)) for agent in self.agents)
        reward /= self.num_agents
        return self._fill(observations), reward, terminated, truncated

    def _call(self, method, *args, **options):
        """What a method of the environment gives, which may not end the run by itself."""
        try:
            return method(*args, **options)
        except Stopped:  # by a signal that came while it ran
            raise
        except SystemExit as error:
            raise InputError(
                f"{self.name!r}: {method.__name__} ends all, {located(error)}"
            ) from error

    def _reward(self, reward) -> float:
        """A number, or an array of one."""
        if reward is None or np.size(reward) != 1:
            what = "None" if reward is None else f"shape {np.shape(reward)}"
            raise InputError(f"{self.name!r}: step gave a reward of {what}, expected one number")
        try:
            return float(np.reshape(reward, ()))
        except MISFITS as error:
            raise unusable(f"{self.name!r}: the reward {reward!r} that step gave", error) from error

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """See `VecEnv.set_deployment`: handed to the environment, if it has this method."""
        if hasattr(self.env, "set_deployment"):
            self.env.set_deployment(k, num_deployments)

    def _fill(self, observations: dict) -> np.ndarray:
        """(N, obs_dim); an agent that is missing keeps its last observation."""
        for i, agent in enumerate(self.agents):
            if agent not in observations:
                continue
            try:
                seen = observations[agent]
                if self.discrete:
                    is_dict = isinstance(seen, dict)
                    legal = seen["action_mask"] if is_dict else np.ones(self.action_sizes[i])
                    self.obs[i, self.num_features :] = self._sized(legal, self.action_sizes[i])
                    seen = seen["observation"] if is_dict else seen
                self.obs[i, : self.obs_sizes[i]] = self._sized(seen, self.obs_sizes[i])
            except MISFITS as error:
                what = f"{self.name!r}: the observation that agent {agent!r} got"
                raise unusable(what, error) from error
        return self.obs

    def _sized(self, values, size: int) -> np.ndarray:
        """Flat, (size,)."""
        if np.size(values) != size:
            raise InputError(
                f"{self.name!r} gave an observation or action mask of {np.size(values)} numbers, "
                f"where its space has {size}"
            )
        return np.ravel(values)

    def close(self) -> None:
        self.env.close()


def refuse_others(task: str, form: dict, other: dict, who: str) -> None:
    """Raises InputError where one environment of a task is made otherwise than another."""
    for what, its in form.items():
        if other[what] != its:
            raise InputError(f"{task}: the {what} differs between {who}: {its}, {other[what]}")


def make_vec(task: str, num_envs: int, seed: int) -> VecEnv:
    """See `common.envs.make_vec`."""
    teams = [ParallelTeam(task) for _ in range(num_envs)]
    if len({id(team.env) for team in teams}) < num_envs:
        raise InputError(f"{task} gave the same environment twice, expected a new one at each call")
    for team in teams[1:]:
        refuse_others(task, teams[0].form, team.form, "environments")
    for kind, sizes in (("observations", teams[0].obs_sizes), ("actions", teams[0].action_sizes)):
        if len(set(sizes)) > 1:
            note(
                f"{task}: the agents' {kind} have sizes {sizes}, padded with zeros to {max(sizes)}"
            )
    return VecEnv(teams, seed)


def parallel_env(task: str, render_mode: str | None = None) -> ParallelEnv:
    """See `common.envs.parallel_env`; `render_mode`, where given, is handed to the factory."""
    return made(task, **({} if render_mode is None else {"render_mode": render_mode}))
