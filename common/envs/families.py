"""A task's family, the file of this folder that builds it, stepped by this process."""

from importlib import import_module
from types import ModuleType

from common import InputError
from common.envs.tasks import TASKS, check_task
from common.envs.vec import VecEnv


def family_of(task: str) -> ModuleType:
    """The module with the `make_vec` and the `parallel_env` of a task; raises as `check_task`."""
    check_task(task)
    return import_module(f"common.envs.{'parallel' if ':' in task else TASKS[task].family}")


def joints(task: str, split: str | None) -> dict[str, str]:
    """The argument of the families whose agents share the joints of a robot."""
    if split is None:
        return {}
    if task not in TASKS or not TASKS[task].split:
        raise InputError(f"--split {split}: {task} has no joints to divide, its agents are its own")
    return {"split": split}


def make_vec(task: str, num_envs: int, seed: int, split: str | None) -> VecEnv:
    """See `common.envs.make_vec`."""
    return family_of(task).make_vec(task, num_envs, seed, **joints(task, split))
