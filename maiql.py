"""MAIQL: multi-agent implicit Q-learning; training is central, the policies are decentralised.

Every agent has twin critics Q_i and a value V_i of its own observation; mixers that see the whole
team add them up, with weights of any sign, to a Q and a V of the team, which learn as in IQL: V is
an expectile of Q, Q bootstraps with V. All agents clone the data's actions with one weight,
exp(temperature * the team's advantage). With --finetune (MAIQL-ft) the policies then meet in a
learned world model, whose short rollouts are added to the data.

Source: the baseline of Barde, Foerster, Nowrouzezahrai and Zhang, AAMAS 2024,
https://arxiv.org/abs/2305.17198, on IQL, Kostrikov et al., ICLR 2022,
https://arxiv.org/abs/2110.06169. Continuous and discrete actions. What the source leaves open and
what is chosen is in docs/maiql.md.

    python maiql.py --env coordination-game-unfavourable
    python maiql.py --env coordination-game-unfavourable --finetune

What it scores and how long it takes: docs/maiql.md.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn

from common import InputError, cli
from common.cli import Natural, OfflineArgs, Positive, Share
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
    of_each,
    step,
)
from common.replay import Replay
from common.world_model import WorldModel


@dataclass
class Args(OfflineArgs):
    # Other defaults than the other scripts'
    env: str = "reacher-full-expert-mix"
    offline_updates: Natural = 6_000
    batch_size: int = 256
    eval_every: int = 2_000

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
    """largest norm of a team's gradient, of each loss, and of each member's of the model"""

    # MAIQL-ft arguments
    finetune: bool = False
    """fit a world model first, and let the last updates draw from its rollouts as well"""
    model_updates: Natural = 2_000
    """the first so many of --offline-updates, which fit the world model"""
    finetune_updates: int = 1_500
    """the last so many, each of which imagines one rollout and learns from data and rollouts"""
    rollout_length: int = 10
    """steps of an imagined rollout; at most an episode's"""
    imagined_size: int = 1_000_000
    """imagined transitions that are kept, the latest"""
    uncertainty_penalty: float = 1.0
    """of the members' variance of the reward and the largest norm of the variances they predict"""
    num_models: int = 7
    """members of the world model"""
    model_hidden_size: int = 128
    """units in each hidden layer of a member; published 1024"""
    model_layers: int = 2
    """hidden layers of a member; published 4"""
    model_learning_rate: float = 1e-3
    """Adam's, of the world model; published 3e-5"""
    model_beta: Share = 0.5
    """exponent of the predicted variance that weights each log-likelihood; published 0"""

    def check(self) -> None:
        """Refuse a fine-tuning without anything to tune, and a model without a second opinion."""
        super().check()
        if self.finetune and self.offline_updates <= self.model_updates + self.finetune_updates:
            raise InputError(
                f"--offline-updates {self.offline_updates}: with --finetune more than "
                f"--model-updates {self.model_updates} and --finetune-updates "
                f"{self.finetune_updates} together"
            )
        if self.finetune and self.num_models < 2:
            raise InputError("--num-models 1: expected at least 2, whose disagreement is punished")
        if self.finetune and self.imagined_size < self.rollout_length:
            raise InputError(
                f"--imagined-size {self.imagined_size}: expected room for --rollout-length "
                f"{self.rollout_length}"
            )


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent; what a team
# has once, with S. The policy is common.nets.GaussianPolicy, or SoftmaxPolicy; the world model
# common.world_model.WorldModel.


class MixedCritics(nn.Module):
    """Twin critics Q_i of every agent and the mixer of both. They are two stacks: clipping takes a
    team's rows of a stack to be side by side."""

    def __init__(self, G: int, N: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.qf1, self.qf2 = (Critic(G, obs_dim, action_dim, hidden_size) for _ in range(2))
        self.mixer = Mixer(G // N, N, N * (obs_dim + action_dim), hidden_size)

    def forward(self, obs, actions):
        """Both Q of the team: (G, batch, obs_dim), (G, batch, action_dim) -> (2, S, batch)."""
        seen = joint(torch.cat([obs, actions], dim=2), self.mixer.num_agents)
        return self.mixer(torch.stack([qf(obs, actions) for qf in (self.qf1, self.qf2)]), seen)


class MixedValue(nn.Module):
    """V_i of every agent and their mixer."""

    def __init__(self, G: int, N: int, obs_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, 1)
        self.mixer = Mixer(G // N, N, N * obs_dim, hidden_size)

    def forward(self, obs):
        """V of the team: (G, batch, obs_dim) -> (S, batch)."""
        return self.mixer(self.network(obs).squeeze(2), joint(obs, self.mixer.num_agents))


class Imagined(nn.Module):
    """The latest imagined transitions of G agents."""

    def __init__(self, G: int, N: int, obs_dim: int, action_dim: int, size: int):
        super().__init__()
        self.num_agents, self.size = N, size
        dims = {"obs": obs_dim, "next_obs": obs_dim, "actions": action_dim}
        for name, dim in dims.items():
            self.register_buffer(name, torch.zeros(G, size, dim))
        for name in ("rewards", "terminations"):
            self.register_buffer(name, torch.zeros(G, size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # of all that were added

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """Keep rows (G, n, ...) in place of the oldest."""
        n = rows["rewards"].shape[1]
        at = (self.count + torch.arange(n, device=self.count.device)) % self.size
        for name, x in rows.items():
            getattr(self, name).index_copy_(1, at, x)
        self.count += n

    def draw_with(self, replay: Replay, num_samples: int) -> dict[str, torch.Tensor]:
        """A batch as `Replay.gather_teams` returns it, uniform over offline and imagined data."""
        n, shape = replay.num_offline, (replay.num_seeds, num_samples)
        number = torch.rand(shape, device=self.count.device, dtype=torch.float64)
        index = (number * (n + self.count.clamp(max=self.size))).long()
        index = index.repeat_interleave(self.num_agents, dim=0)  # (G, num_samples)
        batch, at = replay.gather_teams(index.clamp(max=n - 1)), (index - n).clamp(min=0)

        def mixed(real: torch.Tensor, imagined: torch.Tensor) -> torch.Tensor:
            its_shape = *at.shape, *[1] * (real.dim() - 2)
            imagined = imagined.take_along_dim(at.view(its_shape), dim=1)
            return torch.where(index.view(its_shape) < n, real, imagined)

        return {name: mixed(x, getattr(self, name)) for name, x in batch.items()}


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
        if args.finetune:
            sizes = args.num_models, args.model_hidden_size, args.model_layers, args.model_beta
            self.model = WorldModel(args.num_seeds, N, obs_dim, action_dim, *sizes)
            self.model_optimizer = adam(self.model.parameters(), args.model_learning_rate)
            self.optimizers.append(self.model_optimizer)
            size = min(args.imagined_size, args.finetune_updates * args.rollout_length)
            self.imagined = Imagined(G, N, obs_dim, action_dim, size)
        names = ("vf_loss", "qf1_loss", "qf2_loss", "qf1_values", "mean_weight", "actor_loss")
        of_model = ("model_loss", "reward_loss", "continuation_loss", "imagined_reward", "penalty")
        self.keep_measured(*names, *(of_model if args.finetune else ()))

    def measure_scales(self, replay: Replay) -> None:
        """Take the scales of the offline data, and the world model's box."""
        super().measure_scales(replay)
        if self.args.finetune:
            self.model.measure(replay)

    def kind(self, number: int, offline: bool) -> str:
        """What update `number` does."""
        args = self.args
        if not args.finetune:
            return "learn"
        if number <= args.model_updates:
            return "fit"
        return "learn" if number <= args.offline_updates - args.finetune_updates else "finetune"

    def update(self, batch: dict[str, torch.Tensor], kind: str = "learn") -> dict:
        """One update on a batch as `Replay.gather_teams` returns it, the same transitions for all
        agents of a team: of the world model, or of every other network; losses (G,)."""
        return self.fit(batch) if kind == "fit" else self.learn(batch)

    def learn(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update of MAIQL's networks."""
        args, actions, N = self.args, batch["actions"], self.num_agents
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        legal = legal_actions(batch["obs"], self.action_dim)
        rewards, terminations = batch["rewards"][::N], batch["terminations"][::N]  # (S, batch)

        # V: the expectile of the smaller mixed target critic over the data's actions
        with torch.no_grad():
            target_q = self.target_qf(obs, actions).amin(0)
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
        q = self.qf(obs, actions)  # (2, S, batch)
        qf_loss = (q - target).square().mean(2)  # (2, S)
        step(self.qf_optimizer, qf_loss, self.clip)

        follow(self.target_qf, self.qf, args.tau)
        return self.report(
            vf_loss=vf_loss,
            qf1_loss=qf_loss[0],
            qf2_loss=qf_loss[1],
            qf1_values=q[0].mean(1),
            mean_weight=weights.mean(1),
            actor_loss=actor_loss,
        )

    # The world model

    def fit(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step of every member on its own part of a batch."""
        losses = self.model.losses(batch)  # (S, num_models) each
        step(self.model_optimizer, sum(losses), (losses[0].numel(), self.args.max_grad_norm))
        names = ("model_loss", "reward_loss", "continuation_loss")
        return self.report(**{n: x.mean(1) for n, x in zip(names, losses, strict=True)})

    @torch.no_grad()
    def imagine(self, starts: torch.Tensor) -> None:
        """Add one rollout per team of the present policies, as many steps as `starts` (G, steps,
        obs_dim) has states: it begins in the first, and where it ends it goes on from the next."""
        args, N, rows = self.args, self.num_agents, []
        next_obs, ends = starts[:, :1], torch.ones_like(starts[:, :1, 0])
        for start in starts.split(1, dim=1):
            raw_obs = torch.where(ends.unsqueeze(2) > 0, start, next_obs)
            legal = legal_actions(raw_obs, self.action_dim)
            actions = self.actor.sample(self.scaled(raw_obs), legal).clamp(-1, 1)
            state, joint_actions = joint(raw_obs, N), joint(actions, N)  # (S, 1, N * dim)
            mean, variance, goes_on = self.model.expect(state, joint_actions, self.model.everyone)
            # A random member's next state, the smallest reward of all
            member = torch.randint(args.num_models, (len(state), 1, 1), device=state.device)
            outcome = mean.take_along_dim(member.unsqueeze(3), dim=1).squeeze(1)
            outcome = torch.cat([outcome[..., :-1], mean[..., -1:].amin(1)], dim=2)
            next_state, reward = self.model.following(state, outcome)
            uncertainty = mean[..., -1].var(1) + variance.norm(dim=3).amax(1)  # (S, 1)
            penalty = args.uncertainty_penalty * uncertainty
            is_end = goes_on.take_along_dim(member, dim=1).squeeze(1) <= 0.5
            of_team = (x.repeat_interleave(N, dim=0) for x in (reward, penalty, is_end.float()))
            reward, penalty, ends = of_team  # (G, 1)
            next_obs = of_each(next_state, N)
            rows.append((raw_obs, next_obs, actions, reward - penalty, ends, penalty))
        names = ("obs", "next_obs", "actions", "rewards", "terminations")
        *columns, penalty = (torch.cat(column, dim=1) for column in zip(*rows, strict=True))
        rollout = dict(zip(names, columns, strict=True))
        self.imagined.add(rollout)
        self.report(imagined_reward=(rollout["rewards"] + penalty).mean(1), penalty=penalty.mean(1))

    # Acting

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The likeliest action: (G, E, obs_dim) -> (G, E, action_dim)."""
        return self.actor.mode(self.scaled(obs), legal_actions(obs, self.action_dim))


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__, discrete=None)
    replay = run.replay
    longest = min(args.rollout_length, run.envs.max_episode_steps)
    args = dataclasses.replace(args, rollout_length=longest)
    with run.device:
        agent = MAIQL(*run.sizes, args, run.discrete)
    agent.measure_scales(replay)
    run.begin(agent)

    def update(kind: str) -> dict[str, torch.Tensor]:
        if kind == "finetune":
            agent.imagine(replay.gather_teams(replay.draw_teams(args.rollout_length))["obs"])
            return agent.update(agent.imagined.draw_with(replay, args.batch_size))
        size = args.batch_size * (args.num_models if kind == "fit" else 1)
        return agent.update(replay.gather_teams(replay.draw_teams(size)), kind)

    run.train_offline(update)
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
