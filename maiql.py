"""MAIQL: multi-agent implicit Q-learning; training is central, the policies are decentralised.

Every agent has twin critics Q_i and a value V_i of its own observation; mixers that see the whole
team add them up, with weights of any sign, to a Q and a V of the team, which learn as in IQL: V is
an expectile of Q, Q bootstraps with V. All agents clone the data's actions with one weight,
exp(temperature * the team's advantage).

Source: the baseline of Barde, Foerster, Nowrouzezahrai and Zhang, AAMAS 2024,
https://arxiv.org/abs/2305.17198, on IQL, Kostrikov et al., ICLR 2022,
https://arxiv.org/abs/2110.06169. Continuous and discrete actions. What the source leaves open and
what is chosen is in docs/maiql.md.

    python maiql.py --env coordination-game-unfavourable

What it scores and how long it takes: docs/maiql.md.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn

from common import cli
from common.cli import OfflineArgs, Positive, Share
from common.loop import Training
from common.nets import (
    Critic,
    GaussianPolicy,
    Learner,
    Mixer,
    SoftmaxPolicy,
    adam,
    follow,
    joint,
    legal_actions,
    mlp,
    step,
)


@dataclass
class Args(OfflineArgs):
    # Other defaults than the other scripts'
    env: str = "reacher-full-expert-mix"
    offline_updates: cli.Natural = 20_000
    batch_size: int = 256
    eval_every: int = 5_000

    # MAIQL arguments
    hidden_size: int = 256
    """units in each of the two hidden layers of every network"""
    learning_rate: float = 3e-4
    """Adam's, of every network"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target critics and their mixer follow"""
    expectile: Annotated[float, cli.Range(0, 1, open=True)] = 0.7
    """of the team's Q over the data's actions, which its V is: 0.5 is the mean, 1 the maximum"""
    temperature: float = 3.0
    """of the team's advantage in the policies' weights exp(temperature * A); 0 clones"""
    weight_max: Positive = 100.0
    """ceiling of those weights"""
    reward_scale: Positive = 1.0
    """what rewards are multiplied by"""
    max_grad_norm: Positive = 1.0
    """largest norm of a team's gradient, of each loss"""


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent; what a team
# has once, with S. The policy is common.nets.GaussianPolicy, or SoftmaxPolicy.


class MixedCritics(nn.Module):
    """Twin critics Q_i of every agent and the mixer of both."""

    def __init__(self, G: int, N: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.qf1, self.qf2 = (Critic(G, obs_dim, action_dim, hidden_size) for _ in range(2))
        self.mixer = Mixer(G // N, N, N * (obs_dim + action_dim), hidden_size)

    def forward(self, obs, actions):
        """Both Q of the team, (S, batch) each; (G, batch, obs_dim), (G, batch, action_dim)."""
        seen = joint(torch.cat([obs, actions], dim=2), self.mixer.num_agents)
        return self.mixer(self.qf1(obs, actions), seen), self.mixer(self.qf2(obs, actions), seen)


class MixedValue(nn.Module):
    """V_i of every agent and their mixer."""

    def __init__(self, G: int, N: int, obs_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, 1)
        self.mixer = Mixer(G // N, N, N * obs_dim, hidden_size)

    def forward(self, obs):
        """V of the team: (G, batch, obs_dim) -> (S, batch)."""
        return self.mixer(self.network(obs).squeeze(2), joint(obs, self.mixer.num_agents))


# --- Learner ---


class MAIQL(Learner):
    """S teams of MAIQL; losses are averaged over the batch and summed over the stack."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args, discrete: bool = False):
        super().__init__(G, obs_dim)
        self.args, self.action_dim, N = args, action_dim, G // args.num_seeds
        self.num_agents, self.clip = N, (args.num_seeds, args.max_grad_norm)
        policy = SoftmaxPolicy if discrete else GaussianPolicy
        self.actor = policy(G, obs_dim, action_dim, args.hidden_size)
        self.vf = MixedValue(G, N, obs_dim, args.hidden_size)
        self.qf, self.target_qf = (
            MixedCritics(G, N, obs_dim, action_dim, args.hidden_size) for _ in range(2)
        )
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.target_qf.requires_grad_(False)
        self.vf_optimizer = adam(self.vf.parameters(), args.learning_rate)
        self.qf_optimizer = adam(self.qf.parameters(), args.learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), args.learning_rate)
        self.optimizers = [self.vf_optimizer, self.qf_optimizer, self.actor_optimizer]

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of every network on a batch as `Replay.gather_teams` returns it, the same
        transitions for all agents of a team; losses (G,)."""
        args, actions, N = self.args, batch["actions"], self.num_agents
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        legal = legal_actions(batch["obs"], self.action_dim)
        rewards, terminations = batch["rewards"][::N], batch["terminations"][::N]  # (S, batch)

        # V: the expectile of the smaller mixed target critic over the data's actions
        with torch.no_grad():
            target_q = torch.minimum(*self.target_qf(obs, actions))
        advantage = target_q - self.vf(obs)  # (S, batch)
        weight = (args.expectile - (advantage < 0).float()).abs()
        vf_loss = (weight * advantage.square()).mean(1)
        step(self.vf_optimizer, vf_loss, self.clip)

        # Actors: the data's actions, weighted by the team's advantage
        weights = (args.temperature * advantage.detach()).exp().clamp(max=args.weight_max)
        log_prob = self.actor.log_prob(obs, actions, legal)  # (G, batch)
        actor_loss = -(weights.repeat_interleave(N, dim=0) * log_prob).mean(1)
        step(self.actor_optimizer, actor_loss, self.clip)

        # Critics: y = r + gamma * the team's V(s')
        with torch.no_grad():
            next_value = self.vf(next_obs)
            target = args.reward_scale * rewards + args.gamma * (1 - terminations) * next_value
        q1, q2 = self.qf(obs, actions)
        qf1_loss, qf2_loss = (q1 - target).square().mean(1), (q2 - target).square().mean(1)
        step(self.qf_optimizer, qf1_loss + qf2_loss, self.clip)

        follow(self.target_qf, self.qf, args.tau)
        losses = {
            "losses/vf_loss": vf_loss.detach(),
            "losses/qf1_loss": qf1_loss.detach(),
            "losses/qf2_loss": qf2_loss.detach(),
            "losses/qf1_values": q1.detach().mean(1),
            "losses/mean_weight": weights.mean(1),
        }
        losses = {tag: loss.repeat_interleave(N) for tag, loss in losses.items()}
        return losses | {"losses/actor_loss": actor_loss.detach()}

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The likeliest action: (G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor.mode(self.scaled(obs), legal_actions(obs, self.action_dim))


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__, discrete=None)
    replay = run.replay
    with run.device:
        agent = MAIQL(*run.sizes, args, run.discrete)
    agent.measure_scales(replay)
    run.begin(agent)

    def update() -> dict[str, torch.Tensor]:
        return agent.update(replay.gather_teams(replay.draw_teams(args.batch_size)))

    run.train_offline(update)
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
