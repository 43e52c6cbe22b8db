"""A task as a batch of teams."""

from collections.abc import Sequence

import numpy as np


class VecEnv:
    """E teams stepped one after another; the step that ends an episode starts the next.

    A team has `num_agents`, `obs_dim`, `action_low` and `action_high` (N, action_dim),
    `max_episode_steps`, `reset(seed) -> obs`, `close()` and
    `step(actions (N, action_dim)) -> obs, reward, terminated, truncated`;
    its obs is (N, obs_dim), or (obs_dim,) where all agents see the same.

    Where a team has `discrete = True`, its actions are one-hot, and the last `action_dim` entries
    of an agent's obs say which are legal: 1 or 0, all 0 once the agent is dead. Whatever it is
    given, the environment plays the legal action with the largest entry.
    """

    discrete = False
    # (N, obs_dim) and (N, action_dim) bool: which entries are the agent's own, where the agents'
    # sizes differ and the smaller ones are padded; see `own_entries`
    own_obs = own_actions = None
    reference_returns: tuple[float, float] | None = None  # of score 0 and 100, of an own task
    agents: list | None = None  # the names of a PettingZoo task's, in their order

    def __init__(self, teams: Sequence, seed: int):
        self.teams = teams
        self.num_envs = len(teams)
        self.num_agents = teams[0].num_agents
        self.obs_dim = teams[0].obs_dim
        self.action_low, self.action_high = teams[0].action_low, teams[0].action_high
        self.action_dim = self.action_low.shape[1]
        self.max_episode_steps = teams[0].max_episode_steps
        self.discrete = getattr(teams[0], "discrete", False)
        self.own_obs = getattr(teams[0], "own_obs", None)
        self.own_actions = getattr(teams[0], "own_actions", None)
        self.reference_returns = getattr(teams[0], "reference_returns", None)
        self.agents = getattr(teams[0], "agents", None)
        unit_box = bool((self.action_low == -1).all() and (self.action_high == 1).all())
        self.unit_box = unit_box or self.discrete  # actions are played as the learners have them
        self.first_seed = seed
        self.elapsed = np.zeros(self.num_envs, dtype=np.int64)  # steps of each running episode

    def reset(self, seed: int | tuple[int, ...] | None = None) -> np.ndarray:
        """Start an episode in every team -> obs (E, N, obs_dim) float32.

        With a seed (also the first time, with that of `make_vec`), team e is seeded with number e
        of `np.random.SeedSequence(seed).generate_state(E)`; without, its generator goes on.
        """
        seed, self.first_seed = (self.first_seed if seed is None else seed), None
        seeds = [None] * self.num_envs
        if seed is not None:
            seeds = np.random.SeedSequence(seed).generate_state(self.num_envs).tolist()
        return self.restart(seeds)

    def restart(self, seeds: list[int | None]) -> np.ndarray:
        """`reset` with each team's own seed, or None for its generator to go on."""
        obs = np.empty((self.num_envs, self.num_agents, self.obs_dim), dtype=np.float32)
        for e, team in enumerate(self.teams):
            obs[e] = team.reset(seeds[e])
        self.elapsed[:] = 0
        return obs

    def to_box(self, actions: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], as the learners have them, in the agents' boxes: (..., N, A)."""
        if self.unit_box:
            return actions
        return self.action_low + (actions + 1) / 2 * (self.action_high - self.action_low)

    def from_box(self, actions: np.ndarray) -> np.ndarray:
        """The inverse of `to_box`."""
        if self.unit_box:
            return actions
        size = self.action_high - self.action_low
        moved = 2 * (actions - self.action_low) / np.where(size > 0, size, 1) - 1
        return np.where(size > 0, moved, 0).astype(actions.dtype)  # 0: a joint that is locked

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of every team with actions (E, N, action_dim).

        Returns obs (E, N, obs_dim) float32, rewards (E,) float32, terminations (E,) bool,
        truncations (E,) bool (the time limit) and final_obs (E, N, obs_dim): the true next
        observation. Where an episode ended, obs is the first one of the next episode; elsewhere
        it equals final_obs.
        """
        actions = np.asarray(actions, dtype=np.float32)
        final_obs = np.empty((self.num_envs, self.num_agents, self.obs_dim), dtype=np.float32)
        rewards = np.empty(self.num_envs, dtype=np.float32)
        terminations = np.empty(self.num_envs, dtype=bool)
        truncations = np.empty(self.num_envs, dtype=bool)
        for e, team in enumerate(self.teams):
            final_obs[e], rewards[e], terminations[e], truncations[e] = team.step(actions[e])
        self.elapsed += 1
        truncations |= self.elapsed >= self.max_episode_steps
        obs = final_obs.copy()
        for e in np.flatnonzero(terminations | truncations):
            obs[e] = self.teams[e].reset(None)
            self.elapsed[e] = 0
        return obs, rewards, terminations, truncations, final_obs

    def set_deployment(self, k: int, num_deployments: int) -> None:
        """Say that the steps to come are those of deployment k of K, for the tasks that change
        between deployments; 0 is the world of the offline data, K + 1 the evaluation of pi^K.

        Handed to the teams that have a method of this name; most tasks have none and stay the same.
        """
        for team in self.teams:
            if hasattr(team, "set_deployment"):
                team.set_deployment(k, num_deployments)

    def close(self) -> None:
        for team in self.teams:
            team.close()


def own_entries(sizes: Sequence[int]) -> np.ndarray | None:
    """(N, max(sizes)) bool: which entries are the agents' own; None where all sizes are equal."""
    if len(set(sizes)) == 1:
        return None
    return np.arange(max(sizes)) < np.array(sizes)[:, None]


def choose(actions: np.ndarray, legal: np.ndarray, idle: int) -> np.ndarray:
    """The number of the legal action with the largest entry: both (..., action_dim) -> (...) int32;
    `idle` where none is legal."""
    best = np.where(legal, actions, -np.inf).argmax(axis=-1)
    return np.where(legal.any(axis=-1), best, idle).astype(np.int32)
