"""Names of data: which tasks and qualities there are, and how many rows the built-in data has."""

import re
from pathlib import Path

from common import InputError, nearest
from common.envs.tasks import TASKS

# Rows of the built-in data: as many as D4RL v2 has; of the particle tasks as the OTC paper has; a
# maze (D4RL's have 1, 2 and 4 million rows) and a bandit have one set, without a quality; and of
# family mpe as OMAR has, whose medium-replay is of unknown size; of SMAX as many as 10,000 episodes
# have
MILLION = 1_000_000
OF_FAMILY = {
    "particle": {"random": MILLION},
    "maze": {"": MILLION},
    "bandit": {"": MILLION},
    "grid": {"random": 100_000},
    "mpe": {"random": MILLION, "medium-replay": 250_000, "medium": MILLION, "expert": MILLION},
    "matrix_game": {"favourable": 10_000, "neutral": 10_000, "unfavourable": 10_000},
}
BUILT_IN_SIZES = {
    task: {"random": MILLION, "medium": MILLION, "medium-replay": replay}
    for task, replay in {"halfcheetah": 202_000, "walker2d": 302_000, "hopper": 402_000}.items()
} | {task: OF_FAMILY[row.family] for task, row in TASKS.items() if row.family in OF_FAMILY}
BUILT_IN_SIZES["halfcheetah-local"] = OF_FAMILY["mpe"]
BUILT_IN_SIZES["5m_vs_6m"] = {"random": 181_018, "medium": 364_953}
ANT = dict.fromkeys(("random", "medium", "full-replay", "expert"), MILLION)
BUILT_IN_SIZES |= {"ant": ANT, "ant-local": ANT}
BUILT_IN_SIZES |= {
    f"reacher-{seen}": dict.fromkeys(("expert-mix", "expert-clockwise", "expert-counter"), MILLION)
    for seen in ("full", "independent", "leader")
}
D4RL_QUALITIES = ("random", "medium", "medium-replay", "expert", "medium-expert", "full-replay")
QUALITIES = (*D4RL_QUALITIES, "favourable", "neutral", "unfavourable")
QUALITIES += ("expert-mix", "expert-clockwise", "expert-counter")


def parse_env(env: str) -> tuple[str, str]:
    """(task, quality): halfcheetah-medium is ("halfcheetah", "medium").

    The quality is "" where `env` names none, as `package.module:factory` never does.
    Raises InputError for an unknown task or quality.
    """
    if ":" in env:
        return env, ""
    # Names of tasks have dashes too: the longest one that fits
    task = max((t for t in TASKS if f"{env}-".startswith(f"{t}-")), key=len, default=None)
    if task is None:
        task = re.sub(f"-({'|'.join(QUALITIES)})$", "", env)
        if re.fullmatch("cooperative-navigation(-[^-]*)?", task):
            hint = "expected cooperative-navigation-N, N agents and landmarks, N from 2 to 10"
        else:
            # what follows the first dash is a misspelt quality, unless a task has a dash as well
            start = task.partition("-")[0]
            task = task if nearest(task, TASKS).startswith("did") else start
            hint = nearest(task, TASKS)
        raise InputError(f"unknown task {task!r} in --env {env}: {hint}")
    quality = env[len(task) + 1 :]
    if env != task and quality not in QUALITIES:
        hint = nearest(quality, QUALITIES)
        raise InputError(f"unknown data quality {quality!r} in --env {env}: {hint}")
    if quality and "" in OF_FAMILY.get(TASKS[task].family, {}):
        raise InputError(f"--env {env}: {task} has one set of data, expected --env {task}")
    return task, quality


def is_hosted(dataset: str, task: str, quality: str) -> bool:
    """Whether d4rl or minari may have such data; of a maze d4rl has one set, without a quality."""
    its = TASKS[task]
    if its.family == "maze":
        return dataset == "d4rl"
    has_task = dataset == "minari" or its.env_id != "Reacher-v5"
    return its.family == "mujoco" and has_task and quality in D4RL_QUALITIES


def data_name(task: str, quality: str) -> str:
    """The inverse of `parse_env`."""
    return f"{task}-{quality}" if quality else task


def is_omar(dataset: str) -> bool:
    """Whether `--dataset` is a folder with OMAR's files."""
    return (Path(dataset) / "obs_0.npy").exists()
