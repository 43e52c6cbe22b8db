"""A task whose agents differ: a sees two numbers and has one joint, b three of each."""

import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv


class Uneven(ParallelEnv):
    metadata = {"name": "uneven"}
    possible_agents = ["a", "b"]
    max_episode_steps = 10
    seen, joints = {"a": 2, "b": 3}, {"a": 1, "b": 3}

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (self.seen[agent],), np.float32)

    def action_space(self, agent):
        return Box(-1, 1, (self.joints[agent],), np.float32)

    def look(self):
        return {a: np.full(self.seen[a], 0.1 * self.t, np.float32) for a in self.agents}

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 1
        return self.look(), {a: {} for a in self.agents}

    def step(self, actions):
        self.t += 1
        no = dict.fromkeys(self.agents, False)
        return self.look(), dict.fromkeys(self.agents, 1.0), no, no, {a: {} for a in self.agents}


make = Uneven
