r"""Does a draw correct the dynamics? Measured with what no learner has: the other agents' logged
actions, their present policies, and the simulator.

    python otc_bcq.py --save-policies
    python -m benchmarks.correction runs/RUN --at 1 5 10 --csv found.csv --figure found.png

For a logged transition (s, a_i, s') of agent i, in the world of the policies that are deployed now:

- dev: squared difference of the other agents' logged actions from what their present policies do
  in s, a mean over action dimensions; where actions are discrete, the share that differs.
- disc: l1 difference of s' from the next state of s with a_i and the others' present actions, in
  units of the standard deviation of s' - s, a mean over dimensions.
- auc: how often a distance puts that next state before the logged s', for the same (s, a_i): 0.5
  is blind.

dev and disc are means over the offline transitions that a draw picks, as are own_dev (the own
logged action's squared difference from the present policy's), value (V(s) of the present policy),
td_error (|r + gamma V(s') - Q(s, a_i)|, how surprising it is) and reward; online is the share of
online transitions in the draw. Every draw is judged on the same minibatches, whatever the run's own
strategy was; the oracle's ranks by dev, or by disc where there is one agent. MuJoCo's states are
rebuilt from the observations, particles start from theirs; other tasks have no disc and no auc, and
where nothing is known there is no oracle.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from benchmarks import check_outputs, write_csv, write_figure
from benchmarks.restored import restore
from common import InputError, cli, datasets, embedding, sampler, strategies
from common.envs import make_vec
from common.envs.mujoco import MujocoVecEnv
from common.envs.particle import ParticleVecEnv
from common.replay import COLUMNS, Replay

# The distances, as arguments of a script
DISTANCES = {
    "value": {"distance": "value"},
    "value over references": {"distance": "value", "value_mean": "references"},
    "embedding": {"distance": "embedding"},
    "two-stage": {"distance": "two-stage"},
    "raw": {"distance": "raw"},
    "residual": {"distance": "residual"},
}
MEASURES = ("dev", "disc", "auc", "online", "own_dev", "value", "td_error", "reward")


@dataclass
class Args:
    folders: tyro.conf.Positional[list[str]]
    """run folders that were made with --save-policies; the first seed's of a run of several"""
    at: tuple[int, ...] = (1, 5, 10)
    """deployments k: draws from B^k with references from D^k, at the beginning of its updates"""
    alpha: float = 1.0
    """degree of the correction, the same for every draw"""
    draws: int = 4
    """minibatches of the run's --candidates and --references"""
    embedding_updates: int = 20_000
    """updates of the networks of a distance that the run did not train"""
    csv: str | None = None
    """file for the raw numbers, a row per run, k, draw and agent"""
    figure: str | None = None
    """PNG file"""


# --- The world of the present policies ---


def simulator(task: str, split: str | None) -> Callable | None:
    """The function from observations (n, N, obs_dim) and actions in the agents' boxes (n, N,
    action_dim) to next observations (n, N, obs_dim), without the episodes' ends; None for tasks
    whose state is not in what is observed."""
    envs = make_vec(task, 1, 0, split)
    envs.reset()
    if isinstance(envs, ParticleVecEnv) and task != "navigation":
        return lambda obs, actions: next_of_particles(task, obs, actions)
    if isinstance(envs, MujocoVecEnv) and task.partition("-")[0] != "reacher":  # it has cosines
        return lambda obs, actions: next_of_mujoco(envs, obs, actions)
    return None


def next_of_particles(task: str, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    envs = make_vec(task, len(obs), 0)
    envs.set_deployment(1, 1)  # as it is deployed
    envs.at[:] = obs[:, 0].T.reshape(envs.at.shape)
    actions = np.clip(actions, envs.action_low, envs.action_high)
    envs.move(np.ascontiguousarray(actions.transpose(1, 2, 0)))
    return envs.observe().copy()


def next_of_mujoco(envs: MujocoVecEnv, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """What the observation leaves out, where the robot is, has no effect on what it holds."""
    team, found = envs.teams[0], np.empty_like(obs)
    model = team.env.model
    left_out = model.nq + model.nv - envs.state_dim
    state, real = np.empty(envs.state_dim), None if envs.seen is None else envs.seen >= 0
    for row, (its_obs, its_actions) in enumerate(zip(obs, actions, strict=True)):
        if envs.seen is None:
            state[:] = its_obs[0]
        else:
            state[envs.seen[real]] = its_obs[real]  # the others pad smaller views
        qpos = np.concatenate([np.zeros(left_out), state[: model.nq - left_out]])
        envs.set_state(0, qpos, state[model.nq - left_out :])
        found[row] = team.step(its_actions)[0]
    return found


def present_actions(
    agent, replay: Replay, index: torch.Tensor, first: int = 0, size: int = 256
) -> torch.Tensor:
    """What the present policies do in the states of `index` (G, n), the group's own agent first, or
    from the `first` after it on: (G, n, N - first, action_dim)."""
    N, group = replay.num_agents, torch.arange(replay.num_groups, device=index.device)
    parts = []
    for part in index.split(size, dim=1):
        obs, actions = replay.gather_team(part)["obs"], []
        for j in range(first, N):
            whose = group // N * N + (group % N + j) % N
            by_group = torch.empty_like(obs[:, :, j])
            by_group[whose] = obs[:, :, j]
            actions.append(agent.act(by_group)[whose])
        parts.append(torch.stack(actions, dim=2))
    return torch.cat(parts, dim=1)


def deviation(logged: torch.Tensor, present: torch.Tensor, discrete: bool) -> torch.Tensor:
    """(G, n, agents, action_dim) both -> (G, n)."""
    if discrete:
        return (logged.argmax(3) != present.argmax(3)).float().mean(2)
    return (logged - present).square().mean((2, 3))


def in_order(rotated: torch.Tensor, num_agents: int) -> torch.Tensor:
    """(G, n, N, ...), the group's own agent first -> the team's order."""
    return torch.stack([x.roll(g % num_agents, 1) for g, x in enumerate(rotated)])


def own_first(ordered: torch.Tensor, num_agents: int) -> torch.Tensor:
    """The inverse of `in_order`."""
    return torch.stack([x.roll(-(g % num_agents), 1) for g, x in enumerate(ordered)])


# --- A run at the beginning of a deployment's updates ---


class Moment:
    """A run's data B^k and the policies pi^{k-1} that were deployed to get D^k."""

    def __init__(self, folder: str):
        # One deployment more has room for transitions of today's dynamics
        self.run = restore(folder, more=1)
        self.args, self.replay, self.agent = self.run.args, self.run.replay, self.run.agent
        self.steps, self.discrete = self.run.steps, self.run.script == "otc_cql_discrete"
        task, split = datasets.parse_env(self.args.env)[0], self.args.split
        self.simulate, self.envs = simulator(task, split), make_vec(task, 1, 0, split)
        self.num_online = int(self.replay.num_online)
        change = self.replay.next_obs - self.replay.obs
        self.change = change[:, : self.replay.num_offline].std(1)  # (viewers, obs_dim)
        self.spaces: dict[str, embedding.Space] = {}
        self.trained: dict[str, torch.Tensor] = {}  # of the networks of the run's own distance

    def set_deployment(self, k: int) -> None:
        """Its data and policies are those of deployment k."""
        if k * self.steps > self.num_online:
            raise InputError(f"{self.run.folder} has no deployment {k}")
        found = self.run.policy(f"policy_{k - 1}.pt")["strategy"]
        self.replay.num_online.fill_(k * self.steps)
        own = {n for n in found if n.startswith("embedding.") and n != "embedding._extra_state"}
        self.trained = {name.removeprefix("embedding."): found[name] for name in own}

    def strategy(self, options: dict, updates: int) -> strategies.Strategy:
        """OTC's with a distance; its networks are the run's, or trained here once."""
        args = dataclasses.replace(self.args, sampling="otc", **options)
        found, name = self.run.module.OTC(self.replay, args), args.distance
        if found.embedding is None:
            return found
        if name not in self.spaces:
            space = self.spaces[name] = found.embedding
            if self.trained and name == self.args.distance:
                space.load_state_dict(self.trained, strict=False)  # without the optimiser's state
            elif space.optimizer is not None:
                for _ in range(updates):
                    index = self.replay.draw_offline(args.batch_size)
                    space.update(self.replay.gather(index))
        found.embedding = self.spaces[name]
        with torch.no_grad():
            found.embedding.remember(self.replay.latest())
        return found

    @torch.no_grad()
    def today(self, index: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """dev, disc, own_dev, value, td_error and reward of transitions (G, n), and the indices of
        the same (s, a_i) with the next states of today's dynamics, (G, n); None: no simulator."""
        replay, N, G = self.replay, self.replay.num_agents, self.replay.num_groups
        team = replay.gather_team(index)
        logged, obs = team["actions"], team["obs"]
        present = present_actions(self.agent, replay, index)
        found = {  # dev is nan where there are no others, disc without a simulator
            "dev": deviation(logged[:, :, 1:], present[:, :, 1:], self.discrete),
            "disc": torch.full(index.shape, torch.nan),
            "own_dev": deviation(logged[:, :, :1], present[:, :, :1], self.discrete),
            "value": self.agent.value(obs[:, :, 0].contiguous()),
            "reward": team["rewards"],
        }
        batch = replay.gather(index)
        after = (1 - batch["terminations"]) * self.agent.value(batch["next_obs"])
        q = self.agent.q_value(batch["obs"], batch["actions"])
        found["td_error"] = (batch["rewards"] + self.args.gamma * after - q).abs()
        if self.simulate is None:
            return found, None
        actions = present.clone()
        actions[:, :, 0] = logged[:, :, 0]
        ordered = [in_order(x, N).flatten(0, 1).numpy() for x in (obs, actions)]
        next_obs = self.simulate(ordered[0], self.envs.to_box(ordered[1]))
        next_obs = own_first(torch.as_tensor(next_obs).unflatten(0, index.shape), N)  # (G, n, N, d)
        change = self.change[torch.arange(G) % N % len(self.change)].unsqueeze(1)
        difference = (next_obs[:, :, 0] - team["next_obs"][:, :, 0]).abs() / change.clamp(min=1e-6)
        found["disc"] = difference.mean(2)
        return found, self.write_down(index, next_obs)

    def write_down(self, index: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        """Put transitions with other next states into the room beyond the data: for each agent of
        a seed its own rows."""
        replay, N = self.replay, self.replay.num_agents
        batch, n = replay.gather(index), index.shape[1]
        start = replay.capacity - self.steps
        if N * n > self.steps:
            raise InputError(f"{N * n} transitions do not fit into a deployment of {self.steps}")
        rows = torch.empty_like(index)
        for g in range(replay.num_groups):
            seed, agent = divmod(g, N)
            first = start + agent * n
            rows[g] = replay.num_offline + first + torch.arange(n)
            where = slice(first, first + n)
            its = {**{name: batch[name][g] for name in COLUMNS}, "next_obs": next_obs[g, :, 0]}
            its["terminations"] = torch.zeros(n)
            for name, values in its.items():
                storage = replay._online_rows(getattr(replay, name))
                storage[agent % len(storage), seed, where] = values
        return rows


def weights_of(distance: torch.Tensor | None, index: torch.Tensor, alpha: float) -> torch.Tensor:
    """The probability of each candidate (G, B) in a draw by rank; uniform without a distance."""
    if distance is None:
        return torch.full(index.shape, 1 / index.shape[1])
    ranks = distance.argsort(1).argsort(1)
    probabilities = sampler.rank_probabilities(torch.full((len(index),), alpha), index.shape[1])
    return probabilities.float().gather(1, ranks)


def measure(moment: Moment, args: Args) -> dict[str, dict[str, np.ndarray]]:
    """{draw: {measure: (G,)}} of a run at the moment."""
    replay, options = moment.replay, moment.args
    strategies_ = {
        name: moment.strategy(its, args.embedding_updates) for name, its in DISTANCES.items()
    }
    sums: dict = defaultdict(lambda: defaultdict(float))
    raw = strategies_["raw"].embedding
    for _ in range(args.draws):
        index = replay.draw_merged(options.candidates)
        references = replay.draw_latest(options.references)
        found, today = moment.today(index)
        is_offline = (~replay.is_online(index)).float()
        d = raw.pair_dim
        nearest = sampler.nearest_distance(
            raw.place_rows(index)[..., :d].contiguous(),
            raw.remembered(references)[..., :d].contiguous(),
        )
        distances: dict = {"uniform": None}
        for name, strategy in strategies_.items():
            distances[name] = strategy.transition_distance(moment.agent, index, references)
        by = "dev" if replay.num_agents > 1 else "disc"  # a team of one: its world is the other
        distances |= {"nearest (s, a)": nearest}
        if found[by].isfinite().any():  # there is something to be known
            distances["oracle"] = found[by]
        for name, distance in distances.items():
            weight = weights_of(distance, index, args.alpha)
            into = sums[name]
            into["online"] += (weight * (1 - is_offline)).sum(1) / args.draws
            into["weight"] += (weight * is_offline).sum(1)
            for key, values in found.items():
                into[key] += (weight * is_offline * values).sum(1)
        if today is None:
            continue
        ends = replay.gather(index, ("terminations",))["terminations"]
        counts = is_offline * (1 - ends)
        for name, strategy in strategies_.items():
            both = torch.cat([index, today], dim=1)
            logged, now = strategy.transition_distance(moment.agent, both, references).chunk(2, 1)
            first = (now < logged).float() + 0.5 * (now == logged).float()
            sums[name]["first"] += (first * counts).sum(1)
            sums[name]["pairs"] += counts.sum(1)
    table = {}
    for name, into in sums.items():
        row = {key: into[key] / into["weight"] for key in MEASURES if key not in ("auc", "online")}
        nothing = torch.full((replay.num_groups,), torch.nan)
        row["auc"] = into["first"] / into["pairs"] if "first" in into else nothing
        row["online"] = into["online"]
        table[name] = {key: row[key].numpy() for key in MEASURES}
    return table


def look(folder: str, args: Args) -> list[dict]:
    """The rows of a run."""
    torch.manual_seed(0)
    moment, rows = Moment(folder), []
    its = dataclasses.asdict(moment.args)
    for k in args.at:
        moment.set_deployment(k)
        for draw, table in measure(moment, args).items():
            for g in range(moment.replay.num_groups):
                seed, agent = divmod(g, moment.replay.num_agents)
                names = {"run": folder, "script": moment.run.script, "env": moment.args.env}
                names |= {"k": k, "strategy": strategies.strategy_name(its), "draw": draw}
                names |= {"seed": moment.args.seed + seed, "agent": agent}
                rows.append(names | {key: float(table[key][g]) for key in MEASURES})
    return rows


def draw_figure(rows: list[dict], path: str) -> None:
    """For each k and draw dev and disc over those of a uniform draw, and AUC; a dot per run, seed
    and agent."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    draws, at = (list(dict.fromkeys(row[key] for row in rows)) for key in ("draw", "k"))
    names = "run", "k", "seed", "agent"
    base = {tuple(row[n] for n in names): row for row in rows if row["draw"] == "uniform"}
    titles = {"dev": "dev / uniform draw's", "disc": "disc / uniform draw's", "auc": "AUC"}
    titles = {k: v for k, v in titles.items() if np.isfinite([row[k] for row in rows]).any()}
    if not titles:
        raise InputError(
            f"nothing to draw in {path}: a team of one whose task has no simulator here"
        )
    size = 2.5 + 3 * len(titles), 0.42 * len(draws) + 1.4
    figure, axes = plt.subplots(
        1, len(titles), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    axes = axes[0]
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for j, k in enumerate(at):
            for i, draw in enumerate(draws):
                its = [row for row in rows if row["draw"] == draw and row["k"] == k]
                values = np.array([row[key] for row in its])
                if key != "auc":
                    values = values / [base[tuple(row[n] for n in names)][key] for row in its]
                y = i + 0.25 * (j - (len(at) - 1) / 2)
                axis.plot(values, np.full(len(values), y), ".", color=f"C{j}", alpha=0.25, ms=3)
                label = f"k = {k}" if i == 0 else None
                axis.plot(
                    np.nanmean(values) if np.isfinite(values).any() else np.nan,
                    y,
                    "o",
                    color=f"C{j}",
                    ms=5,
                    label=label,
                )
        axis.axvline(0.5 if key == "auc" else 1.0, color="0.7", lw=1, zorder=0)
        axis.set_title(title, fontsize=9)
    axes[0].set_yticks(range(len(draws)), draws)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(at),
        fontsize=7,
    )
    figure.suptitle(", ".join(dict.fromkeys(row["env"] for row in rows)), fontsize=9)
    write_figure(path, figure, 130)


def main(args: Args) -> None:
    if not args.folders:
        raise InputError("no run folders given")
    if not args.at:
        raise InputError("--at: expected one deployment or more")
    check_outputs(args.csv, figure=args.figure)
    rows = []
    for folder in args.folders:
        rows += look(folder, args)
        if args.csv:  # as soon as it is known
            write_csv(args.csv, rows)
    names = "script", "env", "strategy", "k", "draw"
    print("|", *(f"{name} |" for name in (*names, *MEASURES)))
    print("|" + "---|" * (len(names) + len(MEASURES)))
    for cell in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        its = [row for row in rows if tuple(row[name] for name in names) == cell]
        means = [f"{np.mean([row[key] for row in its]):.3g}" for key in MEASURES]
        print("|", *(f"{each} |" for each in (*cell, *means)))
    if args.figure:
        draw_figure(rows, args.figure)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
