"""Raw arrays -> one team dataset, checked, and its decentralised split."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common import InputError
from common.envs import TASKS

COLUMNS = ("obs", "actions", "rewards", "next_obs", "terminations", "truncations")
LARGEST = 1e15  # number that a million squares of still have a sum


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
    own_obs: np.ndarray | None = None
    """(N, obs_dim) bool: which entries are the agent's own; the others pad a smaller observation.
    None: nothing is padded"""
    own_actions: np.ndarray | None = None
    """(N, action_dim) bool: likewise of the actions"""

    def __len__(self) -> int:
        return len(self.rewards)

    def mean_return(self) -> float:
        """Mean return of the episodes that the data holds, without the last, which may be cut, if
        there are others. Files without next_observations lack a timed-out episode's last reward."""
        ends = np.flatnonzero(self.terminations | self.truncations) + 1
        sums = np.add.reduceat(self.rewards, np.append(0, ends[:-1]), dtype=np.float64)
        return float(sums[:-1].mean() if len(sums) > 1 else sums[0])

    def fingerprint(self) -> str:
        """Number of rows and a checksum of all of them: of the same data the same."""
        found = hashlib.blake2b(digest_size=8)
        for name in COLUMNS:
            found.update(np.ascontiguousarray(getattr(self, name)))
        return f"{len(self):,} transitions with checksum {found.hexdigest()}"

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


def lay_out(data: dict[str, np.ndarray], task: str, vec: Any, where: str) -> TeamDataset:
    """Checks arrays named as in D4RL and lays them out for the team; empties `data`."""
    lengths = {key: len(data[key]) for key in data}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {n}" for key, n in lengths.items())
        raise InputError(f"{where}: the keys differ in length: {listed}")
    n = lengths["rewards"]
    if n == 0:
        raise InputError(f"{where}: no transitions in it")
    if task in ("ant", "ant-local"):
        # D4RL's 84 contact forces are all zero, v5's 78 are not part of the task
        for key in ("observations", "next_observations"):
            if key in data and data[key].size // n in (111, 105):
                data[key] = np.ascontiguousarray(data[key].reshape(n, -1)[:, :27])

    num_agents, obs_dim, action_dim = vec.num_agents, vec.obs_dim, vec.action_dim
    obs_widths = (obs_dim, num_agents * obs_dim)
    sees_alone = "mpe", "smax", "smac"  # nobody sees what another does
    if task in TASKS and TASKS[task].family in sees_alone:
        obs_widths = (num_agents * obs_dim,)
    if vec.own_obs is not None:  # of different sizes, side by side, with or without the padding
        obs_widths = (int(vec.own_obs.sum()), num_agents * obs_dim)
    seen = getattr(vec, "seen", None)
    if seen is not None:  # the agents see parts of the full state, which data may hold instead
        obs_widths = (vec.state_dim, num_agents * obs_dim)
        for key in ("observations", "next_observations"):
            if key in data and data[key].size // n == vec.state_dim:
                state = data[key].reshape(n, -1)
                if seen.min() < 0:  # a 0 that pads smaller views
                    state = np.pad(state, ((0, 0), (0, 1)))
                data[key] = state[:, seen.ravel()]
    for key, own in (
        ("observations", vec.own_obs),
        ("next_observations", vec.own_obs),
        ("actions", vec.own_actions),
    ):
        if own is not None and key in data:
            data[key] = pad(data[key].reshape(n, -1), own)
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
        if key not in ("terminals", "timeouts") and np.abs(data[key]).max() > LARGEST:
            row, at = np.unravel_index(np.abs(data[key]).argmax(), data[key].shape)[0], LARGEST
            raise InputError(
                f"{where}: {key} has {np.abs(data[key]).max():g} in row {row}; squares of numbers "
                f"beyond {at:g} are no float32"
            )

    actions = data.pop("actions").reshape(n, -1)
    if getattr(vec, "actuators", None) is not None:  # of a robot's single agent, in its order
        actions = actions[:, vec.actuators]
    actions = actions.reshape(n, num_agents, action_dim)
    low, high = vec.action_low, vec.action_high
    excess = np.maximum(low - actions.min(axis=0), actions.max(axis=0) - high)
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    if (excess > 5e-6 * (high - low) + rounding).any():
        raise InputError(
            f"{where}: actions leave the box of {task}, "
            f"{low.min():g} to {high.max():g}, by up to {excess.max():.3g}"
        )
    np.clip(actions, low, high, out=actions)
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
        unknown = next_unknown(terminations, truncations)
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
    own_actions, pinned = vec.own_actions, vec.action_low == vec.action_high
    if pinned.any():  # no one moves what cannot move
        own_actions = ~pinned if own_actions is None else own_actions & ~pinned
    if own_actions is not None and not own_actions.any(axis=1).all():
        still = own_actions.any(axis=1).argmin()
        raise InputError(f"{task}: agent {still} can move nothing, its box of actions is a point")
    own = vec.own_obs, own_actions
    return TeamDataset(obs, actions, rewards, next_obs, *ends, where, vec.discrete, *own)


def check_lengths(team: TeamDataset, limit: int, where: str) -> None:
    """Raises InputError where episodes run into one another: one is longer than the task's limit,
    and no row says that it was cut."""
    truncations = team.truncations
    ends = np.flatnonzero(team.terminations | truncations) + 1
    lengths = np.diff(ends, prepend=0)
    longest = int(lengths.argmax())
    if lengths[longest] > limit and not truncations[:-1].any():
        start = ends[longest] - lengths[longest]
        raise InputError(
            f"{where}: {lengths[longest]:,} rows from row {start} on are one episode, the task's "
            f"have at most {limit:,}: expected timeouts that say where episodes were cut"
        )


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


def pad(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rows in which the agents' own entries alone stand side by side, or with padding, which may
    hold anything: with padding of zeros, (n, N * size). Other widths are left as they are."""
    if rows.shape[1] == own.sum():
        padded = np.zeros((len(rows), own.size), rows.dtype)
        padded[:, own.ravel()] = rows
        return padded
    if rows.shape[1] == own.size:
        return np.where(own.ravel(), rows, 0)
    return rows


def next_unknown(terminals: np.ndarray, timeouts: np.ndarray) -> np.ndarray:
    """(n,) bool: the rows of no use in a file without next_observations. The next row's obs is the
    next state, but not after a timeout or at the end; after a terminal row it does not matter."""
    unknown = timeouts & ~terminals
    unknown[-1] = not terminals[-1]
    return unknown


def thin(team: TeamDataset, size: int) -> TeamDataset:
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
    arrays = {key: getattr(team, key)[rows] for key in COLUMNS}
    arrays["truncations"][-1] = not arrays["terminations"][-1]
    return replace(team, **arrays)
