"""Where raw arrays come from: D4RL's layout, Minari, OMAR's folders.

D4RL's layout is one HDF5 file: `observations`, `actions` (all agents' side by side), `rewards`,
`terminals`, `timeouts` and, best, `next_observations`; a row is a transition, episodes follow one
another.
"""

import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common import InputError

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


def open_hdf5(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is no readable HDF5 file (cut short?): {error}") from error


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """KEYS, and next_observations where present, in the file's shapes: float32, flags bool."""
    data = {}
    with open_hdf5(path) as file:
        missing = [key for key in KEYS if not isinstance(file.get(key), h5py.Dataset)]
        if missing:
            raise InputError(
                f"{path} is not in D4RL's layout: no {', '.join(missing)}; "
                f"it has {', '.join(file) or 'nothing'}"
            )
        for key in (*KEYS, "next_observations"):
            if key not in file:
                continue
            dataset = file[key]
            is_array = isinstance(dataset, h5py.Dataset) and dataset.shape
            if not is_array or dataset.dtype.kind not in "fiub":
                raise InputError(f"{path}: {key} is not an array of numbers")
            try:
                if key in ("terminals", "timeouts"):
                    flags = dataset[...]
                    if not ((flags == 0) | (flags == 1)).all():
                        raise InputError(f"{path}: {key} has values other than 0 and 1")
                    data[key] = flags.astype(bool)
                else:
                    data[key] = np.empty(dataset.shape, dtype=np.float32)
                    if dataset.size:
                        dataset.read_direct(data[key])
            except OSError as error:
                raise InputError(f"{path} cannot be read (damaged?): {error}") from error
    return data


def read_minari(dataset_id: str) -> dict[str, np.ndarray]:
    """A Minari dataset, local or downloaded; its episodes hold one observation more than rows."""
    try:
        import minari
    except ImportError as error:
        hint = 'pip install "minari[hdf5,hf]"'
        raise InputError(f"--dataset {dataset_id} needs Minari: {hint}") from error
    try:
        try:
            dataset = minari.load_dataset(dataset_id)
        except FileNotFoundError:
            dataset = minari.load_dataset(dataset_id, download=True)
        parts = {key: [] for key in (*KEYS, "next_observations")}
        for episode in dataset.iterate_episodes():
            if not isinstance(episode.observations, np.ndarray):
                raise InputError(f"Minari {dataset_id}: observations are not plain arrays")
            obs = episode.observations.astype(np.float32)
            parts["observations"].append(obs[:-1])
            parts["next_observations"].append(obs[1:])
            parts["actions"].append(np.asarray(episode.actions, dtype=np.float32))
            parts["rewards"].append(np.asarray(episode.rewards, dtype=np.float32))
            parts["terminals"].append(np.asarray(episode.terminations, dtype=bool))
            timeouts = np.array(episode.truncations, dtype=bool)
            timeouts[-1:] = True  # an episode's last row ends it, flagged or not
            parts["timeouts"].append(timeouts)
    except InputError:
        raise
    except Exception as error:  # Minari and its storages raise many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load Minari {dataset_id}: {reason}") from error
    if not parts["rewards"]:
        raise InputError(f"Minari {dataset_id}: no transitions in it")
    return {key: np.concatenate(parts.pop(key)) for key in list(parts)}


def read_omar(folder: Path, task: str, vec: Any) -> dict[str, np.ndarray]:
    """OMAR's folder: per agent i `obs_i acs_i rews_i next_obs_i dones_i.npy`, as D4RL's arrays.

    Of a task whose agents see parts of the full state, that is taken from `states_i next_states_i`.
    The team's reward is the mean over its agents. OMAR's dones leave the time limit out, so if none
    is set but at the time limit, and the rows are whole episodes of that length, every such
    episode was cut by the limit; otherwise dones are terminations.
    """
    keys = {
        "observations": "obs",
        "actions": "acs",
        "rewards": "rews",
        "next_observations": "next_obs",
        "terminals": "dones",
    }
    if getattr(vec, "seen", None) is not None and (folder / "states_0.npy").exists():
        keys |= {"observations": "states", "next_observations": "next_states"}
    found = {int(p.stem[4:]) for p in folder.glob("obs_*.npy") if p.stem[4:].isdigit()}
    # the last agent of these is the prey, which is part of the task here
    expected = {vec.num_agents, vec.num_agents + (task in ("simple-tag", "simple-world"))}
    if found and (len(found) not in expected or max(found) >= len(found)):
        agents = ", ".join(map(str, sorted(found)))
        raise InputError(
            f"{folder}: obs_i.npy for agents {agents}; {task} has {vec.num_agents}, from 0"
        )
    parts = {
        key: [_read_npy(folder / f"{name}_{i}.npy") for i in range(vec.num_agents)]
        for key, name in keys.items()
    }
    n = len(parts["observations"][0])
    widths = {"actions": vec.action_dim, "rewards": 1, "terminals": 1}
    for key, name in keys.items():
        width = widths.get(key, vec.state_dim if name.endswith("states") else vec.obs_dim)
        for i, array in enumerate(parts[key]):
            if array.size != n * width or len(array) != n:
                raise InputError(
                    f"{folder}: {name}_{i}.npy has shape {array.shape}, expected {(n, width)}"
                )
    if keys["observations"] == "states":  # the same for every agent
        parts |= {key: parts[key][:1] for key in ("observations", "next_observations")}
    data = {}
    for key in ("observations", "next_observations", "actions"):
        columns = [array.reshape(n, -1) for array in parts.pop(key)]
        data[key] = np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")
    rewards = [array.reshape(n) for array in parts["rewards"]]
    data["rewards"] = np.mean(rewards, axis=0, dtype=np.float64).astype(np.float32)
    dones = np.stack([array.reshape(n) for array in parts["terminals"]])
    if not ((dones == 0) | (dones == 1)).all():
        raise InputError(f"{folder}: dones have values other than 0 and 1")
    dones = dones.any(axis=0)
    at_limit = np.arange(1, n + 1) % vec.max_episode_steps == 0
    if n % vec.max_episode_steps or (dones & ~at_limit).any():
        at_limit[:] = False
    data["terminals"], data["timeouts"] = dones & ~at_limit, at_limit
    return data


def _read_npy(path: Path) -> np.ndarray:
    """An array of numbers, mapped and not yet read."""
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"no such file: {path} (OMAR's folders have one per agent)") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no readable array: {error}") from error
    if not isinstance(array, np.ndarray) or not array.ndim or array.dtype.kind not in "fiub":
        raise InputError(f"{path} is not an array of numbers")
    return array
