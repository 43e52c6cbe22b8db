"""How the KL weight of OTC's conditional VAE changes what its embedding matches.

    OMP_NUM_THREADS=1 python -m benchmarks.embedding_kl --csv embedding_kl.csv

For each weight a VAE is trained on the offline data alone; then 512 transitions are matched with
the nearest of 2,000 others. A match is good if its state, action and next state are nearer than
those of a random transition: the table gives mean l1 distances over those of random pairs.
"""

from dataclasses import dataclass

import torch
import tyro

import otc_bcq
from benchmarks import check_outputs, write_csv
from common import cli, datasets
from common.embedding import Embedding
from common.replay import Replay


@dataclass
class Args:
    envs: tuple[str, ...] = ("halfcheetah-medium", "hopper-medium-replay")
    """built-in data sets"""
    kl_weights: tuple[float, ...] = (0.5, 0.05, 5e-3, 5e-4, 5e-5)
    """weights of the KL divergence against the squared error"""
    updates: int = 6_000
    """updates of each VAE"""
    learning_rate: float = 1e-3
    """Adam's; ten times the script's, for fewer updates"""
    seeds: int = 1
    """VAEs per data set, weight and agent"""
    csv: str | None = None
    """file for the raw numbers"""


def main(args: Args) -> None:
    check_outputs(args.csv)
    rows = []
    for env in args.envs:
        dataset = datasets.load(env)
        replay = Replay(dataset, args.seeds, 0, 1)
        std = replay.obs[0].std(0).clamp(min=1e-3)
        for weight in args.kl_weights:
            torch.manual_seed(1)
            options = otc_bcq.Args(
                distance="embedding",
                embedding_kl_weight=weight,
                embedding_learning_rate=args.learning_rate,
            )
            embedding = Embedding(replay, options)
            for _ in range(args.updates):
                embedding.update(replay.gather(replay.draw_offline(128)))

            drawn = replay.gather(replay.draw_offline(2512))
            with torch.no_grad():
                e, _ = embedding.encode(drawn["obs"], drawn["actions"], drawn["next_obs"])
                error, kl = embedding.loss(drawn["obs"], drawn["actions"], drawn["next_obs"])
            match = torch.cdist(e[:, :512], e[:, 512:], p=1).argmin(2)
            chance = torch.randint(2000, match.shape)
            row = {"env": env, "kl_weight": weight, "squared_error": error.mean().item()}
            row |= {"kl_per_dim": kl.mean().item(), "embedding_std": e.std(1).mean().item()}
            drawn["obs"], drawn["next_obs"] = drawn["obs"] / std, drawn["next_obs"] / std
            for name in ("obs", "actions", "next_obs"):
                own, others = drawn[name][:, :512], drawn[name][:, 512:]
                near, far = (
                    (own - others.take_along_dim(i.unsqueeze(2), dim=1)).abs().mean()
                    for i in (match, chance)
                )
                row[f"{name}_match_over_random"] = (near / far).item()
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
