"""The built-in data of the reacher tasks: controllers that solve the arm's inverse kinematics.

Two bends of the elbow reach any target. `expert-clockwise` always bends it clockwise,
`expert-counter` against the clock; `expert-mix` is half of the one and then half of the other.
Torques are proportional-derivative towards the goal's angles, noisy, and clipped to [-1, 1]. The
data holds the full state, of which the tasks' agents see their parts.
"""

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import h5py
import mujoco
import numpy as np

from common.datasets.makers.workers import write_pieces
from common.envs.mujoco import make_single

VERSION = 1
"""names the files; another one where their content changes"""
P_GAIN, D_GAIN = 0.25, 0.05
NOISE = 0.05
"""standard deviation of what is added to the torques before they are clipped"""
LINKS = 0.1, 0.11
"""lengths of the arm's two links"""
PIECE_ROWS = 10_000
"""rows of a piece of work; a file depends on it"""
BENDS = {"expert-mix": (-1, 1), "expert-clockwise": (-1,), "expert-counter": (1,)}
"""sign of the elbow's angle in equal shares of the rows"""


def goal_angles(x: float, y: float, bend: int) -> tuple[float, float]:
    """The angles at which the fingertip is at (x, y), or closest to it; `bend` is the sign of the
    second."""
    inner, outer = LINKS
    cosine = (x * x + y * y - inner**2 - outer**2) / (2 * inner * outer)
    elbow = bend * math.acos(min(max(cosine, -1), 1))
    shoulder = math.atan2(y, x) - math.atan2(
        outer * math.sin(elbow), inner + outer * math.cos(elbow)
    )
    return shoulder, elbow


def torques(state: np.ndarray, bend: int) -> np.ndarray:
    """The controller's torques (2,) at the full state (10,), not yet clipped."""
    cos1, cos2, sin1, sin2, x, y, velocity1, velocity2, *_ = state.tolist()
    goals, angles = goal_angles(x, y, bend), (math.atan2(sin1, cos1), math.atan2(sin2, cos2))
    # the short way round
    ahead = [math.remainder(g - q, 2 * math.pi) for g, q in zip(goals, angles, strict=True)]
    return np.array(
        [P_GAIN * ahead[0] - D_GAIN * velocity1, P_GAIN * ahead[1] - D_GAIN * velocity2]
    )


@dataclass
class Piece:
    """A piece of work: so many rows, whole episodes but for the last."""

    task: str
    bend: int
    seed: np.random.SeedSequence
    rows: int

    def roll(self) -> dict[str, np.ndarray]:
        """The rows, D4RL's keys; the last one has `timeouts`, whole or not."""
        env, rng = make_single(self.task), np.random.default_rng(self.seed)
        limit, env = env.spec.max_episode_steps, env.unwrapped
        noise = NOISE * rng.standard_normal((self.rows, 2))
        states, next_states = np.empty((2, self.rows, 10), dtype=np.float32)
        actions = np.empty((self.rows, 2), dtype=np.float32)
        rewards = np.empty(self.rows, dtype=np.float32)
        state, _ = env.reset(seed=int(rng.integers(2**32)))
        for t in range(self.rows):
            states[t] = state
            action = np.clip(torques(state, self.bend), -1, 1) + noise[t]
            actions[t] = np.clip(action, -1, 1)
            state, rewards[t], _, _, _ = env.step(actions[t])
            next_states[t] = state
            if (t + 1) % limit == 0:
                state, _ = env.reset()
        timeouts = np.arange(1, self.rows + 1) % limit == 0
        timeouts[-1] = True
        return {
            "observations": states,
            "actions": actions,
            "rewards": rewards,
            "next_observations": next_states,
            "terminals": np.zeros(self.rows, dtype=bool),
            "timeouts": timeouts,
        }


def plan(task: str, quality: str, size: int) -> list[Piece]:
    """The pieces of a data set, in order; they depend on the arguments alone, and all tasks of the
    arm have the same rows."""
    bends, pieces = BENDS[quality], []
    bounds = np.arange(len(bends) + 1) * size // len(bends)
    for bend, start, stop in zip(bends, bounds[:-1], bounds[1:], strict=True):
        for number, first in enumerate(range(int(start), int(stop), PIECE_ROWS)):
            seed = np.random.SeedSequence((1 + bend, number))
            pieces.append(Piece(task, bend, seed, min(PIECE_ROWS, int(stop) - first)))
    return pieces


def write(file: h5py.File, task: str, quality: str, size: int, bar: Any, num_workers: int) -> None:
    """`size` transitions into an empty file."""
    write_pieces(file, plan(task, quality, size), size, bar, num_workers)
    file["metadata/algorithm"] = f"inverse kinematics, noise {NOISE}"
    for module in (gymnasium, mujoco, np):
        file[f"metadata/versions/{module.__name__}"] = module.__version__
