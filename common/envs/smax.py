"""SMAX, JaxMARL's StarCraft-like battles in JAX, all teams stepped in one compiled call.

`5m_vs_6m` and the other maps of JaxMARL 0.2 on which the allies are of one type; the enemies act by
JaxMARL's heuristic. It is not StarCraft II: observations, limits and numbers are not SMAC's, which
is `smac-5m_vs_6m` (common/envs/smac.py). JaxMARL is optional: requirements-smax.txt.

Actions are discrete (see `VecEnv`): four moves, stop, and one attack per enemy. An agent observes
what SMAX shows it, zeros once it is dead, and then the mask of its legal actions, which is all
zeros once it is dead. A team's random numbers come from its own key.
"""

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

from common import InputError, cache_dir
from common.envs.particle import blank, disc
from common.envs.tasks import AGENT_COLOURS, TASKS
from common.envs.vec import VecEnv, choose

STOP = 4
"""the action of an agent that is dead"""
INSTALL = "pip install -r requirements-smax.txt"


def libraries(task: str) -> tuple[ModuleType, ModuleType]:
    """JAX and JaxMARL's SMAX. Raises InputError where they are not installed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the GPU to torch
    try:
        import jax
        from jaxmarl.environments import smax  # which prints two lines about what it lacks
    except ImportError as error:
        reason = f"{task} needs JaxMARL's SMAX ({error}): {INSTALL}"
        raise InputError(reason) from None

    if jax.config.jax_compilation_cache_dir is None:  # compiling takes longer than a short run
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
    return jax, smax


class Simulator:
    """A map's compiled functions, for any number of teams."""

    def __init__(self, task: str):
        self.jax, smax = libraries(task)
        scenario = smax.map_name_to_scenario(TASKS[task].env_id)
        self.env = env = smax.HeuristicEnemySMAX(scenario=scenario)
        self.num_agents = env.num_allies
        self.action_dim = env.num_ally_actions
        self.num_features = env.obs_size
        self.max_episode_steps = env.max_steps
        # The learners have the GPU; a step's many small operations gain nothing there.
        self.device = self.jax.devices("cpu")[0]
        vmap, jit = self.jax.vmap, self.jax.jit
        self.keys = jit(vmap(self.jax.random.key))
        self.reset, self.step = jit(vmap(self._reset)), jit(vmap(self._step))

    def observe(self, state):
        """(N, features + actions) of one team: its observations, then the legal actions."""
        jnp, env = self.jax.numpy, self.env
        obs, legal = env.get_obs(state), env.get_avail_actions(state)
        obs = jnp.stack([obs[agent] for agent in env.agents])
        legal = jnp.stack([legal[agent] for agent in env.agents])
        alive = state.state.unit_alive[: self.num_agents, None]
        return jnp.concatenate([obs, legal * alive], axis=1).astype(jnp.float32)

    def _reset(self, key):
        key, its_key = self.jax.random.split(key)
        state = self.typed(self.env.reset(its_key)[1])
        return key, state, self.observe(state)

    def typed(self, state):
        """The same with types that a further step keeps, so that it is compiled once only."""
        convert = self.jax.lax.convert_element_type
        return self.jax.tree.map(lambda leaf: convert(leaf, leaf.dtype), state)

    def _step(self, key, state, actions, fresh):
        """One team: its key, state and actions (N,) int, and whether an episode is to begin after
        one that ended -> the next key and state, obs, reward, terminated, truncated, final_obs."""
        jax, env = self.jax, self.env
        key, step_key, reset_key = jax.random.split(key, 3)
        played = {agent: actions[i] for i, agent in enumerate(env.agents)}
        _, after, rewards, _, _ = env.step_env(step_key, state, played)
        alive = after.state.unit_alive
        terminated = ~alive[: self.num_agents].any() | ~alive[self.num_agents :].any()
        # SMAX itself notices its limit one step later
        truncated = (after.state.step >= self.max_episode_steps) & ~terminated
        final_obs = self.observe(after)
        _, first, first_obs = self._reset(reset_key)
        begins = (terminated | truncated) & fresh
        after = self.typed(after)
        after = jax.tree.map(lambda new, old: jax.numpy.where(begins, new, old), first, after)
        obs = jax.numpy.where(begins, first_obs, final_obs)
        return key, after, obs, rewards[env.agents[0]], terminated, truncated, final_obs


@functools.cache
def simulator(task: str) -> Simulator:
    """One per map, so that what is compiled once is used by all."""
    return Simulator(task)


class SmaxVecEnv(VecEnv):
    """E teams on one map."""

    teams = ()
    discrete = unit_box = True

    def __init__(self, task: str, num_envs: int, seed: int):
        self.simulator = sim = simulator(task)
        self.num_envs, self.num_agents = num_envs, sim.num_agents
        self.action_dim, self.obs_dim = sim.action_dim, sim.num_features + sim.action_dim
        self.action_low = np.zeros((self.num_agents, self.action_dim), np.float32)
        self.action_high = np.ones_like(self.action_low)
        self.max_episode_steps = sim.max_episode_steps
        self.first_seed = seed
        self.keys = self.state = None
        self.legal = np.zeros((num_envs, self.num_agents, self.action_dim), bool)

    def reset(self, seed: int | tuple[int, ...] | None = None) -> np.ndarray:
        """See `VecEnv.reset`."""
        seed, self.first_seed = (self.first_seed if seed is None else seed), None
        if seed is not None:
            self.seed_teams(np.random.SeedSequence(seed).generate_state(self.num_envs))
        return self.start()

    def seed_teams(self, seeds: np.ndarray) -> None:
        """Start the teams' random numbers anew from seeds (E,)."""
        with self.simulator.jax.default_device(self.simulator.device):
            self.keys = self.simulator.keys(np.asarray(seeds, np.uint32))

    def start(self) -> np.ndarray:
        """An episode in every team -> obs (E, N, obs_dim)."""
        with self.simulator.jax.default_device(self.simulator.device):
            self.keys, self.state, obs = self.simulator.reset(self.keys)
        return self._seen(obs)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """See `VecEnv.step`."""
        return self.advance(actions, fresh=True)

    def advance(self, actions: np.ndarray, fresh: bool) -> tuple[np.ndarray, ...]:
        """`step`; without `fresh`, no episode begins where one has ended."""
        played = choose(actions, self.legal, STOP)
        fresh = np.full(self.num_envs, fresh)
        with self.simulator.jax.default_device(self.simulator.device):
            found = self.simulator.step(self.keys, self.state, played, fresh)
        self.keys, self.state, obs, *outcome = found
        return self._seen(obs), *(np.array(values) for values in outcome)

    def _seen(self, obs: Any) -> np.ndarray:
        obs = np.array(obs)
        self.legal = obs[:, :, self.simulator.num_features :] > 0
        return obs

    def close(self) -> None:
        pass


def make_vec(task: str, num_envs: int, seed: int) -> SmaxVecEnv:
    """See `common.envs.make_vec`."""
    return SmaxVecEnv(task, num_envs, seed)


# --- PettingZoo ---


class SmaxParallelEnv(ParallelEnv):
    """One team for PettingZoo. Observations are {"observation", "action_mask"}; a dead agent stays
    until the team's episode ends, with a mask of zeros."""

    def __init__(self, task: str, render_mode: str | None = None):
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode {render_mode!r}: {task} has only rgb_array")
        self.vec = SmaxVecEnv(task, 1, 0)
        self.task, self.render_mode = task, render_mode
        self.metadata = {"name": task, "render_modes": ["rgb_array"], "render_fps": 10}
        self.max_episode_steps = self.vec.max_episode_steps
        self.possible_agents = [f"agent_{i}" for i in range(self.vec.num_agents)]
        self.agents: list[str] = []
        features, size = self.vec.simulator.num_features, self.vec.action_dim
        self.observation_spaces = {
            agent: Dict(
                {
                    "observation": Box(-np.inf, np.inf, (features,), np.float32),
                    "action_mask": Box(0, 1, (size,), np.int8),
                }
            )
            for agent in self.possible_agents
        }
        self.action_spaces = {agent: Discrete(size) for agent in self.possible_agents}

    def observation_space(self, agent: str) -> Dict:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Discrete:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None or self.vec.keys is None:
            seeds = np.random.SeedSequence().generate_state(1) if seed is None else np.array([seed])
            self.vec.seed_teams(seeds)
        self.agents = self.possible_agents[:]
        return self._own(self.vec.start()), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            warnings.warn("the episode has ended: call reset first", stacklevel=2)
            return {}, {}, {}, {}, {}
        joint = np.eye(self.vec.action_dim)[[int(actions[a]) for a in self.possible_agents]]
        obs, *outcome, _ = self.vec.advance(joint[None], fresh=False)
        reward, terminated, truncated = (values.item() for values in outcome)
        outcome = (dict.fromkeys(self.agents, value) for value in (reward, terminated, truncated))
        results = (self._own(obs), *outcome, {agent: {} for agent in self.agents})
        if terminated or truncated:
            self.agents = []
        return results

    def _own(self, obs: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        features = self.vec.simulator.num_features
        return {
            agent: {
                "observation": obs[0, i, :features].copy(),
                "action_mask": obs[0, i, features:].astype(np.int8),
            }
            for i, agent in enumerate(self.possible_agents)
        }

    def state(self) -> np.ndarray:
        """SMAX's own full state: every unit's features, teams and types."""
        state = self.vec.simulator.jax.tree.map(lambda leaf: leaf[0], self.vec.state)
        return np.array(self.vec.simulator.env.get_world_state(state))

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else draw(self.vec)

    def close(self) -> None:
        pass


def parallel_env(task: str, render_mode: str | None = None) -> SmaxParallelEnv:
    """See `common.envs.parallel_env`."""
    return SmaxParallelEnv(task, render_mode)


def draw(vec: SmaxVecEnv, team: int = 0, size: int = 240) -> np.ndarray:
    """A picture (size, size, 3) uint8 of one team: allies are coloured discs, enemies black ones,
    paler with less health; the dead are not there."""
    sim, battle = vec.simulator, vec.state.state
    half = sim.env.map_width / 2
    image, scale = blank(half, size)
    at, alive, kinds, health = (
        np.array(values[team])
        for values in (
            battle.unit_positions,
            battle.unit_alive,
            battle.unit_types,
            battle.unit_health,
        )
    )
    radius, full = np.array(sim.env.unit_type_radiuses), np.array(sim.env.unit_type_health)
    for unit in np.flatnonzero(alive):
        ally = unit < sim.num_agents
        colour = np.array(AGENT_COLOURS[unit % len(AGENT_COLOURS)] if ally else (0, 0, 0))
        share = health[unit] / full[kinds[unit]]
        pale = tuple((share * colour + (1 - share) * 220).tolist())
        x, y = (at[unit] - half).tolist()
        disc(image, scale, x, y, float(radius[kinds[unit]]), pale)
    return image.round().astype(np.uint8)
