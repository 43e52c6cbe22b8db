"""Draw one run: the offline policy's return while it learns, then the return at each deployment.

python -m benchmarks.plot_run runs/RUN --figure run.png
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks import check_outputs, write_figure  # noqa: E402
from common import InputError, checkpoints, cli  # noqa: E402


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """run folder"""
    figure: str
    """PNG file"""


def main(args: Args) -> None:
    run = Path(args.run)
    record = checkpoints.read_record(run)
    options = record["args"]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if "offline/episodic_return" not in events.Tags()["scalars"]:
        every, updates = options["eval_every"], options["offline_updates"]
        raise InputError(
            f"{run} has no returns of its offline phase: --eval-every {every}, "
            f"--offline-updates {updates}"
        )
    rows = checkpoints.read_returns(run, "deployment", "mean_return", "std_return")
    if not rows:
        raise InputError(f"{run} has no returns yet: it was stopped before its first deployment")
    check_outputs(figure=args.figure)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    offline = events.Scalars("offline/episodic_return")
    left.plot([e.step for e in offline], [e.value for e in offline], marker="o", markersize=3)
    left.set(xlabel="offline updates", ylabel="return", title="offline")
    deployments = [int(row["deployment"]) for row in rows]
    means = [float(row["mean_return"]) for row in rows]
    stds = [float(row["std_return"]) for row in rows]
    right.errorbar(deployments, means, yerr=stds, marker="o", markersize=3, capsize=2)
    right.set(
        xlabel="deployments fine-tuned on", title=f"{options.get('sampling', 'no')} fine-tuning"
    )
    figure.suptitle(f"{options['env']}, seed {record['seed']}", fontsize=10)
    figure.tight_layout()
    write_figure(args.figure, figure, 120)


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
