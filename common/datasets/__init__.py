"""A name or a file -> one team dataset, and its decentralised split."""

import re
from dataclasses import replace
from pathlib import Path

from common import InputError, nearest
from common.datasets import files, makers, readers, team
from common.datasets.names import (
    BUILT_IN_SIZES,
    D4RL_QUALITIES,
    QUALITIES,
    is_hosted,
    is_omar,
    parse_env,
)
from common.datasets.team import TeamDataset
from common.envs import make_vec
from common.envs.tasks import TASKS

__all__ = ["TeamDataset", "is_omar", "load", "parse_env"]


def load(
    env: str,
    dataset: str = "built-in",
    size: int | None = None,
    split: str | None = None,
    discrete: bool | None = False,
) -> TeamDataset:
    """The data of `env`, task-quality or package.module:factory (then `dataset` must be a file
    or folder).

    `dataset` is built-in, d4rl, minari, a Minari id, a file in D4RL's layout or a folder in OMAR's.
    Built-in data is made once, d4rl and minari are fetched once. `size` is the number of
    transitions: built-in data is made at that size; of other data whole episodes are taken, spread
    evenly, the last one cut. `discrete` is the kind of actions that the learner is for, None: both.
    Raises InputError for whatever is wrong with the names, the size or the data.
    """
    task, quality = parse_env(env)
    if size is not None and size < 1:
        raise InputError(f"--dataset-size {size}: expected at least 1")
    is_id = re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset)
    is_minari_id = is_id and not Path(dataset).is_dir()
    is_file = dataset.endswith((".hdf5", ".h5")) or (Path(dataset).exists() and not is_minari_id)
    is_folder = is_file and Path(dataset).is_dir()
    named = dataset in ("built-in", "d4rl", "minari")
    if not (named or is_minari_id or is_file):
        hint = nearest(dataset, ["built-in", "d4rl", "minari"])
        raise InputError(
            f"unknown --dataset {dataset!r}: {hint} (or FILE.hdf5, FOLDER, a Minari id)"
        )
    if ":" in env and named:
        raise InputError(
            f"--dataset {dataset}: --env {env} has no data, expected FILE.hdf5, FOLDER or Minari id"
        )
    if dataset in ("d4rl", "minari") and not is_hosted(dataset, task, quality or "medium"):
        has_others = is_hosted(dataset, task, "medium")
        expected = f"{task}-{'|'.join(D4RL_QUALITIES)}" if has_others else "built-in or a file"
        raise InputError(f"--dataset {dataset} has no data of {env}: expected {expected}")
    if named and not quality and "" not in BUILT_IN_SIZES.get(task, ()):
        examples = ", ".join(f"{task}-{q}" for q in BUILT_IN_SIZES.get(task, QUALITIES[:3]))
        raise InputError(f"--env {env} names no data quality, expected for example {examples}")
    vec = make_vec(task, 1, 0, split)
    vec.close()
    if discrete is not None and vec.discrete != discrete:
        kinds = ("continuous", "discrete") if discrete else ("discrete", "continuous")
        hint = "one of the other scripts" if discrete else "otc_cql_discrete.py"
        raise InputError(f"--env {env}: {kinds[0]} actions, this script is for {kinds[1]}: {hint}")

    if dataset == "built-in":
        path = makers.built_in(task, quality, size)
        made = "made on this machine, not D4RL"
        if TASKS[task].family == "smax":
            made = "SMAX, made on this machine, not SMAC"
        data, name = readers.read_hdf5(path), f"built-in {env} ({made})"
    elif dataset == "d4rl":
        path = files.d4rl(task, quality)
        data, name = readers.read_hdf5(path), f"D4RL {path.stem}"
    elif is_folder:
        path = Path(dataset)
        data, name = readers.read_omar(path, task, vec), "OMAR's layout"
    elif is_file:
        path = Path(dataset)
        data, name = readers.read_hdf5(path), "file"
    else:
        path = f"mujoco/{files.robot(task)}/{quality}-v0" if dataset == "minari" else dataset
        data, name = readers.read_minari(path), "Minari"
    is_short = "next_observations" not in data and data["terminals"].any()
    found = team.lay_out(data, task, vec, str(path))
    if not is_folder:  # OMAR's have no word for it
        team.check_lengths(found, vec.max_episode_steps, str(path))
    total = len(found)
    if size is not None and size != total:
        if size > total:
            raise InputError(f"--dataset-size {size}: {path} has only {total} transitions")
        found = team.thin(found, size)
    count = f"{len(found):,} transitions" + (f" of {total:,}" if len(found) < total else "")
    ends = "; no next_observations: what follows its ends is not known" if is_short else ""
    return replace(found, source=f"{name}: {count}, {path}{ends}")
