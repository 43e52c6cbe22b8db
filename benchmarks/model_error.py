r"""How wrong MOMA-PPO's world model is along its rollouts: on the data, and where its policies go.

    python moma_ppo.py --env reacher-full-expert-mix --num-seeds 5
    python -m benchmarks.model_error runs/RUN --csv FILE.csv

Sequences of a run's data, and of new episodes of its last policies, are imagined by the elites with
the very actions that were taken, each step from the imagined state of before. Per seed and step of
a sequence:

- state_error: root mean square of imagined less real, in the data's standard deviations of the
  state, over the entries that are predicted;
- reward_bias: mean of imagined less real, without penalties: above 0 is optimism;
- reward: mean of the real ones;
- uncertainty: mean norm of the elites' covariance, what is penalised.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import tyro

import moma_ppo
from benchmarks import check_outputs, write_csv
from common import checkpoints, cli, datasets
from common.datasets import parse_env
from common.datasets.team import TeamDataset
from common.envs import make_vec
from common.loop import collect
from common.nets import joint
from common.replay import Replay


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[str, ...]]
    """runs of moma_ppo.py; the first seed's folder of a run of several"""
    csv: str
    """file for the raw numbers"""
    horizon: int = 10
    """steps of a sequence"""
    episodes: int = 20
    """of the policies, per seed"""
    sequences: int = 1000
    """at most, of either kind: from the first step of an episode, and from later ones"""


def sequences(elapsed: torch.Tensor, length: int, first: bool, most: int) -> torch.Tensor:
    """Rows at which `length` rows of one episode begin, evenly chosen: its first ones, or others;
    at most `most`."""
    rows = torch.arange(max(0, len(elapsed) - length + 1))
    whole = elapsed[rows + length - 1] == elapsed[rows] + length - 1
    found = rows[whole & ((elapsed[rows] == 0) == first)]
    return found[torch.linspace(0, len(found) - 1, min(most, len(found))).long()]


@torch.no_grad()
def errors(agent, team: TeamDataset, starts: torch.Tensor, length: int) -> list[dict]:
    """A row per step of the sequences that begin at rows `starts`; measures (S,) each, of every
    seed's model."""
    S, N = len(agent.elites), agent.num_agents

    def of_all(x: np.ndarray, rows) -> torch.Tensor:  # as every seed's: (S, m, N * dim)
        x = torch.as_tensor(x)[rows].expand(-1, N, -1)
        return joint(x.transpose(0, 1).repeat(S, 1, 1), N)

    model, found = agent.model, []
    predicted = model.predicted[:-1] > 0
    state = of_all(team.obs, starts)
    for h in range(length):
        rows = starts + h
        actions, real = of_all(team.actions, rows), of_all(team.next_obs, rows)
        state, rewards, _, uncertainty, penalty = agent.imagined_step(state, actions)
        off = ((state - real) / model.std)[..., predicted]
        reward = torch.as_tensor(team.rewards)[rows]
        found.append(
            {
                "step": h + 1,
                "state_error": off.square().mean((1, 2)).sqrt(),
                "reward_bias": (rewards + penalty - reward).mean(1),
                "reward": reward.mean().expand(S),
                "uncertainty": uncertainty.mean(1),
            }
        )
    return found


def measure(args: Args, folder: str) -> list[dict]:
    checkpoint = checkpoints.read_checkpoint(folder, "checkpoint.pt", "moma_ppo")
    run = checkpoints.args_of(folder, moma_ppo.Args)
    task, S = parse_env(run.env)[0], run.num_seeds
    envs = make_vec(task, S, run.seed, run.split)
    data = datasets.load(run.env, run.dataset, run.dataset_size, run.split, discrete=None)
    checkpoints.check_unchanged(checkpoint, "data", data.fingerprint(), folder)
    limit = envs.max_episode_steps
    run, length = run.within(limit), min(args.horizon, limit)
    sizes = S * envs.num_agents, envs.obs_dim, envs.action_dim
    agent = moma_ppo.MOMAPPO(*sizes, run, envs.discrete)
    agent.load_state_dict(checkpoint["agent"])
    torch.manual_seed(run.seed)
    new, _ = collect(envs, agent, args.episodes * limit, (run.seed, 1), torch.device("cpu"))
    kinds = [("data", data, range(S))]
    for s in range(S):
        its = {name: x[s] for name, x in new.items() if name != "explorer"}
        team = TeamDataset(**its, source="the policy's episodes")
        kinds.append(("policy", team, [s]))
    rows = []
    for actions, team, seeds in kinds:
        elapsed = Replay(team, 1, 0, 1).elapsed
        for first in (True, False):
            starts = sequences(elapsed, length, first, args.sequences)
            found = errors(agent, team, starts, length) if len(starts) else []
            for row, s in itertools.product(found, seeds):
                of = {"run": folder, "env": run.env, "model_updates": run.model_updates}
                of |= {"seed": run.seed + s, "actions": actions}
                of |= {"begins": "episode" if first else "later", "sequences": len(starts)}
                rows.append(of | {k: v if k == "step" else v[s].item() for k, v in row.items()})
    return rows


def main(args: Args) -> None:
    check_outputs(args.csv)
    rows = []
    for folder in args.folders:
        found = measure(args, folder)
        rows += found
        write_csv(args.csv, rows)
        print(f"{folder}: mean over seeds of state_error and reward_bias")
        for key in dict.fromkeys((row["actions"], row["begins"]) for row in found):
            its = [row for row in found if (row["actions"], row["begins"]) == key]
            last = max(row["step"] for row in its)
            for h in sorted({1, (last + 1) // 2, last}):
                at = [row for row in its if row["step"] == h]
                error, bias = (np.mean([r[k] for r in at]) for k in ("state_error", "reward_bias"))
                print(f"  {key[0]:7}{key[1]:8} step {h:3}: {error:8.3f} {bias:+8.4f}")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
