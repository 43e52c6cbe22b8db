r"""What OTC draws: V, rewards and ends of the drawn transitions against those of all data.

    OMP_NUM_THREADS=1 python -m benchmarks.drawn_transitions runs/STRATEGIES_RUN --csv drawn.csv

Draws from the data of a run's last checkpoint as OTC (value) would, whatever the run's own
--sampling was, with V(s'*) divided by its mean over the matches (as the scripts do), by the mean
over all of D, or by that of V(s') over B. Ends are ranked like all others, unlike in the scripts.
"""

from dataclasses import dataclass

import torch
import tyro

from benchmarks import check_outputs, write_csv
from benchmarks.restored import restore
from common import InputError, cli, sampler


@dataclass
class Args:
    folders: tyro.conf.Positional[list[str]]
    """run folders with online data; the first seed's of a run of several"""
    policy: str = "checkpoint.pt"
    """whose values: checkpoint.pt, the run's last policy, or offline.pt, its first"""
    alpha: float = 1.0
    """degree of the correction"""
    draws: int = 100
    """minibatches B and D, of the run's --candidates and --references"""
    csv: str | None = None
    """file for the numbers, a row per run, draw and group"""


def weighted(values: torch.Tensor, distance: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """Mean of values (G, B) under the draw by rank of the distances, uniform without: (G,)."""
    if distance is None:
        return values.mean(1)
    probabilities = sampler.rank_probabilities(torch.full((1,), alpha), values.shape[1]).float()
    return (values.gather(1, distance.argsort(1)) * probabilities).sum(1)


def look(folder: str, args: Args) -> list[dict]:
    run = restore(folder)
    replay, agent, options = run.replay, run.agent, run.args
    B, D = options.candidates, options.references
    run.policy(args.policy)
    torch.manual_seed(0)
    sums: dict[str, dict[str, torch.Tensor]] = {}
    for _ in range(args.draws):
        index = torch.cat([replay.draw_merged(B), replay.draw_latest(D)], dim=1)
        batch = replay.gather(index)
        q, v = agent.q_value(batch["obs"], batch["actions"]), agent.value(batch["next_obs"])
        match = sampler.match_by_value(q[:, :B], q[:, B:])
        v_b, v_d = v[:, :B], v[:, B:]
        star = v_d.gather(1, match)
        relative = sampler.relative_to_mean(v_b) - sampler.relative_to_mean(v_d).gather(1, match)
        distances = {
            "uniform": None,
            "mean over D": relative.abs(),
            "mean over the matches": (
                sampler.relative_to_mean(v_b) - sampler.relative_to_mean(star)
            ).abs(),
            "one mean": (v_b - star).abs(),
        }
        seen = {
            "v_next": v_b,
            "v_next_of_match": star,
            "small_v_next": (v_b.abs() < 0.2 * v_b.mean(1, keepdim=True).abs()).float(),
            "reward": batch["rewards"][:, :B],
            "termination": batch["terminations"][:, :B],
            "online": replay.is_online(index[:, :B]).float(),
            "q_gap_to_match": (q[:, :B] - q[:, B:].gather(1, match)).abs(),
        }
        for name, distance in distances.items():
            into = sums.setdefault(name, {})
            for key, values in seen.items():
                into[key] = into.get(key, 0) + weighted(values, distance, args.alpha) / args.draws
            into["mean_v_of_b"] = into.get("mean_v_of_b", 0) + v_b.mean(1) / args.draws
            into["mean_v_of_d"] = into.get("mean_v_of_d", 0) + v_d.mean(1) / args.draws
    rows = []
    for name, values in sums.items():
        for g in range(replay.num_groups):
            row = {"script": run.script, "env": options.env, "policy": args.policy}
            row |= {"sampling_of_the_run": options.sampling, "draw": name}
            row |= {"seed": options.seed + g // replay.num_agents, "agent": g % replay.num_agents}
            rows.append(row | {key: float(value[g]) for key, value in values.items()})
    return rows


def main(args: Args) -> None:
    if not args.folders:
        raise InputError("no run folders given")
    check_outputs(args.csv)
    rows = [row for folder in args.folders for row in look(folder, args)]
    numbers = [key for key, value in rows[0].items() if isinstance(value, float)]
    print("| data | draw | " + " | ".join(numbers) + " |\n|" + "---|" * (len(numbers) + 2))
    for env, draw in dict.fromkeys((row["env"], row["draw"]) for row in rows):
        its = [row for row in rows if (row["env"], row["draw"]) == (env, draw)]
        means = [sum(row[key] for row in its) / len(its) for key in numbers]
        print(f"| {env} | {draw} | " + " | ".join(f"{mean:.3g}" for mean in means) + " |")
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
