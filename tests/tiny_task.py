"""A task that steps in microseconds, and data for it: two agents push a point to the origin."""

import h5py
import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

ENV = "tests.tiny_task:Point"


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
