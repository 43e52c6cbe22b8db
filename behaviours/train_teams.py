"""Train the policies behind the built-in data of tasks whose agents each see their own state.

    python -m behaviours.train_teams --task simple-spread --out snapshots/simple-spread
    python -m behaviours.train_teams --task simple-tag --prey --out snapshots/simple-tag-prey

Plain independent TD3 (Fujimoto et al., 2018, https://arxiv.org/abs/1802.09477): every agent learns
from its own observations and actions and the team's reward, all agents in one stack of networks,
many teams side by side. Every `--snapshot-every` updates the actors are written to
`OUT/{update}.npz`, weights as (N, in, out); OUT/returns.csv has the returns of the training's
episodes, with their exploration noise. With `--prey` the prey of simple-tag or simple-world learns
as well, as the last agent, from its own reward.
"""

import csv
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro

from behaviours.train import new_folder
from common import InputError, cli, nearest
from common.envs import VecEnv, make_vec, mpe


@dataclass
class Args:
    task: str
    """a task of common.envs"""
    out: Path
    """folder for the snapshots"""
    prey: bool = False
    """train the prey too, see above"""
    seed: int = 1
    """seed of the environment, the networks and the exploration"""
    updates: int = 20_000
    """in all"""
    num_envs: int = 128
    """teams side by side"""
    steps_per_update: int = 64
    """environment steps, of all teams together, between two updates"""
    warmup_steps: int = 25_600
    """environment steps of uniform actions before the first update"""
    buffer_size: int = 500_000
    """latest transitions that updates draw from"""
    batch_size: int = 512
    """transitions per update"""
    hidden_size: int = 64
    """units in both hidden layers of every network"""
    learning_rate: float = 3e-3
    """Adam's at the start; it falls to a tenth in equal steps"""
    gamma: float = 0.95
    """discount"""
    tau: float = 0.01
    """rate at which the target networks follow"""
    noise: float = 0.2
    """standard deviation of the exploration"""
    target_noise: float = 0.1
    """standard deviation of the target policy's smoothing, clipped at twice that"""
    policy_delay: int = 2
    """critics' updates per actors' update"""
    reward_scale: float = 0.1
    """what rewards are multiplied by"""
    snapshot_every: int = 500
    """updates between two snapshots of the actors"""


class Linear(nn.Module):
    """G independent linear layers: (G, batch, in) -> (G, batch, out)."""

    def __init__(self, num_groups: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_groups, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_groups, 1, out_features))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight).add_(self.bias)


def mlp(num_groups: int, in_features: int, hidden_size: int, out_features: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    return nn.Sequential(
        Linear(num_groups, in_features, hidden_size),
        nn.ReLU(),
        Linear(num_groups, hidden_size, hidden_size),
        nn.ReLU(),
        Linear(num_groups, hidden_size, out_features),
    )


class TD3:
    """N independent learners. Both critics of all agents are one stack of 2 N networks."""

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, args: Args):
        self.args, self.num_updates = args, 0
        self.actor = mlp(num_agents, obs_dim, args.hidden_size, action_dim)
        self.critic = mlp(2 * num_agents, obs_dim + action_dim, args.hidden_size, 1)
        self.target_actor, self.target_critic = deepcopy(self.actor), deepcopy(self.critic)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), args.learning_rate)
            for net in (self.actor, self.critic)
        ]

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """(E, N, obs_dim) -> (E, N, action_dim) in [-1, 1], without noise."""
        groups = torch.from_numpy(obs).transpose(0, 1).contiguous()
        return torch.tanh(self.actor(groups)).transpose(0, 1).numpy()

    def q_values(self, critic: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """(2, N, batch)"""
        pairs = torch.cat([obs, actions], dim=2).repeat(2, 1, 1)
        return critic(pairs).reshape(2, *obs.shape[:2])

    def update(self, batch: dict[str, torch.Tensor]) -> None:
        """One step on (N, batch, ...) transitions; rewards and terminations are (N, batch)."""
        args = self.args
        rate = args.learning_rate * (1 - 0.9 * self.num_updates / args.updates)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        obs, actions, next_obs = batch["obs"], batch["actions"], batch["next_obs"]
        with torch.no_grad():
            noise = (args.target_noise * torch.randn_like(actions)).clamp(
                -2 * args.target_noise, 2 * args.target_noise
            )
            next_actions = (torch.tanh(self.target_actor(next_obs)) + noise).clamp(-1, 1)
            next_q = self.q_values(self.target_critic, next_obs, next_actions).amin(0)
            target_q = batch["rewards"] + args.gamma * (1 - batch["terminations"]) * next_q
        losses = (self.q_values(self.critic, obs, actions) - target_q).square().mean(2)
        self.step(1, losses.sum())
        self.num_updates += 1
        if self.num_updates % args.policy_delay:
            return
        raw = self.actor(obs)
        q = self.q_values(self.critic, obs, torch.tanh(raw))[0].mean(1)
        # tanh saturates, and then learns no more
        self.step(0, (1e-3 * raw.square().mean((1, 2)) - q).sum())
        pairs = ((self.target_actor, self.actor), (self.target_critic, self.critic))
        with torch.no_grad():
            for target, net in pairs:
                torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), args.tau)

    def step(self, which: int, loss: torch.Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()

    def arrays(self) -> dict[str, np.ndarray]:
        """The actors: w0 b0 w1 b1 w2 b2, (N, in, out) and (N, out)."""
        found = {}
        for i, layer in enumerate(self.actor[::2]):
            found[f"w{i}"] = layer.weight.detach().numpy().copy()
            found[f"b{i}"] = layer.bias.detach().numpy()[:, 0].copy()
        return found


class Buffer:
    """The latest transitions of the team."""

    def __init__(self, size: int, num_agents: int, obs_dim: int, action_dim: int):
        self.size, self.count = size, 0
        self.arrays = {
            "obs": np.empty((size, num_agents, obs_dim), np.float32),
            "actions": np.empty((size, num_agents, action_dim), np.float32),
            "next_obs": np.empty((size, num_agents, obs_dim), np.float32),
            "rewards": np.empty((size, num_agents), np.float32),
            "terminations": np.empty((size, num_agents), np.float32),
        }

    def add(self, **rows: np.ndarray) -> None:
        """E transitions; what is the team's, (E,), is every agent's."""
        at = (self.count + np.arange(len(rows["obs"]))) % self.size
        for key, values in rows.items():
            shared = values.ndim < self.arrays[key].ndim
            self.arrays[key][at] = values[:, None] if shared else values
        self.count += len(at)

    def sample(self, rng: np.random.Generator, batch_size: int) -> dict[str, torch.Tensor]:
        """(N, batch, ...); all agents see the same moments."""
        rows = rng.integers(min(self.count, self.size), size=batch_size)
        return {
            key: torch.from_numpy(np.ascontiguousarray(values[rows].swapaxes(0, 1)))
            for key, values in self.arrays.items()
        }


def make_team(task: str, prey: bool, num_envs: int, seed: int) -> VecEnv:
    """The task as it is trained on, with `prey` its prey as the last agent; raises InputError for
    an unknown task and for one without a prey."""
    if not prey:
        return make_vec(task, num_envs, seed)
    chases = [name for name, its_class in mpe.CLASSES.items() if issubclass(its_class, mpe.Chase)]
    if task not in chases:
        raise InputError(f"--prey: {task} has no prey; {nearest(task, chases)}")
    return mpe.CLASSES[task](num_envs, seed, free_prey=True)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vec = make_team(args.task, args.prey, args.num_envs, args.seed)
    new_folder(args.out)
    num_envs, num_agents = args.num_envs, vec.num_agents
    agent = TD3(num_agents, vec.obs_dim, vec.action_dim, args)
    buffer = Buffer(args.buffer_size, num_agents, vec.obs_dim, vec.action_dim)
    np.savez(args.out / "0000000.npz", **agent.arrays())

    obs, steps, start = vec.reset(), 0, time.time()
    totals, ended = np.zeros((num_envs, num_agents)), []
    with open(args.out / "returns.csv", "w", newline="") as file:
        log = csv.writer(file, lineterminator="\n")
        log.writerow(["update", "steps", *(f"return_{i}" for i in range(num_agents))])
        while agent.num_updates < args.updates:
            shape = num_envs, num_agents, vec.action_dim
            if steps < args.warmup_steps:
                actions = rng.uniform(-1, 1, shape).astype(np.float32)
            else:
                noise = args.noise * rng.standard_normal(shape, np.float32)
                actions = np.clip(agent.act(obs) + noise, -1, 1)
            next_obs, rewards, terminations, truncations, final_obs = vec.step(vec.to_box(actions))
            scaled = (args.reward_scale * rewards).astype(np.float32)
            buffer.add(
                obs=obs,
                actions=actions,
                next_obs=final_obs,
                rewards=scaled,
                terminations=terminations,
            )
            totals += rewards[:, None] if rewards.ndim == 1 else rewards
            over = terminations | truncations
            ended += totals[over].tolist()
            totals[over] = 0
            obs, steps = next_obs, steps + num_envs
            due = max(0, steps - args.warmup_steps) // args.steps_per_update
            while agent.num_updates < min(due, args.updates):
                agent.update(buffer.sample(rng, args.batch_size))
                if agent.num_updates % args.snapshot_every == 0:
                    np.savez(args.out / f"{agent.num_updates:07d}.npz", **agent.arrays())
                    if ended:
                        means = np.round(np.mean(ended, axis=0), 2).tolist()
                        log.writerow([agent.num_updates, steps, *means])
                        file.flush()
                        ended = []
                        print(agent.num_updates, steps, means, f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    cli.cli(main, Args, tyro.cli)
