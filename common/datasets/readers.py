"""Where raw arrays come from: D4RL's layout, Minari, OMAR's folders.

D4RL's layout is one HDF5 file: `observations`, `actions` (all agents' side by side), `rewards`,
`terminals`, `timeouts` and, best, `next_observations`; a row is a transition, episodes follow one
another.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common import InputError
from common.datasets.files import checksum

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


def open_hdf5(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return h5py.File(path, "r")
    except Exception as error:  # h5py raises many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no readable HDF5 file (cut short?): {reason}") from error


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """KEYS, and next_observations where present, in the file's shapes: float32, flags bool."""
    with open_hdf5(path) as file:
        try:
            return _read_columns(file, str(path))
        except (InputError, MemoryError):
            raise
        except Exception as error:  # h5py and numpy raise many kinds
            reason = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read (damaged?): {reason}") from error


def _read_columns(file: h5py.File, where: str) -> dict[str, np.ndarray]:
    data = {}
    links = {key: file.get(key, getlink=True) for key in (*KEYS, "next_observations")}
    missing = [key for key in KEYS if links[key] is None]
    if missing:
        found = list(file)
        others = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InputError(
            f"{where} is not in D4RL's layout: no {', '.join(missing)}; "
            f"it has {', '.join(found[:5]) or 'nothing'}{others}"
        )
    for key, link in links.items():
        if link is None:
            continue
        if isinstance(link, h5py.ExternalLink):
            raise InputError(f"{where}: {key} is a link to another file")
        dataset = file[key]
        is_array = isinstance(dataset, h5py.Dataset) and dataset.shape
        if not is_array or dataset.dtype.kind not in "fiub":
            raise InputError(f"{where}: {key} is not an array of numbers")
        if dataset.external or dataset.is_virtual:
            raise InputError(f"{where}: the numbers of {key} are stored in another file")
        if dataset.size and not _is_written(dataset):
            raise InputError(f"{where}: {key} was declared with {dataset.shape} and never written")
        if key in ("terminals", "timeouts"):
            data[key] = as_flags(dataset[...], f"{where}: {key}")
        else:
            data[key] = np.empty(dataset.shape, dtype=np.float32)
            if dataset.size:
                dataset.read_direct(data[key])
        if "crc32" in dataset.attrs and dataset.attrs["crc32"] != checksum(dataset):
            raise InputError(f"{where} is damaged in {key}: delete it, and it is made again")
    return data


def _is_written(dataset: h5py.Dataset) -> bool:
    """Whether all of it has a place in the file; what has none reads as zeros."""
    if dataset.chunks is None:
        return dataset.id.get_storage_size() > 0
    sizes = zip(dataset.shape, dataset.chunks, strict=True)
    return dataset.id.get_num_chunks() >= np.prod([-(-size // chunk) for size, chunk in sizes])


def as_flags(values: np.ndarray, where: str) -> np.ndarray:
    """bool. Raises InputError for values other than 0 and 1."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" or not ((values == 0) | (values == 1)).all():
        raise InputError(f"{where} has values other than 0 and 1")
    return values.astype(bool)


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
        for number, episode in enumerate(dataset.iterate_episodes()):
            where = f"Minari {dataset_id}, episode {number}"
            arrays = {
                key: np.asarray(getattr(episode, key))
                for key in ("observations", "actions", "rewards", "terminations", "truncations")
            }
            n = len(arrays["rewards"])
            for key, array in arrays.items():
                if array.dtype.kind not in "fiub":
                    raise InputError(f"{where}: {key} are not arrays of numbers")
                expected = n + (key == "observations")
                if len(array) != expected:
                    raise InputError(f"{where}: {len(array)} {key} for {n} rewards")
            obs = arrays["observations"].astype(np.float32)
            parts["observations"].append(obs[:-1])
            parts["next_observations"].append(obs[1:])
            parts["actions"].append(arrays["actions"].astype(np.float32))
            parts["rewards"].append(arrays["rewards"].astype(np.float32))
            terminals, timeouts = (
                as_flags(arrays[key], f"{where}: {key}") for key in ("terminations", "truncations")
            )
            timeouts[-1:] = True  # an episode's last row ends it, flagged or not
            parts["terminals"].append(terminals)
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
    is set but at the time limit, every stretch of that length was an episode that the limit cut,
    and what is left the beginning of another; otherwise dones are terminations.
    """
    keys = {
        "observations": "obs",
        "actions": "acs",
        "rewards": "rews",
        "next_observations": "next_obs",
        "terminals": "dones",
    }
    if getattr(vec, "seen", None) is not None:
        # Views side by side that are as wide as the state would be taken for it
        looks_like_state = vec.num_agents * vec.obs_dim == vec.state_dim
        if (folder / "states_0.npy").exists() or looks_like_state:
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
    if n == 0:
        raise InputError(f"{folder}: no transitions in it")
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
    if getattr(vec, "actuators", None) is not None:  # the robot's order, as D4RL's
        in_agents_order, data["actions"] = data["actions"], np.empty_like(data["actions"])
        data["actions"][:, vec.actuators] = in_agents_order
    rewards = [array.reshape(n) for array in parts["rewards"]]
    data["rewards"] = np.mean(rewards, axis=0, dtype=np.float64).astype(np.float32)
    dones = [array.reshape(n) for array in parts["terminals"]]
    dones = as_flags(np.stack(dones), f"{folder}: dones").any(axis=0)
    at_limit = np.arange(1, n + 1) % vec.max_episode_steps == 0
    if (dones & ~at_limit).any():
        at_limit[:] = False
    data["terminals"], data["timeouts"] = dones & ~at_limit, at_limit
    return data


def _read_npy(path: Path) -> np.ndarray:
    """An array of numbers, mapped and not yet read."""
    if not path.is_file():
        raise InputError(f"no such file: {path} (OMAR's folders have one per agent)")
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy raises many kinds
        raise InputError(f"{path} is no readable array: {error}") from error
    if not isinstance(array, np.ndarray) or not array.ndim or array.dtype.kind not in "fiub":
        raise InputError(f"{path} is not an array of numbers")
    return array
