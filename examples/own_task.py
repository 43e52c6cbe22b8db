"""A task of your own with data of your own: copy this file and change what you need.

Two carts on a line shall meet: each sees its own place and the gap to the other, and pushes itself.

    python -m examples.own_task                    # writes own_task.hdf5
    python otc_td3bc.py --env examples.own_task:Carts --dataset own_task.hdf5
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv


class Carts(ParallelEnv):
    metadata = {"name": "carts"}
    possible_agents = ["left", "right"]
    max_episode_steps = 25
    reference_returns = -49.0, -9.0  # of score 0 and 100: uniform actions, full speed

    def __init__(self):
        self.random = np.random.default_rng()
        # One object for all calls, as PettingZoo asks
        self.observations = Box(-np.inf, np.inf, (2,), np.float32)
        self.actions = Box(-1.0, 1.0, (1,), np.float32)

    def observation_space(self, agent):
        return self.observations

    def action_space(self, agent):
        return self.actions

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.time = list(self.possible_agents), 0
        self.places = self.random.uniform([-1.5, 0.5], [-0.5, 1.5])
        return self.see(), {agent: {} for agent in self.agents}

    def see(self):
        gap = self.places[1] - self.places[0]
        return {
            "left": np.array([self.places[0], gap], np.float32),
            "right": np.array([self.places[1], -gap], np.float32),
        }

    def step(self, actions):
        self.places += 0.1 * np.array([actions[agent][0] for agent in self.possible_agents])
        self.time += 1
        reward = -abs(self.places[1] - self.places[0])
        over = self.time == self.max_episode_steps
        obs, everyone = self.see(), self.possible_agents
        self.agents = [] if over else list(everyone)
        no, infos = dict.fromkeys(everyone, False), {agent: {} for agent in everyone}
        return obs, dict.fromkeys(everyone, reward), no, dict.fromkeys(everyone, over), infos


def write_data(path: str | Path, episodes: int = 800) -> None:
    """Episodes of a noisy controller, in D4RL's layout: a row is a transition, all agents' numbers
    side by side."""
    env, random, rows = Carts(), np.random.default_rng(0), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        while env.agents:
            actions = {
                agent: np.clip(seen[1:] + random.normal(0, 0.7, 1), -1, 1).astype(np.float32)
                for agent, seen in obs.items()
            }
            next_obs, rewards, terminations, truncations, _ = env.step(actions)
            rows.append(
                {
                    "observations": np.concatenate(list(obs.values())),
                    "actions": np.concatenate(list(actions.values())),
                    "rewards": np.float32(np.mean(list(rewards.values()))),
                    "next_observations": np.concatenate(list(next_obs.values())),
                    "terminals": any(terminations.values()),  # what follows is worth nothing
                    "timeouts": any(truncations.values()),  # the episode was cut here
                }
            )
            obs = next_obs
    with h5py.File(path, "w") as file:
        for name in rows[0]:
            file[name] = np.array([row[name] for row in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.own_task")
    parser.add_argument("path", nargs="?", default="own_task.hdf5", help="a new file")
    path = parser.parse_args().path
    if Path(path).exists():
        parser.error(f"{path} exists already and is not overwritten; name another file")
    try:
        write_data(path)
    except OSError as error:
        parser.error(f"cannot write {path}: {type(error).__name__}")
