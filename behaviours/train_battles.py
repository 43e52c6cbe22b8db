"""Train the policies behind the built-in data of SMAX's maps.

    python -m behaviours.train_battles --task 5m_vs_6m --out snapshots/5m_vs_6m

Independent PPO (de Witt et al., 2020, https://arxiv.org/abs/2011.09533; its base, Schulman et al.,
2017, https://arxiv.org/abs/1707.06347) as JaxMARL has it: every agent acts and learns from its own
observations and the team's reward, and all of them share one actor and one critic. Illegal actions
have no probability, and what happens while an agent is dead is not learned from.

OUT/returns.csv has the episodes' returns and wins, by the stochastic policy. At the end two actors
are written to OUT/{task}.npz (see common/datasets/makers/smax.py): `expert` is the last, `medium`
the first whose episodes are won half as often.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

from behaviours.train import new_folder
from common import InputError, cli
from common.envs import TASKS, make_vec


@dataclass
class Args:
    out: Path
    """folder for the snapshots"""
    task: str = "5m_vs_6m"
    """a SMAX map of common.envs"""
    seed: int = 1
    """seed of the environment, the networks and the actions"""
    iterations: int = 400
    """of collecting and updating"""
    num_envs: int = 64
    """teams side by side"""
    num_steps: int = 64
    """steps of every team per iteration"""
    epochs: int = 2
    """passes over an iteration's data"""
    minibatches: int = 4
    """per pass"""
    hidden_size: int = 128
    """units in both hidden layers"""
    learning_rate: float = 1e-3
    """Adam's at the start; it falls to zero in equal steps"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """of the advantages"""
    clip: float = 0.2
    """largest change of a probability ratio that pays"""
    entropy: float = 0.003
    """weight of the policy's entropy"""
    snapshot_every: int = 10
    """iterations between two snapshots"""


def mlp(in_features: int, hidden_size: int, out_features: int, gain: float) -> nn.Sequential:
    """Two hidden layers with ReLU, orthogonally initialised."""
    sizes = in_features, hidden_size, hidden_size, out_features
    layers = [nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
    for layer, its_gain in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, its_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def log_probs(actor: nn.Module, obs: torch.Tensor, num_actions: int) -> torch.Tensor:
    """Of every action, (..., num_actions); those of illegal ones are about -1e9."""
    legal = obs[..., -num_actions:] > 0
    return torch.log_softmax(actor(obs).masked_fill(~legal, -1e9), dim=-1)


def advantages(rewards, values, ends, next_values, gamma: float, gae_lambda: float):
    """Generalised advantage estimates (T, E, N): the team's rewards (T, E), values of every step
    and of its true next state (T, E, N; 0 after a termination), ends of episodes (T, E)."""
    result, running = torch.zeros_like(values), 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t, :, None] + gamma * next_values[t] - values[t]
        running = delta + gamma * gae_lambda * (1 - ends[t, :, None]) * running
        result[t] = running
    return result


def arrays(actor: nn.Sequential) -> dict[str, np.ndarray]:
    """w0 b0 w1 b1 w2 b2 as they ship: float16, (in, out) and (out,)."""
    found = {}
    for i, layer in enumerate(actor[::2]):
        found[f"w{i}"] = layer.weight.detach().numpy().T.astype(np.float16)
        found[f"b{i}"] = layer.bias.detach().numpy().astype(np.float16)
    return found


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.task not in TASKS or TASKS[args.task].win_return is None:
        raise InputError(f"--task {args.task}: expected a task that can be won, such as 5m_vs_6m")
    if not 1 <= args.snapshot_every <= args.iterations:
        raise InputError(
            f"--snapshot-every {args.snapshot_every}: expected 1 to --iterations {args.iterations}"
        )
    vec = make_vec(args.task, args.num_envs, args.seed)
    new_folder(args.out)
    E, T, A = args.num_envs, args.num_steps, vec.action_dim
    actor = mlp(vec.obs_dim, args.hidden_size, A, 0.01)
    critic = mlp(vec.obs_dim, args.hidden_size, 1, 1.0)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5)
    win_return = TASKS[args.task].win_return

    obs, start = torch.from_numpy(vec.reset()), time.time()
    totals, episodes, snapshots = np.zeros(E), [], []
    with open(args.out / "returns.csv", "w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(["iteration", "steps", "episodes", "mean_return", "win_rate", "entropy"])
        for iteration in range(1, args.iterations + 1):
            columns = []
            for _ in range(T):
                with torch.no_grad():
                    log_prob = log_probs(actor, obs, A)
                    action = torch.distributions.Categorical(logits=log_prob).sample()
                    value = critic(obs).squeeze(-1)
                one_hot = nn.functional.one_hot(action, A).numpy()
                next_obs, rewards, terminations, truncations, final_obs = vec.step(one_hot)
                final_obs, next_obs = torch.from_numpy(final_obs), torch.from_numpy(next_obs)
                with torch.no_grad():
                    next_value = critic(final_obs).squeeze(-1)
                goes_on = torch.from_numpy(~terminations).float()[:, None]
                over = terminations | truncations
                chosen = log_prob.gather(-1, action[..., None]).squeeze(-1)
                team = torch.from_numpy(rewards), torch.from_numpy(over).float()
                columns.append((obs, action, chosen, value, next_value * goes_on, *team))
                totals += rewards
                episodes += totals[over].tolist()
                totals[over] = 0
                obs = next_obs
            seen, actions, old, values, next_values, rewards, ends = map(
                torch.stack, zip(*columns, strict=True)
            )
            gains = advantages(rewards, values, ends, next_values, args.gamma, args.gae_lambda)
            alive = seen[..., -A:].any(-1)
            data = [x[alive] for x in (seen, actions, old, gains, gains + values)]
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - (iteration - 1) / args.iterations)
            for _ in range(args.epochs):
                for rows in torch.randperm(len(data[0])).chunk(args.minibatches):
                    s, a, before, gain, target = (x[rows] for x in data)
                    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                    log_prob = log_probs(actor, s, A)
                    ratio = (log_prob.gather(1, a[:, None]).squeeze(1) - before).exp()
                    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                    entropy = -(log_prob.exp() * log_prob).sum(1).mean()
                    actor_loss = -torch.minimum(ratio * gain, clipped * gain).mean()
                    critic_loss = (critic(s).squeeze(1) - target).square().mean()
                    optimizer.zero_grad()
                    (actor_loss + 0.5 * critic_loss - args.entropy * entropy).backward()
                    nn.utils.clip_grad_norm_(parameters, 0.5)
                    optimizer.step()
            if iteration % args.snapshot_every == 0 and episodes:
                won = float(np.mean(np.array(episodes) >= win_return))
                row = iteration, iteration * E * T, len(episodes), float(np.mean(episodes)), won
                log.writerow([*row, entropy.item()])
                file.flush()
                snapshots.append((row[1], won, arrays(actor)))
                np.savez(args.out / f"{iteration:05d}.npz", **snapshots[-1][2])
                print(*row, f"{time.time() - start:.0f} s", flush=True)
                episodes = []
    last = len(snapshots) - 1
    medium = next(i for i, (_, won, _) in enumerate(snapshots) if won >= snapshots[last][1] / 2)
    kept = [snapshots[i] for i in (medium, last)]
    stacked = {name: np.stack([each[2][name] for each in kept]) for name in kept[0][2]}
    steps = np.array([each[0] for each in kept])
    np.savez_compressed(args.out / f"{args.task}.npz", **stacked, steps=steps, medium=0, expert=1)
    print(f"medium after {steps[0]} steps, expert after {steps[1]}")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
