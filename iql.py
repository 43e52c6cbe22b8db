"""IQL: implicit Q-learning, decentralised, offline: every agent learns from its own data alone.

V(s) is an upper expectile of Q over the data's actions, Q bootstraps with it, and the policy clones
the data's actions weighted by exp(temperature * advantage). No action outside the data is ever
valued. One agent that moves all joints (--split 1x2) or chooses for all (coordination-game-joint)
is the centralised IQL that Barde et al. compare with.

Paper: Kostrikov, Nair and Levine, Offline Reinforcement Learning with Implicit Q-Learning, ICLR
2022, https://arxiv.org/abs/2110.06169. Continuous and discrete actions. What differs from its own
code (https://github.com/ikostrikov/implicit_q_learning) is in docs/iql.md.

    python iql.py --env reacher-full-expert-mix --split 1x2

What it scores and how long it takes: docs/iql.md.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn

from common import cli
from common.cli import OfflineArgs, Positive, Share
from common.loop import Training
from common.nets import (
    GaussianPolicy,
    Learner,
    SoftmaxPolicy,
    TwinCritic,
    adam,
    follow,
    legal_actions,
    mlp,
    step,
)


@dataclass
class Args(OfflineArgs):
    # Other defaults than the other scripts'
    env: str = "reacher-full-expert-mix"
    offline_updates: cli.Natural = 6_000
    batch_size: int = 256
    eval_every: int = 2_000

    # IQL arguments
    hidden_size: int = 256
    """units in each of the two hidden layers of every network"""
    learning_rate: float = 3e-4
    """Adam's, of every network"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target critics follow"""
    expectile: Annotated[float, cli.Range(0, 1, open=True)] = 0.7
    """of Q over the data's actions, which V is: 0.5 is the mean, 1 the maximum"""
    temperature: float = 3.0
    """of the advantage in the policy's weights exp(temperature * A); 0 clones"""
    weight_max: Positive = 100.0
    """ceiling of those weights"""
    reward_scale: Positive = 1.0
    """what rewards are multiplied by"""


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent. The policy is
# common.nets.GaussianPolicy, with discrete actions common.nets.SoftmaxPolicy.


class ValueNetwork(nn.Module):
    """V(s)."""

    def __init__(self, G: int, obs_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, 1)

    def forward(self, obs):
        """(G, batch)"""
        return self.network(obs).squeeze(2)


# --- Learner ---


class IQL(Learner):
    """G independent IQL learners; losses are averaged over the batch and summed over G."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args, discrete: bool = False):
        super().__init__(G, obs_dim)
        self.args, self.action_dim = args, action_dim
        sizes = (G, obs_dim, action_dim, args.hidden_size)
        self.actor = (SoftmaxPolicy if discrete else GaussianPolicy)(*sizes)
        self.vf = ValueNetwork(G, obs_dim, args.hidden_size)
        self.qf, self.target_qf = TwinCritic(*sizes), TwinCritic(*sizes)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.target_qf.requires_grad_(False)
        self.vf_optimizer = adam(self.vf.parameters(), args.learning_rate)
        self.qf_optimizer = adam(self.qf.parameters(), args.learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), args.learning_rate)
        self.optimizers = [self.vf_optimizer, self.qf_optimizer, self.actor_optimizer]

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of every network on a batch as `Replay.gather` returns it; losses (G,)."""
        args, actions = self.args, batch["actions"]
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        legal = legal_actions(batch["obs"], self.action_dim)

        # V: the expectile of the smaller target critic over the data's actions
        with torch.no_grad():
            target_q = self.target_qf(obs, actions).amin(0)
        advantage = target_q - self.vf(obs)  # (G, batch)
        weight = (args.expectile - (advantage < 0).float()).abs()
        vf_loss = (weight * advantage.square()).mean(1)
        step(self.vf_optimizer, vf_loss)

        # Actor: the data's actions, weighted by their advantage
        weights = (args.temperature * advantage.detach()).exp().clamp(max=args.weight_max)
        actor_loss = -(weights * self.actor.log_prob(obs, actions, legal)).mean(1)
        step(self.actor_optimizer, actor_loss)

        # Critics: y = r + gamma * V(s')
        with torch.no_grad():
            rewards = args.reward_scale * batch["rewards"]
            target = rewards + args.gamma * (1 - batch["terminations"]) * self.vf(next_obs)
        q = self.qf(obs, actions)  # (2, G, batch)
        qf_loss = (q - target).square().mean(2)  # (2, G)
        step(self.qf_optimizer, qf_loss)

        follow(self.target_qf, self.qf, args.tau)
        return {
            "losses/vf_loss": vf_loss.detach(),
            "losses/qf1_loss": qf_loss[0].detach(),
            "losses/qf2_loss": qf_loss[1].detach(),
            "losses/qf1_values": q[0].detach().mean(1),
            "losses/actor_loss": actor_loss.detach(),
            "losses/mean_weight": weights.mean(1),
        }

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The likeliest action: (G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor.mode(self.scaled(obs), legal_actions(obs, self.action_dim))

    @torch.no_grad()
    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """V(s): (G, batch)."""
        return self.vf(self.scaled(obs))


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__, discrete=None)  # each agent's own actions only
    replay = run.replay
    with run.device:
        agent = IQL(*run.sizes, args, run.discrete)
    agent.measure_scales(replay)
    run.begin(agent)

    def update() -> dict[str, torch.Tensor]:
        return agent.update(replay.gather(replay.draw_offline(args.batch_size)))

    run.train_offline(update)
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
