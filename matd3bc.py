"""MATD3+BC: TD3+BC with critics that see the team; training is central, acting is not.

A team has twin critics of what all its agents see and do. Every agent's policy climbs the first
one with its own action, its teammates' as in the data, relative to the critic's mean magnitude, and
clones the data. The critics' target takes all target policies' actions, smoothed by noise.

Source: a baseline of Barde, Foerster, Nowrouzezahrai and Zhang, AAMAS 2024,
https://arxiv.org/abs/2305.17198, which does not define it; here TD3+BC, Fujimoto and Gu, NeurIPS
2021, https://arxiv.org/abs/2106.06860, with the central critics of MADDPG, Lowe et al., NeurIPS
2017, https://arxiv.org/abs/1706.02275. Independent critics: otc_td3bc.py --deployments 0. What is
chosen is in docs/matd3bc.md.

    python matd3bc.py --env reacher-full-expert-mix

What it scores and how long it takes: docs/matd3bc.md.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from common import cli
from common.cli import OfflineArgs, Share
from common.loop import Training
from common.nets import (
    DeterministicActor,
    Learner,
    TwinCritic,
    adam,
    follow,
    joint,
    keep_own,
    mean_over_own,
    step,
)


@dataclass
class Args(OfflineArgs):
    # Other defaults than the other scripts'
    env: str = "reacher-full-expert-mix"
    offline_updates: cli.Natural = 20_000
    batch_size: int = 256
    eval_every: int = 5_000

    # MATD3+BC arguments
    hidden_size: int = 256
    """units in each of the two hidden layers of every network"""
    actor_learning_rate: float = 3e-4
    """Adam's, of the actors"""
    critic_learning_rate: float = 3e-4
    """Adam's, of the critics"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target networks follow"""
    bc_alpha: float = 2.5
    """weight of Q, relative to its mean magnitude, against cloning; TD3+BC's alpha"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policies' actions"""
    noise_clip: float = 0.5
    """largest magnitude of that noise"""
    policy_delay: int = 2
    """critic updates per update of the actors and the target networks"""


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent; what a team
# has once, with S. The networks are common.nets.DeterministicActor and common.nets.TwinCritic.


# --- Learner ---


class MATD3BC(Learner):
    """S teams of MATD3+BC; losses are averaged over the batch and summed over the stack."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__(G, obs_dim)
        self.args, N = args, G // args.num_seeds
        self.num_agents = N
        sizes = (G, obs_dim, action_dim, args.hidden_size)
        team_sizes = (args.num_seeds, N * obs_dim, N * action_dim, args.hidden_size)
        self.actor, self.target_actor = DeterministicActor(*sizes), DeterministicActor(*sizes)
        self.qf, self.target_qf = TwinCritic(*team_sizes), TwinCritic(*team_sizes)
        self.live = nn.ModuleList([self.actor, self.qf])
        self.target = nn.ModuleList([self.target_actor, self.target_qf])
        self.target.load_state_dict(self.live.state_dict())
        self.target.requires_grad_(False)
        self.keep_measured("qf1_loss", "qf2_loss", "qf1_values", "actor_loss", "bc_loss")
        self.qf_optimizer = adam(self.qf.parameters(), args.critic_learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), args.actor_learning_rate)
        self.optimizers = [self.qf_optimizer, self.actor_optimizer]

    def update(self, batch: dict[str, torch.Tensor], update_actor: bool) -> dict[str, torch.Tensor]:
        """One update of the critics, and of actors and targets where their turn has come, on a
        batch as `Replay.gather_teams` returns it, the same transitions for all agents of a team;
        losses (G,)."""
        args, N = self.args, self.num_agents
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        actions = batch["actions"]
        state, joint_actions = joint(obs, N), joint(actions, N)  # (S, batch, N * dim)

        # Critics: y = r + gamma * the smaller target critic at smoothed actions of the target
        # policies.
        with torch.no_grad():
            noise = args.policy_noise * torch.randn_like(actions)
            noise = keep_own(noise.clamp(-args.noise_clip, args.noise_clip), self.own)
            next_actions = joint((self.target_actor(next_obs) + noise).clamp(-1, 1), N)
            next_q = self.target_qf(joint(next_obs, N), next_actions).amin(0)
            goes_on = args.gamma * (1 - batch["terminations"][::N])
            target = batch["rewards"][::N] + goes_on * next_q
        q = self.qf(state, joint_actions)  # (2, S, batch)
        qf_loss = (q - target).square().mean(2)  # (2, S)
        step(self.qf_optimizer, qf_loss)

        if update_actor:
            # Actors: climb the first critic, relative to its mean magnitude, and clone the data.
            policy_actions = self.actor(obs)
            own_q = self.q_of_own(state, actions, policy_actions)  # (G, batch)
            weight = args.bc_alpha / own_q.detach().abs().mean(1)  # TD3+BC's lambda, (G,)
            bc_loss = mean_over_own((policy_actions - actions).square(), self.own)
            actor_loss = -weight * own_q.mean(1) + bc_loss
            step(self.actor_optimizer, actor_loss)
            follow(self.target, self.live, args.tau)
            self.report(actor_loss=actor_loss, bc_loss=bc_loss)
        return self.report(qf1_loss=qf_loss[0], qf2_loss=qf_loss[1], qf1_values=q[0].mean(1))

    def q_of_own(self, state, actions, own_actions) -> torch.Tensor:
        """The team's first critic at each agent's own action, its teammates' as in the data: (S,
        batch, N * obs_dim), (G, batch, action_dim) twice -> (G, batch)."""
        N, batch = self.num_agents, actions.shape[1]
        team, own = (x.unflatten(0, (-1, N)) for x in (actions, own_actions))  # (S, N, batch, dim)
        is_own = torch.eye(N, device=actions.device, dtype=torch.bool).view(N, N, 1, 1)
        changed = torch.where(is_own, own.unsqueeze(1), team.unsqueeze(1))  # (S, whose, N, ...)
        changed = changed.transpose(2, 3).flatten(3).flatten(1, 2)  # (S, N * batch, N * dim)
        q = self.qf.first(state.repeat(1, N, 1), changed)
        return q.unflatten(1, (N, batch)).flatten(0, 1)

    def kind(self, number: int, offline: bool) -> bool:
        """Whether update `number` also updates the actors and the targets."""
        return number % self.args.policy_delay == 0

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor(self.scaled(obs))


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__)
    replay = run.replay
    with run.device:
        agent = MATD3BC(*run.sizes, args)
    agent.measure_scales(replay)
    run.begin(agent)

    def update(update_actor: bool) -> dict[str, torch.Tensor]:
        batch = replay.gather_teams(replay.draw_teams(args.batch_size))
        return agent.update(batch, update_actor)

    run.train_offline(update)
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
