"""The tasks, and how a task is stepped as a batch of teams.

`tasks.TASKS` is the table; each family of tasks is a file of this folder, with `make_vec` and
`parallel_env`.
"""

import os

from common import InputError
from common.envs import families
from common.envs.families import family_of, joints
from common.envs.tasks import BATCHED, TASKS, check_task, normalized_score, win_rate
from common.envs.vec import VecEnv
from common.envs.workers import WorkerVecEnv, free_cores, num_cores

__all__ = [
    "TASKS",
    "VecEnv",
    "make_vec",
    "normalized_score",
    "num_cores",
    "parallel_env",
    "win_rate",
]


def make_vec(
    task: str, num_envs: int, seed: int, split: str | None = None, num_workers: int | None = 0
) -> VecEnv:
    """`num_envs` teams of `task`: a name of `TASKS`, or `package.module:factory` of a ParallelEnv.

    `num_workers` further processes share the stepping with this one; None: one per further core
    that is free now, where every process then has two teams or more, and none for own tasks. The
    numbers are the same. Tasks that step as one batch, the particle tasks, need none.
    Team e's first reset is seeded with number e of
    `np.random.SeedSequence(seed).generate_state(num_envs)`; later ones go on with its generator.
    Raises InputError for an unknown task or split, and for a ParallelEnv that cannot be used.
    """
    if num_envs < 1:
        raise InputError(f"num_envs is {num_envs}, expected at least 1")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    check_task(task)
    if num_workers is None:
        num_workers = min(free_cores(), num_envs // 2) - 1 if task in TASKS else 0
    is_batched = task in TASKS and TASKS[task].family in BATCHED
    if os.name != "posix":  # workers inherit an open file
        num_workers = 0
    if num_workers > 0 and num_envs > 1 and not is_batched:
        return WorkerVecEnv(task, num_envs, seed, split, num_workers)
    return families.make_vec(task, num_envs, seed, split)


def parallel_env(task: str, split: str | None = None, render_mode: str | None = None):
    """`task` as a `pettingzoo.ParallelEnv`; the agents of `TASKS` are called agent_0, agent_1, ...

    Raises InputError for an unknown task or split.
    """
    return family_of(task).parallel_env(task, render_mode=render_mode, **joints(task, split))
