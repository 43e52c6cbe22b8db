"""Tasks that step in microseconds, and data for them: two agents push a point to the origin."""

import h5py
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

ENV = "tests.tiny_task:Point"
DISCRETE_ENV = "tests.tiny_task:Steps"


class Point(ParallelEnv):
    """Agent i moves coordinate i by a tenth of its action; the team's cost is the squared
    distance."""

    metadata = {"name": "point"}
    possible_agents = ["x", "y"]
    max_episode_steps = 20

    def observation_space(self, agent):
        return Box(-10.0, 10.0, (2,), np.float32)

    def action_space(self, agent):
        return Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents = self.possible_agents[:]
        self.position, self.time = self.random.uniform(-1, 1, 2), 0
        return self._each(self.position.astype(np.float32)), self._each({})

    def step(self, actions):
        self.position = self.position + 0.05 * np.concatenate([actions["x"], actions["y"]])
        self.time += 1
        obs, cost = self.position.astype(np.float32), float(self.position @ self.position)
        out = obs, -cost, False, self.time == self.max_episode_steps, {}
        results = tuple(map(self._each, out))
        if self.time == self.max_episode_steps:
            self.agents = []
        return results

    def _each(self, value):
        return {agent: value for agent in self.agents}


class Steps(Point):
    """Agent i moves coordinate i by a tenth down, not at all or up, but not away from the origin
    beyond 0.8; it dies where it is beyond 0.9 at the start, or at step 15 if it is not near 0."""

    def observation_space(self, agent):
        seen, mask = Box(-10.0, 10.0, (2,), np.float32), Box(0, 1, (3,), np.int8)
        return Dict({"observation": seen, "action_mask": mask})

    def action_space(self, agent):
        return Discrete(3)

    def reset(self, seed=None, options=None):
        observations, infos = super().reset(seed)
        self.dead = np.abs(self.position) > 0.9
        return self._masked(observations), infos

    def step(self, actions):
        illegal = [a for a in self.agents if not self.masks[a][actions[a]] and self.masks[a].any()]
        assert not illegal, f"{illegal} did what is illegal"
        moves = {a: np.array([2.0 * (actions[a] - 1)]) for a in self.possible_agents}
        for agent, dead in zip(self.possible_agents, self.dead, strict=True):
            moves[agent] *= not dead
        observations, *results = super().step(moves)
        if self.time == 15:
            self.dead |= np.abs(self.position) > 0.3
        return self._masked(observations), *results

    def _masked(self, observations):
        self.masks = {}
        for i, agent in enumerate(self.possible_agents):
            x = self.position[i]
            legal = np.array([x > -0.8, True, x < 0.8]) & ~self.dead[i]
            self.masks[agent] = legal.astype(np.int8)
        return {
            agent: {"observation": seen, "action_mask": self.masks[agent]}
            for agent, seen in observations.items()
        }


def write_discrete_data(path, episodes=50, seed=0):
    """A D4RL-layout file of uniform legal actions in `Steps`: one-hot, none of a dead agent."""
    env, random = Steps(), np.random.default_rng(seed)
    names = "observations actions rewards next_observations terminals timeouts"
    columns = {name: [] for name in names.split()}

    def joined(obs):
        return np.concatenate([part for a in env.possible_agents for part in obs[a].values()])

    for episode in range(episodes):
        obs, _ = env.reset(seed=1000 * seed + episode)
        while env.agents:
            before, masks = joined(obs), np.stack(list(env.masks.values()))
            one_hot = np.eye(3)[(masks * random.random(masks.shape)).argmax(1)]
            one_hot *= masks.any(axis=1, keepdims=True)
            chosen = zip(env.agents, one_hot.argmax(1).tolist(), strict=True)
            obs, rewards, _, truncations, _ = env.step(dict(chosen))
            row = before, one_hot.ravel(), rewards["x"], joined(obs), False, truncations["x"]
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = np.array(column, np.bool_ if name in ("terminals", "timeouts") else None)
    return path


def write_data(path, episodes=50, seed=0):
    """A D4RL-layout file of uniform actions in the task's own box, [-2, 2]."""
    env, random = Point(), np.random.default_rng(seed)
    names = "observations actions rewards next_observations terminals timeouts"
    columns = {name: [] for name in names.split()}
    for episode in range(episodes):
        obs, _ = env.reset(seed=1000 * seed + episode)
        while env.agents:
            before = obs["x"]
            joint = random.uniform(-2, 2, 2).astype(np.float32)
            obs, rewards, _, truncations, _ = env.step({"x": joint[:1], "y": joint[1:]})
            row = before, joint, rewards["x"], obs["x"], False, truncations["x"]
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = np.array(column)
    return path
