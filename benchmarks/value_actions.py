"""How many actions V(s) of the value distance needs: rank agreement with 200 actions.

    OMP_NUM_THREADS=1 python -m benchmarks.value_actions runs/OFFLINE_RUN --csv FILE.csv

512 candidates are matched with 2,000 other offline transitions by the run's offline policy, ends of
episodes as all others; the similarities with n actions per V are compared with those with 200 by
Spearman's rank correlation.
"""

from dataclasses import dataclass

import torch
import tyro

import otc_bcq
from benchmarks import check_outputs, write_csv
from common import checkpoints, cli, datasets, sampler
from common.replay import Replay


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """run folder with an offline policy"""
    counts: tuple[int, ...] = (1, 3, 10, 100)
    """actions per V"""
    csv: str | None = None
    """file for the raw numbers, a row per group and count"""


def ranks(x: torch.Tensor) -> torch.Tensor:
    """(G, B) -> (G, B) ranks, centred."""
    rank = x.argsort(1).argsort(1).double()
    return rank - rank.mean(1, keepdim=True)


def main(args: Args) -> None:
    checkpoint = checkpoints.read_checkpoint(args.run, "offline.pt", "otc_bcq")
    options = checkpoints.args_of(args.run, otc_bcq.Args)
    check_outputs(args.csv)
    dataset = datasets.load(options.env, options.dataset, options.dataset_size, options.split)
    checkpoints.check_unchanged(checkpoint, "data", dataset.fingerprint(), args.run)
    replay = Replay(dataset, options.num_seeds, 0, 1)
    obs_dim, action_dim = replay.obs.shape[2], replay.actions.shape[2]
    agent = otc_bcq.BCQ(replay.num_groups, obs_dim, action_dim, options)
    agent.load_state_dict(checkpoint["agent"])
    torch.manual_seed(1)
    both = replay.gather(replay.draw_offline(2512))
    q = agent.q_value(both["obs"], both["actions"])
    match = sampler.match_by_value(q[:, :512], q[:, 512:])

    def similarity(num_actions: int) -> torch.Tensor:
        options.num_value_actions = num_actions
        v = agent.value(both["next_obs"])
        star = sampler.relative_to_mean(v[:, 512:].gather(1, match))
        return (sampler.relative_to_mean(v[:, :512]) - star).abs()

    reference, rows = ranks(similarity(200)), []
    for count in args.counts:
        rank = ranks(similarity(count))
        rho = (rank * reference).sum(1) / (rank.norm(dim=1) * reference.norm(dim=1))
        print(f"{options.env}: {count} actions, rank correlation {rho.mean():.4f}")
        rows += [
            {"env": options.env, "actions": count, "group": g, "rank_correlation": r}
            for g, r in enumerate(rho.tolist())
        ]
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
