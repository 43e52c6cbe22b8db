"""A name or a file -> one team dataset, and its decentralised split.

    python -m common.datasets check FILE.hdf5 --env halfcheetah

replays a file's `infos/qpos, infos/qvel` through the simulator and says how well the two agree.

D4RL's layout is one HDF5 file: `observations`, `actions` (all agents' side by side), `rewards`,
`terminals`, `timeouts` and, best, `next_observations`; a row is a transition, episodes follow one
another.
"""

import argparse
import fcntl
import hashlib
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from common import InputError, nearest
from common.envs import TASKS, make_vec

# Rows of the built-in data: as many as D4RL v2 has; of the particle tasks as the OTC paper has; a
# maze has one set, without a quality (D4RL's have 1, 2 and 4 million rows); and of family mpe as
# OMAR has, whose medium-replay is of unknown size; of SMAX as many as 10,000 episodes have
MILLION = 1_000_000
OF_FAMILY = {
    "particle": {"random": MILLION},
    "maze": {"": MILLION},
    "mpe": {"random": MILLION, "medium-replay": 250_000, "medium": MILLION, "expert": MILLION},
}
BUILT_IN_SIZES = {
    task: {"random": MILLION, "medium": MILLION, "medium-replay": replay}
    for task, replay in {"halfcheetah": 202_000, "walker2d": 302_000, "hopper": 402_000}.items()
} | {task: OF_FAMILY[row.family] for task, row in TASKS.items() if row.family in OF_FAMILY}
BUILT_IN_SIZES["halfcheetah-local"] = OF_FAMILY["mpe"]
BUILT_IN_SIZES["5m_vs_6m"] = {"random": 181_018, "medium": 364_953}
QUALITIES = ("random", "medium", "medium-replay", "expert", "medium-expert", "full-replay")
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
D4RL_MAZE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/maze2d/"
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


@dataclass
class TeamDataset:
    """n transitions of a team of N agents; where all see the same, obs holds it once."""

    obs: np.ndarray
    """(n, 1 or N, obs_dim) float32"""
    actions: np.ndarray
    """(n, N, action_dim) float32"""
    rewards: np.ndarray
    """(n,) float32, the team's"""
    next_obs: np.ndarray
    """(n, 1 or N, obs_dim) float32"""
    terminations: np.ndarray
    """(n,) bool: next_obs is worth nothing"""
    truncations: np.ndarray
    """(n,) bool: the episode ends here otherwise: time limit, end or cut of the data"""
    source: str
    """which data this is, in one line"""
    discrete: bool = False
    """actions are one-hot, and obs ends with the legal ones; see `common.envs.VecEnv`"""

    def __len__(self) -> int:
        return len(self.rewards)

    def agent(self, i: int) -> dict[str, np.ndarray]:
        """Agent i's own dataset: obs, next_obs (n, obs_dim), its actions (n, action_dim) and no
        other's, rewards, terminations and truncations (n,)."""
        seen = i if self.obs.shape[1] > 1 else 0
        return {
            "obs": self.obs[:, seen],
            "actions": np.ascontiguousarray(self.actions[:, i]),
            "rewards": self.rewards,
            "next_obs": self.next_obs[:, seen],
            "terminations": self.terminations,
            "truncations": self.truncations,
        }


# --- Names ---


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
    if quality and TASKS[task].family == "maze":
        raise InputError(f"--env {env}: a maze has one set of data, expected --env {task}")
    return task, quality


def data_name(task: str, quality: str) -> str:
    """The inverse of `parse_env`."""
    return f"{task}-{quality}" if quality else task


def cache_dir() -> Path:
    """Where the built-in data is kept: $OTC_CACHE_DIR or ~/.cache/otc."""
    return Path(os.environ.get("OTC_CACHE_DIR") or "~/.cache/otc").expanduser()


def built_in_path(task: str, quality: str, size: int) -> Path:
    """A built-in file's place in the cache; its name changes with what made it: the policies that
    ship, and the code of the task and of its behaviours where that is in this folder."""
    here = Path(__file__).parent
    makers = {
        "mujoco": [f"behaviours/{task}.npz"],
        "particle": ["envs/particle.py", "behaviours/uniform.py"],
        "maze": ["envs/maze.py", "behaviours/waypoints.py"],
        "mpe": ["envs/particle.py", "envs/mpe.py", f"envs/{task}-prey.npz"],
        "smax": ["envs/smax.py", "behaviours/battles.py", "behaviours/uniform.py"],
    }[TASKS[task].family]
    if TASKS[task].local:
        makers.append("envs/mujoco.py")
    if TASKS[task].local or TASKS[task].family == "mpe":
        makers += ["behaviours/uniform.py", "behaviours/teams.py"]
    if TASKS[task].family in ("mpe", "smax") and quality != "random":
        makers.append(f"behaviours/{task}.npz")
    checksum = 0
    for maker in makers:
        if (here / maker).exists():  # only a chase has a prey
            checksum = zlib.crc32((here / maker).read_bytes(), checksum)
    return cache_dir() / f"{data_name(task, quality)}-{size}-{checksum:08x}.hdf5"


def is_omar(dataset: str) -> bool:
    """Whether `--dataset` is a folder with OMAR's files."""
    return (Path(dataset) / "obs_0.npy").exists()


def load(
    env: str,
    dataset: str = "built-in",
    size: int | None = None,
    split: str | None = None,
    discrete: bool = False,
) -> TeamDataset:
    """The data of `env`, task-quality or package.module:factory (then `dataset` must be a file
    or folder).

    `dataset` is built-in, d4rl, minari, a Minari id, a file in D4RL's layout or a folder in OMAR's.
    Built-in data is made once, d4rl and minari are fetched once. `size` is the number of
    transitions: built-in data is made at that size; of other data whole episodes are taken, spread
    evenly, the last one cut. `discrete` is the kind of actions that the learner is for.
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
    if ":" in env and not is_file:
        raise InputError(
            f"--dataset {dataset}: --env {env} has no data, expected FILE.hdf5 or FOLDER"
        )
    families = {"d4rl": ("mujoco", "maze"), "minari": ("mujoco",)}
    if dataset in families and TASKS[task].family not in families[dataset]:
        raise InputError(f"--dataset {dataset} has no data of {task}: expected built-in or a file")
    if named and not quality and TASKS[task].family != "maze":
        examples = ", ".join(f"{task}-{q}" for q in BUILT_IN_SIZES.get(task, QUALITIES[:3]))
        raise InputError(f"--env {env} names no data quality, expected for example {examples}")
    vec = make_vec(task, 1, 0, split)
    vec.close()
    if vec.discrete != discrete:
        kinds = ("continuous", "discrete") if discrete else ("discrete", "continuous")
        hint = "one of the other scripts" if discrete else "otc_cql_discrete.py"
        raise InputError(f"--env {env}: {kinds[0]} actions, this script is for {kinds[1]}: {hint}")

    if dataset == "built-in":
        path = _built_in(task, quality, size)
        made = "made on this machine, not D4RL"
        if TASKS[task].family == "smax":
            made = "SMAX, made on this machine, not SMAC"
        data, name = _read_hdf5(path), f"built-in {env} ({made})"
    elif dataset == "d4rl":
        path = _d4rl(task, quality)
        data, name = _read_hdf5(path), f"D4RL {path.stem}"
    elif is_folder:
        path = Path(dataset)
        data, name = _read_omar(path, task, vec), "OMAR's layout"
    elif is_file:
        path = Path(dataset)
        data, name = _read_hdf5(path), "file"
    else:
        path = f"mujoco/{_robot(task)}/{quality}-v0" if dataset == "minari" else dataset
        data, name = _read_minari(path), "Minari"
    team = _team(data, task, vec, str(path))
    total = len(team)
    if size is not None and size != total:
        if size > total:
            raise InputError(f"--dataset-size {size}: {path} has only {total} transitions")
        team = _thin(team, size)
    count = f"{len(team):,} transitions" + (f" of {total:,}" if len(team) < total else "")
    return replace(team, source=f"{name}: {count}, {path}")


# --- One team dataset out of raw arrays ---


def _team(data: dict[str, np.ndarray], task: str, vec: Any, where: str) -> TeamDataset:
    """Checks arrays named as in D4RL and lays them out for the team; empties `data`."""
    lengths = {key: len(data[key]) for key in data}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise InputError(f"{where}: the keys differ in length: {listed}")
    n = lengths["rewards"]
    if n == 0:
        raise InputError(f"{where}: no transitions in it")
    if task == "ant":
        # D4RL's 84 contact forces are all zero, v5's 78 are not part of the task
        for key in ("observations", "next_observations"):
            if key in data and data[key].size // n in (111, 105):
                data[key] = np.ascontiguousarray(data[key].reshape(n, -1)[:, :27])

    num_agents, obs_dim, action_dim = vec.num_agents, vec.obs_dim, vec.action_dim
    obs_widths = (obs_dim, num_agents * obs_dim)
    if task in TASKS and TASKS[task].family in ("mpe", "smax"):  # nobody sees what another does
        obs_widths = (num_agents * obs_dim,)
    seen = getattr(vec, "seen", None)
    if seen is not None:  # the agents see parts of the full state, which data may hold instead
        obs_widths = (vec.state_dim, num_agents * obs_dim)
        for key in ("observations", "next_observations"):
            if key in data and data[key].size // n == vec.state_dim:
                data[key] = data[key].reshape(n, -1)[:, seen.ravel()]
    widths = {
        "observations": obs_widths,
        "next_observations": (data["observations"].size // n,),
        "actions": (num_agents * action_dim,),
        "rewards": (1,),
        "terminals": (1,),
        "timeouts": (1,),
    }
    for key in data:
        width = data[key].size // n
        if width not in widths[key]:
            expected = " or ".join(str(w) for w in dict.fromkeys(widths[key]))
            raise InputError(f"{where}: {key} has width {width}, expected {expected} for {task}")
        if key not in ("terminals", "timeouts") and not np.isfinite(data[key]).all():
            row = np.flatnonzero(~np.isfinite(data[key].reshape(n, -1)).all(axis=1))[0]
            raise InputError(f"{where}: {key} has a non-finite value in row {row}")

    actions = data.pop("actions").reshape(n, num_agents, action_dim)
    excess = np.maximum(vec.action_low - actions.min(axis=0), actions.max(axis=0) - vec.action_high)
    if excess.max() > 1e-5:
        raise InputError(
            f"{where}: actions leave the box of {task}, "
            f"{vec.action_low.min():g} to {vec.action_high.max():g}, by up to {excess.max():.3g}"
        )
    np.clip(actions, vec.action_low, vec.action_high, out=actions)
    actions = vec.from_box(actions)

    obs = data.pop("observations").reshape(n, -1, obs_dim)
    rewards = data.pop("rewards").reshape(n)
    terminations = data.pop("terminals").reshape(n)
    truncations = data.pop("timeouts").reshape(n) & ~terminations
    if "next_observations" in data:
        next_obs = data.pop("next_observations").reshape(obs.shape)
    else:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        next_obs[terminations] = obs[terminations]
        unknown = _next_unknown(terminations, truncations)
        truncations = (
            np.append(unknown[1:], False) & ~terminations
        )  # the row before ends the episode
        keep = ~unknown
        if not keep.any():
            raise InputError(f"{where}: no row's next state is known (no next_observations)")
        obs, actions, rewards, next_obs = obs[keep], actions[keep], rewards[keep], next_obs[keep]
        terminations, truncations = terminations[keep], truncations[keep]
    truncations[-1] = not terminations[-1]
    if vec.discrete:
        _check_discrete(obs, actions, next_obs, where)
    ends = terminations, truncations
    return TeamDataset(obs, actions, rewards, next_obs, *ends, where, vec.discrete)


def _check_discrete(obs, actions, next_obs, where: str) -> None:
    """Raises InputError unless masks are of 0 and 1 and every agent takes one action that is legal,
    or none where none is."""
    legal = obs[..., -actions.shape[2] :]
    for name, values in (
        ("observations", legal),
        ("next_observations", next_obs[..., -actions.shape[2] :]),
        ("actions", actions),
    ):
        wrong = ~((values == 0) | (values == 1)).reshape(len(values), -1).all(axis=1)
        if wrong.any():
            what = "one-hot actions" if name == "actions" else "masks of legal actions at the end"
            raise InputError(f"{where}: {name}, row {wrong.argmax()}: expected {what}, of 0 and 1")
    expected = legal.any(axis=-1)  # a dead agent takes none
    wrong = ((actions.sum(axis=2) != expected) | ((actions > legal).any(axis=2))).any(axis=1)
    if wrong.any():
        raise InputError(
            f"{where}: actions, row {wrong.argmax()}: expected one legal action of every agent, "
            "and none of a dead one"
        )


def _next_unknown(terminals: np.ndarray, timeouts: np.ndarray) -> np.ndarray:
    """(n,) bool: the rows of no use in a file without next_observations. The next row's obs is the
    next state, but not after a timeout or at the end; after a terminal row it does not matter."""
    unknown = timeouts & ~terminals
    unknown[-1] = not terminals[-1]
    return unknown


def _thin(team: TeamDataset, size: int) -> TeamDataset:
    """`size` rows in whole episodes spread evenly over the data: an episode is taken whenever less
    than size/n of all rows up to its end are. The last one is cut, as a truncation."""
    ends = np.flatnonzero(team.terminations | team.truncations) + 1
    rows, taken, start = [], 0, 0
    for end in ends.tolist():
        if taken * len(team) < size * end:
            rows.append(np.arange(start, min(end, start + size - taken)))
            taken += len(rows[-1])
        start = end
    rows = np.concatenate(rows)
    arrays = {k: v[rows] for k, v in vars(team).items() if isinstance(v, np.ndarray)}
    arrays["truncations"][-1] = not arrays["terminations"][-1]
    return replace(team, **arrays)


# --- Where raw arrays come from ---


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} is no readable HDF5 file (cut short?): {error}") from error


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """KEYS, and next_observations where present, in the file's shapes: float32, flags bool."""
    data = {}
    with _open(path) as file:
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


def _built_in(task: str, quality: str, size: int | None) -> Path:
    """The built-in file, made first where it is not there yet."""
    env = data_name(task, quality)
    if quality not in BUILT_IN_SIZES.get(task, {}):
        names = [data_name(t, q) for t, qualities in BUILT_IN_SIZES.items() for q in qualities]
        hint = nearest(env, names)
        more = " (--dataset d4rl has more)" if TASKS[task].family == "mujoco" else ""
        raise InputError(f"no built-in data for {env}: {hint}{more}")
    full = BUILT_IN_SIZES[task][quality]
    size = size or full
    if size > full:
        raise InputError(f"--dataset-size {size}: expected at most {full} for {env}")
    path = built_in_path(task, quality, size)
    if not path.exists():
        from common.behaviours.rollout import make

        make(task, quality, size, path)
    return path


def _d4rl(task: str, quality: str) -> Path:
    """D4RL's v2 file, of a maze the sparse v1 file, in $D4RL_DATASET_DIR or ~/.d4rl/datasets,
    downloaded first if not there."""
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    if TASKS[task].family == "maze":
        url, name = D4RL_MAZE_URL, f"{task}-sparse-v1.hdf5"
    else:
        url, name = D4RL_URL, f"{_robot(task)}_{quality.replace('-', '_')}-v2.hdf5"
    path = folder / name
    if not path.exists():
        _download(url + name, path)
    return path


def _robot(task: str) -> str:
    """What D4RL and Minari call a MuJoCo task, local or not."""
    return task.removesuffix("-local")


@contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """`path.partial`, locked, to make `path` from; None where `path` is there, which another
    process may still be making at first: then waits for it.

    The partial file stays if the body fails, unless it is empty.
    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    while True:
        with open(partial, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note = f"waiting for another process that is making {path}"
                print(note, file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_SH)  # no obstacle to HDF5, which locks what it reads
                continue
            if not partial.exists() or not os.path.samestat(os.stat(lock.fileno()), partial.stat()):
                continue  # another has moved the locked file into place, or taken it away
            try:
                yield None if path.exists() else partial
            finally:
                if partial.exists() and partial.stat().st_size == 0:
                    partial.unlink()
            return


def _download(url: str, path: Path) -> None:
    """`url` -> `path` through `path.partial`, which the next call continues if this one is cut."""
    try:
        with made_once(path) as partial:
            if partial is not None:
                _fetch(url, path, partial)
    except (OSError, HTTPException) as error:
        raise InputError(
            f"cannot download {url}: {error}; or put the file by hand at {path}"
        ) from error


def _fetch(url: str, path: Path, partial: Path) -> None:
    """Continue `partial`, and move it to `path` when it is whole."""
    start = partial.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after `start`: what is there cannot be trusted
            raise
        start = 0
        response = urllib.request.urlopen(url, timeout=60)
    with response:
        resumed = response.status == 206
        done = start if resumed else 0
        length = response.headers["Content-Length"]
        total = None if length is None else done + int(length)
        print(f"{'resuming' if resumed else 'downloading'} {url}", file=sys.stderr)
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024)
        with bar, open(partial, "ab" if resumed else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    if total is not None and done != total:
        raise ConnectionError(f"cut off after {done} of {total} bytes, run again to continue")
    try:
        h5py.File(partial, "r", locking=False).close()
    except OSError as error:
        partial.unlink()
        raise InputError(f"{url} sent no HDF5 file; put it by hand at {path}") from error
    with open(partial, "rb") as file:
        print(f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}  {path}", file=sys.stderr)
    partial.rename(path)


def _read_minari(dataset_id: str) -> dict[str, np.ndarray]:
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


def _read_omar(folder: Path, task: str, vec: Any) -> dict[str, np.ndarray]:
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


# --- python -m common.datasets check FILE ---


def check(path: Path, task: str, rows: int = 10_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Steps the simulator from `rows` rows of a file, chosen by `seed`, and compares.

    Row t's `infos/qpos, infos/qvel` are the state before its action. Returns each row's largest
    absolute difference, (m,) float64: observations, next_observations (nan: not in the file),
    rewards; and terminals (m,) bool.
    Raises InputError for a file without these keys or of other widths than the task's.
    """
    vec = make_vec(task, 1, 0)
    vec.reset()
    data = _read_hdf5(path)
    terminals, timeouts = data["terminals"].reshape(-1), data["timeouts"].reshape(-1)
    all_known = "next_observations" in data
    team = _team(data, task, vec, str(path))
    # the file's row of each of the team's
    row = np.arange(len(team)) if all_known else np.flatnonzero(~_next_unknown(terminals, timeouts))
    states = []
    with _open(path) as file:
        for key, values in zip(("infos/qpos", "infos/qvel"), vec.qpos_qvel(), strict=True):
            shape, has = (len(terminals), values.shape[1]), file.get(key)
            if not isinstance(has, h5py.Dataset) or has.shape != shape:
                has = f"shape {has.shape}" if isinstance(has, h5py.Dataset) else "none"
                raise InputError(f"{path}: expected {key} of shape {shape} for {task}, found {has}")
            states.append(has[...])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(team))[:rows])
    found = {key: np.empty(len(chosen)) for key in ("observations", "next_observations", "rewards")}
    for k, t in enumerate(chosen):
        obs = vec.set_state(0, *(values[row[t]] for values in states))
        _, rewards, _, _, next_obs = vec.step(team.actions[t][None])
        found["observations"][k] = np.abs(obs - team.obs[t]).max()
        found["next_observations"][k] = np.abs(next_obs[0] - team.next_obs[t]).max()
        found["rewards"][k] = abs(float(rewards[0]) - team.rewards[t])
    vec.close()
    found = {key: np.where(np.isnan(values), np.inf, values) for key, values in found.items()}
    if not all_known:
        found["next_observations"][team.terminations[chosen]] = np.nan  # not in the file
    return {**found, "terminals": team.terminations[chosen]}


def agreement(found: dict[str, np.ndarray], task: str) -> tuple[str, bool]:
    """What `check` found as a table; whether 95 % of next states and rewards agree to 1e-4.

    Not judged are the rewards of terminal rows, and Ant's.
    """
    ended = found["terminals"]
    table = {
        "observations": found["observations"],
        "next_observations": found["next_observations"][~np.isnan(found["next_observations"])],
        "rewards": found["rewards"][~ended],
        "rewards of terminal rows": found["rewards"][ended],
    }
    lines = [f"{'absolute difference':26}{'rows':>9}{'median':>11}{'max':>11}{'within 1e-4':>14}"]
    agree = True
    for key, values in table.items():
        if len(values):
            share = (values <= 1e-4).mean()
            numbers = f"{len(values):9,}{np.median(values):11.2e}{values.max():11.2e}"
            lines.append(f"{key:26}{numbers}{100 * share:12.2f} %")
            judged = key == "next_observations" or (key == "rewards" and task != "ant")
            agree &= not judged or bool(share >= 0.95)
    if ended.any():
        lines.append("Terminal rows: D4RL v2 pays the healthy bonus of 1, Gymnasium's v5 does not.")
    if task == "ant":
        # it measures speed from a torso position that is one simulation substep old
        lines.append("Rewards: Ant's depend a little on the step before, which is not replayed.")
    lines.append(f"Data and simulator {'agree' if agree else 'DISAGREE'}.")
    return "\n".join(lines), agree


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit status: 0 agreement, 1 disagreement, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m common.datasets")
    parser.add_argument("command", choices=["check"], help="replay a file through the simulator")
    parser.add_argument("file", type=Path, help="HDF5 file with infos/qpos and infos/qvel")
    parser.add_argument("--env", help="task; by default the one that the file's name starts with")
    parser.add_argument("--rows", type=int, default=10_000, help="how many rows to replay")
    parser.add_argument("--seed", type=int, default=0, help="which rows")
    args = parser.parse_args(argv)
    try:
        if args.rows < 1 or args.seed < 0:
            raise InputError(f"--rows {args.rows} --seed {args.seed}: expected at least 1 and 0")
        tasks = [task for task, row in TASKS.items() if row.family == "mujoco" and not row.local]
        task = max((t for t in tasks if args.file.name.startswith(t)), key=len, default="")
        if args.env:
            task = parse_env(args.env)[0]
        if task not in tasks:
            raise InputError(f"which task is {args.file}? --env {', '.join(tasks)}")
        found = check(args.file, task, args.rows, args.seed)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    text, agree = agreement(found, task)
    print(f"{args.file}: {len(found['rewards']):,} rows replayed in {task}\n{text}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
