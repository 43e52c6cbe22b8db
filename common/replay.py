"""Offline data and growing online data on the device, drawn per group (agent and seed).

The offline data is held once, whatever the number of seeds; each seed has its own online data.
Observations and rewards belong to the team, actions are kept per agent: a group's batch holds its
own agent's actions and no other's.

Where agents die (discrete tasks, see `common.envs.VecEnv`), what follows is nothing to learn from:
an agent's rows in which it is dead stand for others of its own in which it is alive, evenly spread
over the offline data or over the same deployment.

An index counts a group's own transitions: 0 ... num_offline-1 are offline, then come its online
transitions in the order of their collection. Draws and gathers never wait for the host, so that
they can be part of a CUDA graph.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch

from common import InputError
from common.datasets import TeamDataset

COLUMNS = ("obs", "actions", "rewards", "next_obs", "terminations")
STORED = (*COLUMNS, "truncations")


class Replay:
    """Merged data B^k and latest online data D^k of every group, g = seed_index * num_agents +
    agent.

    Args:
        dataset: the team's offline data, n transitions.
        num_seeds: seeds that train together, S; groups G = S * num_agents.
        deployments, deployment_steps: K and M; room for K * M online transitions per seed.
        device: where everything lives.
    """

    def __init__(
        self,
        dataset: TeamDataset,
        num_seeds: int,
        deployments: int,
        deployment_steps: int,
        device: torch.device | str = "cpu",
    ):
        self.num_offline = len(dataset.rewards)
        self.num_agents = dataset.actions.shape[1]
        self.num_seeds = num_seeds
        self.num_groups = num_seeds * self.num_agents
        self.deployment_steps = deployment_steps
        self.capacity = deployments * deployment_steps
        self.device = torch.device(device)
        self.num_rows = self.num_offline + num_seeds * self.capacity

        def room(arrays, *shape):
            """(len(arrays), num_rows, *shape): the offline rows filled, the online ones zero."""
            storage = torch.zeros(len(arrays), self.num_rows, *shape, device=self.device)
            for row, array in zip(storage, arrays, strict=True):
                row[: self.num_offline] = torch.as_tensor(array)
            return storage

        agents = [dataset.agent(i) for i in range(self.num_agents)]
        viewers = agents if dataset.obs.shape[1] > 1 else agents[:1]  # 1: all agents see the same
        obs_dim, action_dim = dataset.obs.shape[2], dataset.actions.shape[2]
        self.obs = room([a["obs"] for a in viewers], obs_dim)
        self.next_obs = room([a["next_obs"] for a in viewers], obs_dim)
        self.actions = room([a["actions"] for a in agents], action_dim)
        self.rewards = room([dataset.rewards])
        self.terminations = room([dataset.terminations])
        self.truncations = room([dataset.truncations])
        # The row that each row stands for (N, num_rows), where agents die
        self.stand_ins = None
        if dataset.discrete:
            rows = torch.arange(self.num_rows, device=self.device)
            self.stand_ins = rows.repeat(self.num_agents, 1)
        self.replace_dead(0, self.num_offline)
        # Which entries are the agents' own, (G, 1, size); None where none is padded
        self.own_obs, self.own_actions = (
            None
            if own is None
            else self.per_group(torch.as_tensor(own[:, None]).float()).to(device)
            for own in (dataset.own_obs, dataset.own_actions)
        )
        # The agent that explored, -1: none did; on the host, as no update needs it
        self.explorer = torch.full((num_seeds, self.capacity), -1, dtype=torch.int8)

        group = torch.arange(self.num_groups, device=self.device).unsqueeze(1)  # (G, 1)
        self.agent_rows = (group % self.num_agents) * self.num_rows
        self.viewer_rows = (group % len(viewers)) * self.num_rows
        self.seed_rows = (group // self.num_agents) * self.capacity
        # Sizes are tensors, so that a captured graph sees them grow.
        self.num_online = torch.zeros((), dtype=torch.long, device=self.device)

    def add(
        self, obs, actions, rewards, next_obs, terminations, truncations=None, explorer=None
    ) -> None:
        """Merge one deployment: B^k = B^{k-1} with D^k (Algorithm 1, line 5).

        Shapes: obs, next_obs (S, M, N, obs_dim), actions (S, M, N, action_dim), rewards,
        terminations, truncations (default: none), explorer (S, M): the agent that explored, -1 (the
        default) where none did. Where the offline data holds one observation for all agents, the
        first one's are taken. Raises ValueError for other shapes, and for more deployments than
        there is room for.
        """
        start = int(self.num_online)
        if start + self.deployment_steps > self.capacity:
            raise ValueError(
                f"no room for another deployment: {start} of {self.capacity} rows used"
            )
        each = (self.num_seeds, self.deployment_steps)
        explorer = np.full(each, -1) if explorer is None else explorer
        truncations = np.zeros(each, bool) if truncations is None else truncations
        team = (*each, self.num_agents)
        for name, array, shape in (
            ("obs", obs, (*team, self.obs.shape[2])),
            ("actions", actions, (*team, self.actions.shape[2])),
            ("rewards", rewards, each),
            ("next_obs", next_obs, (*team, self.obs.shape[2])),
            ("terminations", terminations, each),
            ("truncations", truncations, each),
            ("explorer", explorer, each),
        ):
            if array.shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, not {tuple(array.shape)}")
        for s in range(self.num_seeds):
            first = self.num_offline + s * self.capacity + start
            rows = slice(first, first + self.deployment_steps)
            for agent in range(len(self.obs)):
                self.obs[agent, rows] = torch.as_tensor(obs[s, :, agent]).to(self.device)
                self.next_obs[agent, rows] = torch.as_tensor(next_obs[s, :, agent]).to(self.device)
            for agent in range(self.num_agents):
                self.actions[agent, rows] = torch.as_tensor(actions[s, :, agent]).to(self.device)
            self.rewards[0, rows] = torch.as_tensor(rewards[s]).to(self.device)
            self.terminations[0, rows] = torch.as_tensor(terminations[s]).to(self.device).float()
            self.truncations[0, rows] = torch.as_tensor(truncations[s]).to(self.device).float()
            self.replace_dead(rows.start, rows.stop)
        self.explorer[:, start : start + self.deployment_steps] = torch.as_tensor(explorer)
        self.num_online += self.deployment_steps

    def check_views(self, obs) -> None:
        """Raises InputError where the offline data holds one observation for all agents and these
        (..., N, obs_dim) differ."""
        if len(self.obs) == 1 and not (obs == obs[..., :1, :]).all():
            raise InputError(
                "the data has one observation for all agents, and the task's agents see different "
                f"ones: expected {self.num_agents} in a row of the data, side by side"
            )

    def replace_dead(self, start: int, stop: int) -> None:
        """Let the rows start ... stop-1 in which an agent is dead stand for those in which it is
        alive."""
        if self.stand_ins is None:
            return
        legal = self.obs[:, start:stop, -self.actions.shape[2] :]
        for agent, alive in enumerate((legal > 0).any(2).expand(self.num_agents, -1)):
            living, dead = (torch.nonzero(x).squeeze(1) + start for x in (alive, ~alive))
            if len(living):
                spread = torch.arange(len(dead), device=self.device) * len(living)
                self.stand_ins[agent, dead] = living[spread // max(1, len(dead))]

    def _draw(self, num_samples: int, size) -> torch.Tensor:
        # float64: a float32 uniform has too few values to reach each of a million transitions
        # equally often.
        shape = (self.num_groups, num_samples)
        return (torch.rand(shape, device=self.device, dtype=torch.float64) * size).long()

    def draw_merged(self, num_samples: int) -> torch.Tensor:
        """(G, num_samples) indices, uniform over B^k, with replacement."""
        return self._draw(num_samples, self.num_offline + self.num_online)

    def draw_offline(self, num_samples: int) -> torch.Tensor:
        """(G, num_samples) indices, uniform over B^0, with replacement."""
        return self._draw(num_samples, self.num_offline)

    def draw_teams(self, num_samples: int) -> torch.Tensor:
        """`draw_offline`, the same indices for all agents of a seed."""
        shape = (self.num_seeds, num_samples)
        index = torch.rand(shape, device=self.device, dtype=torch.float64) * self.num_offline
        return index.long().repeat_interleave(self.num_agents, dim=0)

    def draw_online(self, num_samples: int) -> torch.Tensor:
        """(G, num_samples) indices, uniform over D^1 ... D^k, with replacement."""
        return self.num_offline + self._draw(num_samples, self.num_online)

    def draw_latest(self, num_samples: int) -> torch.Tensor:
        """(G, num_samples) indices into D^k, each transition at most once, in random order."""
        keys = torch.rand(self.num_groups, self.deployment_steps, device=self.device)
        return keys.topk(num_samples, dim=1).indices + self.latest_start

    def latest(self) -> torch.Tensor:
        """(G, M) indices of the whole of D^k, in order. Waits for the host, as the next does."""
        end = self.num_offline + int(self.num_online)
        return torch.arange(end, device=self.device)[-self.deployment_steps :].expand(
            self.num_groups, -1
        )

    def sample_of_all(self, most: int) -> torch.Tensor:
        """(G, n) indices of all of B^k, or of `most` draws where it has more."""
        end = self.num_offline + int(self.num_online)
        if most < end:
            return self.draw_merged(most)
        return torch.arange(end, device=self.device).expand(self.num_groups, -1)

    @property
    def latest_start(self) -> torch.Tensor:
        """Index of the first transition of D^k."""
        return self.num_offline + self.num_online - self.deployment_steps

    def obs_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each agent's offline observations, (G, 1, obs_dim) each;
        of the rows in which it is dead as well, whose zeros so are not far out of scale."""
        return self._statistics(self.obs[:, : self.num_offline])

    def change_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the change s' - s."""
        offline = slice(self.num_offline)
        return self._statistics(self.next_obs[:, offline] - self.obs[:, offline])

    def _statistics(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = values.mean(1, keepdim=True), values.std(1, correction=0, keepdim=True)
        return self.per_group(mean), self.per_group(std)

    def per_group(self, viewed: torch.Tensor) -> torch.Tensor:
        """What belongs to each viewer, (1 or N, ...), for every group: (G, ...)."""
        return viewed.repeat(self.num_groups // len(viewed), *[1] * (viewed.dim() - 1))

    def reward_std(self) -> torch.Tensor:
        """Standard deviation of the offline rewards, ()."""
        return self.rewards[:, : self.num_offline].std(correction=0)

    def is_online(self, index: torch.Tensor) -> torch.Tensor:
        """Whether each index (G, n) is an online transition."""
        return index >= self.num_offline

    def gather(
        self, index: torch.Tensor, columns: tuple[str, ...] = COLUMNS
    ) -> dict[str, torch.Tensor]:
        """The transitions of `index` (G, n), all of them or some columns.

        Returns:
            obs, next_obs (G, n, obs_dim), actions (G, n, action_dim), rewards, terminations (G, n);
            all float32. Discrete data's terminations are also the agent's own death; they need
            next_obs.
        """
        row = index + self.is_online(index) * self.seed_rows
        if self.stand_ins is not None:
            row = self.stand_ins.take(self.agent_rows + row)
        batch = self._take(row, row + self.viewer_rows, row + self.agent_rows, columns)
        if self.stand_ins is not None and "terminations" in columns:
            dead = (batch["next_obs"][..., -self.actions.shape[2] :] <= 0).all(2)
            batch["terminations"] = torch.maximum(batch["terminations"], dead.float())
        return batch

    def gather_teams(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """`gather` of offline transitions for learners that train a team together: rows stay what
        they are where agents die, and their terminations are the team's. With indices of
        `draw_teams` the agents of a seed get the same transitions."""
        return self._take(index, index + self.viewer_rows, index + self.agent_rows)

    def gather_history(self, index: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """What happened in the `length` rows before offline transitions (G, n), oldest first.

        Returns:
            obs (G, n, length, obs_dim), actions (G, n, length, action_dim), and is_there (G, n,
            length): 1, or 0 where the episode had not begun.
        """
        back = torch.arange(length, 0, -1, device=self.device)
        index = index.unsqueeze(2)
        rows = (index - back).clamp(min=0)
        viewer_rows, agent_rows = self.viewer_rows.unsqueeze(2), self.agent_rows.unsqueeze(2)
        columns = ("obs", "actions")
        batch = self._take(rows, rows + viewer_rows, rows + agent_rows, columns)
        batch["is_there"] = (self.elapsed[index] >= back).float()
        return batch

    def goes_on(self) -> torch.Tensor:
        """Whether the next row goes on from each offline one, (num_offline,) bool: the episode does
        not end in between, and it begins in the very state in which that one ended."""
        n = self.num_offline
        goes_on = (self.terminations[0, :n] == 0) & (self.truncations[0, :n] == 0)
        goes_on[:-1] &= (self.next_obs[:, : n - 1] == self.obs[:, 1:n]).all(2).all(0)
        goes_on[-1] = False
        return goes_on

    @functools.cached_property
    def elapsed(self) -> torch.Tensor:
        """Rows of the same episode before each offline transition, (num_offline,)."""
        rows = torch.arange(self.num_offline, device=self.device)
        starts = torch.where(self.goes_on()[:-1], 0, rows[1:])
        return rows - torch.cat([rows[:1], starts]).cummax(0).values

    def in_parts(
        self,
        function: Callable,
        index: torch.Tensor,
        columns: tuple[str, ...],
        size: int | None = None,
    ) -> torch.Tensor:
        """A function of some columns, its arguments' names, on the transitions of `index` (G, n):
        (G, n, ...). At most `size` at a time; default: on a CPU, what its cache holds."""
        if size is None:
            size = 1280 if index.is_cpu else 4096
        if index.shape[1] <= size:
            return function(**self.gather(index, columns))
        result = None
        for start in range(0, index.shape[1], size):
            part = function(**self.gather(index[:, start : start + size], columns))
            if result is None:  # one block: parts kept between what is freed would fragment memory
                result = part.new_empty(*index.shape, *part.shape[2:])
            result[:, start : start + size] = part
        return result

    def gather_team(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """`gather` with what the whole team saw and did, for centralised critics.

        Returns:
            obs, next_obs (G, n, N, obs_dim) and actions (G, n, N, action_dim), the group's own
            agent i first, then i + 1, ... modulo N; rewards, terminations (G, n).
        """
        row = index + self.is_online(index) * self.seed_rows
        agents = torch.arange(self.num_agents, device=self.device)
        agents = (agents.view(1, -1) + agents.view(-1, 1)) % self.num_agents  # (N, N)
        agents = agents.repeat(self.num_seeds, 1).unsqueeze(1)  # (G, 1, N)
        rows = row.unsqueeze(2)
        viewers = agents % len(self.obs)
        return self._take(row, rows + viewers * self.num_rows, rows + agents * self.num_rows)

    def gather_following(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """`gather` with what the group did next in the data.

        Returns:
            also next_actions (G, n, action_dim), those of the row after each, and is_followed
            (G, n), 1 where that row goes on from there and 0 where an episode or the data ends.
        """
        last = self.num_offline + self.num_online - 1
        after = self.gather(torch.minimum(index + 1, last), ("obs", "actions"))
        batch = self.gather(index, STORED)
        goes_on = (batch["next_obs"] == after["obs"]).all(2) & (index < last)
        ended = torch.maximum(batch["terminations"], batch.pop("truncations"))
        batch["next_actions"] = after["actions"]
        batch["is_followed"] = goes_on.float() * (1 - ended)
        return batch

    def _take(self, row, viewer_row, agent_row, columns=COLUMNS) -> dict[str, torch.Tensor]:
        """The rows of the columns' flattened first two dimensions."""
        rows = {"obs": viewer_row, "next_obs": viewer_row, "actions": agent_row}

        def take(storage, rows):
            picked = storage.flatten(0, 1).index_select(0, rows.flatten())
            return picked.view(*rows.shape, *storage.shape[2:])

        return {name: take(getattr(self, name), rows.get(name, row)) for name in columns}

    def _online_rows(self, storage: torch.Tensor) -> torch.Tensor:
        """View of the online part of a storage: (agents, S, K * M, ...)."""
        return storage[:, self.num_offline :].unflatten(1, (self.num_seeds, self.capacity))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The online data collected so far; the offline data is loaded anew."""
        size = int(self.num_online)
        state = {
            name: self._online_rows(getattr(self, name))[:, :, :size].clone() for name in STORED
        }
        explorer = self.explorer[:, :size].clone()
        return {**state, "explorer": explorer, "num_online": self.num_online.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_dict` returned. Raises ValueError for other shapes."""
        size = int(state["num_online"])
        for name in STORED:
            shape = self._online_rows(getattr(self, name))[:, :, :size].shape
            if state[name].shape != shape:
                raise ValueError(f"{name} of shape {tuple(state[name].shape)}, not {tuple(shape)}")
            self._online_rows(getattr(self, name))[:, :, :size] = state[name].to(self.device)
        for first in range(self.num_offline, self.num_rows, max(1, self.capacity)):
            for start in range(first, first + size, self.deployment_steps):
                self.replace_dead(start, start + self.deployment_steps)
        self.explorer[:, :size] = state["explorer"]
        self.num_online.fill_(size)
