"""The offline policies of many runs beside the behaviour policies that made their data.

    for env in {halfcheetah,walker2d,hopper}-{random,medium-replay,medium}; do
        python otc_bcq.py --env $env --deployments 0 --sampling uniform --run-dir runs/offline
    done
    python -m benchmarks.offline_table runs/offline --csv offline.csv

and for the sweeps of benchmarks/grids/single_agent.toml and omar.toml: their folders.

The behaviour's return is the mean of the data's whole episodes, of built-in data from the tables in
docs/results/datasets where they have it, else as the run has it: of a maze the mean of the walks,
which are no episodes.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import check_outputs, write_csv
from common import InputError, checkpoints, cli
from common.datasets import parse_env
from common.datasets.names import is_omar
from common.envs import normalized_score

BUILT_IN = "built-in"
COEFFICIENT_0 = " --omar-coefficient 0"
CENTRALISED = " --critic centralised"
FINETUNE = " --finetune"
COLUMNS = ("episodes", "mean_return", "std_return", "normalized_score")


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]]
    """folders of run folders"""
    csv: str | None = None
    """file for the raw numbers, a row per run"""


def main(args: Args) -> None:
    results = Path(__file__).parents[1] / "docs/results/datasets"
    behaviour = {
        row["dataset"]: row
        for table in ("datasets.csv", "team_datasets.csv")
        for row in csv.DictReader((results / table).open())
        if row.get("source", BUILT_IN) == BUILT_IN
    }
    check_outputs(args.csv)
    rows, seen = [], {}
    keys = ("script", "env", "dataset", "split", "offline_updates")
    for folder in args.folders:
        for path in sorted(Path(folder).rglob("returns.csv")):
            run = checkpoints.read_record(path.parent)
            if run["args"].get("offline_checkpoint"):  # the policy of another run
                continue
            first = next(iter(checkpoints.read_returns(path.parent, *COLUMNS)), None)
            if first is None:
                continue
            env, dataset = run["args"]["env"], run["args"].get("dataset", BUILT_IN)
            script = run["script"]
            script += COEFFICIENT_0 * (run["args"].get("omar_coefficient") == 0)
            script += CENTRALISED * (run["args"].get("critic") == "centralised")
            script += FINETUNE * bool(run["args"].get("finetune"))
            data = {"mean": run.get("data_return") or np.nan}
            data = behaviour.get(env, data) if dataset == BUILT_IN else data
            its_return, task = float(data["mean"]), parse_env(env)[0]
            score = data.get("score", normalized_score(task, its_return, is_omar(dataset)))
            rows.append(
                {
                    "script": script,
                    "env": env,
                    "dataset": dataset,
                    "split": run["args"]["split"] or "",
                    "seed": run["seed"],
                    "offline_updates": run["args"]["offline_updates"],
                    "episodes": int(first["episodes"]),
                    "mean_return": float(first["mean_return"]),
                    "std_return": float(first["std_return"]),
                    "normalized_score": float(first["normalized_score"]),
                    "behaviour_return": its_return,
                    "behaviour_score": round(float(score), 2),
                }
            )
            key = tuple(rows[-1][name] for name in (*keys, "seed"))
            if key in seen:
                raise InputError(
                    f"{seen[key]} and {path.parent} have the same script, env, data, split, "
                    "updates and seed"
                )
            seen[key] = path.parent
    if not rows:
        raise InputError(
            f"no returns.csv in the folders of {' '.join(args.folders) or 'no folder'}"
        )
    print(
        "| script | data | split | updates | seeds | behaviour: return | score | return | score |"
    )
    print("|---" * 9 + "|")
    for key in sorted({tuple(row[name] for name in keys) for row in rows}):
        of = [row for row in rows if tuple(row[name] for name in keys) == key]
        returns = np.array([row["mean_return"] for row in of])
        scores = np.array([row["normalized_score"] for row in of])
        spread = f"{scores.mean():.1f}" + (f" +- {scores.std():.1f}" if len(of) > 1 else "")
        script, env, dataset, split, updates = key
        env += "" if dataset == BUILT_IN else f" ({dataset})"
        print(
            f"| {script} | {env} | {split} | {updates:,} | {len(of)} "
            f"| {of[0]['behaviour_return']:.0f} | {of[0]['behaviour_score']:.1f} "
            f"| {returns.mean():.0f} | {spread} |"
        )
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
