"""MOMA-PPO: offline multi-agent RL in a learned world model; training is central, acting is not.

An ensemble learns from the team's data how joint observations follow joint actions. In it the
agents' decentralised policies meet each other: short rollouts from states of the data, kept in the
data's box, cut short and punished where the members disagree, train them by multi-agent PPO with
one joint ratio and a mixed value. So agents that learned from several conventions agree on one.

Paper: Barde, Foerster, Nowrouzezahrai and Zhang, A Model-Based Solution to the Offline Multi-Agent
Reinforcement Learning Coordination Problem, AAMAS 2024, https://arxiv.org/abs/2305.17198. Against
its own code (https://github.com/PBarde/moma-ppo): agents and seeds are stacked, the model predicts
standardised differences of distinct entries, rollouts that end early start anew, and the cut by
uncertainty does happen; the whole list is in docs/moma_ppo.md.

    python moma_ppo.py --env reacher-leader-expert-mix

What it scores and how long it takes: docs/moma_ppo.md.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InputError, cli
from common.cli import Natural, OfflineArgs, Positive, Share
from common.loop import Training
from common.nets import (
    GaussianPolicy,
    Learner,
    Linear,
    Mixer,
    SoftmaxPolicy,
    adam,
    joint,
    keep_own,
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
    env: str = "reacher-leader-expert-mix"
    offline_updates: Natural = 3_401
    """updates of the world model, one that ranks its members, and the rest of the policies"""
    batch_size: int = 256
    """transitions per update and member of the world model"""
    eval_every: int = 100
    log_every: int = 50

    # MOMA-PPO arguments
    model_updates: Natural = 3_000
    """first updates, which fit the world model"""
    num_models: int = 7
    """members that are trained"""
    num_elites: int = 5
    """members that are used: the best on the validation data"""
    model_hidden_size: int = 128
    """units in each hidden layer of a member; published 1024"""
    model_layers: int = 2
    """hidden layers of a member; published 4"""
    model_learning_rate: float = 1e-3
    """Adam's, of the world model; published 3e-5"""
    model_beta: Share = 0.5
    """exponent of the predicted variance that weights each log-likelihood, so that what is hard to
    predict is not given up; published 0, the plain one"""

    # Its rollouts
    transitions: int = 2000
    """imagined transitions per update of the policies"""
    rollout_length: int = 10
    """steps of an imagined rollout; at most an episode's"""
    uncertainty_penalty: float = 0.1
    """of the norm of the members' covariance, of next state and reward; lambda_g"""
    reward_penalty: float = 0.05
    """of the members' variance of the reward; lambda_r"""
    aleatoric_penalty: float = 0.0
    """of the largest norm of the variances that a member predicts"""
    uncertainty_threshold: Positive | None = None
    """norm of the covariance above which a rollout is cut, and largest value of each penalised
    term; default: 2, or the 99 % quantile of the validation data if that is more"""
    early_termination: bool = True
    """cut rollouts by uncertainty; in the released code this never happens"""
    box: bool = True
    """keep imagined states and rewards within the smallest and largest of the data, and the values
    of the states that follow within what such rewards add up to"""

    # Its policies
    hidden_size: int = 128
    """units in each of the two hidden layers of policies, values and mixer; published 256"""
    history: Natural = 10
    """frames (observation, action) that an agent remembers; at most an episode's. 0: none"""
    memory_size: int = 32
    """size of what the memory makes of them; published 128"""
    learning_rate: float = 3e-4
    """Adam's, of policies, values, memory and mixer; published 5e-5"""
    gamma: Share = 0.99
    """discount"""
    gae_lambda: Share = 0.98
    """lambda of the generalised advantages"""
    epochs: int = 5
    """passes over the imagined transitions"""
    minibatch_size: int = 500
    """transitions per gradient step; published 64"""
    clip: Share = 0.2
    """of the joint ratio, and of the value's change"""
    value_coefficient: float = 0.5
    """weight of the value loss"""
    target_entropy: Annotated[float, cli.Range(-1e9, 1e9)] = -2.0
    """least entropy of the team's joint policy"""
    entropy_gain: float = 1e-3
    """rate at which the entropy's weight changes, per gradient step"""
    bound_penalty: float = 1.0
    """weight of the squared distance of the means from the action box"""
    max_grad_norm: Positive = 1.0
    """largest norm of a team's gradient, and of each member's"""

    def check(self) -> None:
        """Refuse a run without a policy update, and sizes that do not fit each other."""
        super().check()
        if self.offline_updates < self.model_updates + 2:
            raise InputError(
                f"--offline-updates {self.offline_updates}: with --model-updates "
                f"{self.model_updates} no policy would be trained; at least "
                f"{self.model_updates + 2}"
            )
        if not 2 <= self.num_elites <= self.num_models:
            raise InputError(
                f"--num-elites {self.num_elites}: expected at least 2 and at most --num-models "
                f"{self.num_models}"
            )
        if self.transitions < 2:
            raise InputError(f"--transitions {self.transitions}: expected at least 2")
        if self.minibatch_size > self.transitions or self.rollout_length > self.transitions:
            raise InputError(
                f"--transitions {self.transitions}: expected at least --minibatch-size "
                f"{self.minibatch_size} and --rollout-length {self.rollout_length}"
            )

    def within(self, longest: int) -> "Args":
        """With histories and rollouts that fit into episodes of `longest` steps."""
        history, length = min(self.history, longest - 1), min(self.rollout_length, longest)
        return dataclasses.replace(self, history=history, rollout_length=length)


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent; what a team
# has once, with S. The world model is common.world_model.WorldModel.


def covariance_norm(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of the members' unbiased covariance: (S, E, batch, dim) -> (S, batch)."""
    x = (x - x.mean(1, keepdim=True)).transpose(1, 2)  # (S, batch, E, dim)
    # of X^T X, dim x dim, by X X^T, E x E, which has the same
    return (x @ x.mT).flatten(2).norm(dim=2) / (x.shape[2] - 1)


class Memory(nn.Module):
    """The latest frames, oldest first, as one vector: self-attention with one head, then a learned
    query's average. Frames from before the episode are zeros."""

    def __init__(self, G: int, frame_dim: int, length: int, size: int):
        super().__init__()
        self.embed, self.attend = Linear(G, frame_dim, size), Linear(G, size, 3 * size)
        self.query = Linear(G, size, 1)
        at = torch.arange(length).unsqueeze(1) / 10_000 ** (torch.arange(0, size, 2) / size)
        waves = torch.stack([at.sin(), at.cos()], dim=2).flatten(1)[:, :size]
        self.register_buffer("position", waves, persistent=False)

    def forward(self, frames):
        """(G, batch, length, frame_dim) -> (G, batch, size)."""
        shape = frames.shape[1:3]
        x = self.embed(frames.flatten(1, 2)).unflatten(1, shape) + self.position
        queries, keys, values = self.attend(x.flatten(1, 2)).unflatten(1, shape).chunk(3, dim=3)
        scores = queries @ keys.mT / x.shape[3] ** 0.5  # (G, batch, length, length)
        x = F.layer_norm(x + scores.softmax(3) @ values, x.shape[3:])
        weights = self.query(x.flatten(1, 2)).unflatten(1, shape).softmax(2)
        return (weights * x).sum(2)


class LinearGaussianPolicy(GaussianPolicy):
    """Its mean may leave the action box, from which a penalty brings it back."""

    def forward(self, obs):
        mean, raw_log_std = self.network(obs).chunk(2, dim=2)
        return mean, -6 * torch.sigmoid(raw_log_std - 2)

    def evaluate(self, obs, actions, legal=None):
        """The actions' log density and the mean's squared distance from the box, (G, batch)."""
        mean, log_std = self(obs)
        excess = keep_own(F.relu(mean.abs() - 1).square(), self.own).sum(2)
        return self.log_density(mean, log_std, actions), excess


class BoxlessSoftmaxPolicy(SoftmaxPolicy):
    """The same for discrete actions, which have no box to leave."""

    def evaluate(self, obs, actions, legal):
        """The actions' log-probability and 0, (G, batch)."""
        log_prob = self.log_prob(obs, actions, legal)
        return log_prob, torch.zeros_like(log_prob)


# --- Learner ---


class MOMAPPO(Learner):
    """S teams of MOMA-PPO; losses are averaged over the batch and summed over the stack."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args, discrete: bool = False):
        super().__init__(G, obs_dim)
        S = args.num_seeds
        self.args, self.num_agents, self.action_dim = args, G // S, action_dim
        N, size = G // S, args.memory_size if args.history else 0
        sizes = args.num_models, args.model_hidden_size, args.model_layers, args.model_beta
        self.model = WorldModel(S, N, obs_dim, action_dim, *sizes)
        self.register_buffer("elites", torch.arange(args.num_elites).repeat(S, 1))
        self.register_buffer("threshold", torch.full((S, 1), args.uncertainty_threshold or 2.0))
        policy = BoxlessSoftmaxPolicy if discrete else LinearGaussianPolicy
        self.actor = policy(G, size + obs_dim, action_dim, args.hidden_size)
        with torch.no_grad():  # little depends on the state at first
            self.actor.network[-1].weight *= 0.1
            self.actor.network[-1].bias.zero_()
        self.vf = mlp(G, size + obs_dim, args.hidden_size, 1)
        self.mixer = Mixer(S, N, N * obs_dim, args.hidden_size)
        self.memory, self.frames = None, None  # `frames` (G, E, history, frame_dim), acting
        if args.history:
            self.memory = Memory(G, obs_dim + action_dim, args.history, size)
        modules = (self.actor, self.vf, self.mixer, *([self.memory] if args.history else []))
        parameters = [p for module in modules for p in module.parameters()]
        self.policy_optimizer = adam(parameters, args.learning_rate)
        self.model_optimizer = adam(self.model.parameters(), args.model_learning_rate)
        self.optimizers = [self.model_optimizer, self.policy_optimizer]
        self.register_buffer("alpha", torch.zeros(S))  # weight of the entropy
        self.keep_measured(
            *("model_loss", "reward_loss", "continuation_loss", "model_error"),
            *("uncertainty_50", "uncertainty_95", "uncertainty_99"),
            *("imagined_reward", "penalty", "cut_share", "actor_loss", "vf_loss"),
            *("entropy", "entropy_weight", "clip_share"),
        )

    def measure_scales(self, replay: Replay) -> None:
        """Take the scales of the offline data, and the world model's box."""
        super().measure_scales(replay)
        self.model.measure(replay)

    def kind(self, number: int, offline: bool) -> str:
        """What update `number` does: the name of a method."""
        before = self.args.model_updates
        return "fit" if number <= before else "rank" if number == before + 1 else "improve"

    def update(self, batch: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
        """One update of a kind, on a batch as `Replay.gather_teams` returns it; losses (G,)."""
        return getattr(self, kind)(batch)

    # The world model

    def fit(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step of every member on its own part of a batch."""
        losses = self.model.losses(batch)  # (S, num_models) each
        clip = losses[0].numel(), self.args.max_grad_norm
        step(self.model_optimizer, sum(losses), clip)
        model_loss, reward_loss, continuation_loss = (loss.mean(1) for loss in losses)
        return self.report(
            model_loss=model_loss, reward_loss=reward_loss, continuation_loss=continuation_loss
        )

    @torch.no_grad()
    def rank(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Choose the elites by their distance from the next states and rewards of a batch that no
        member was fitted to, and the threshold by how much they disagree there."""
        args, model = self.args, self.model
        state, actions, outcome, _ = model.transitions(batch)
        mean, _, _ = model.expect(state, actions, model.everyone)
        error = model.predicted * (mean - outcome.unsqueeze(1))  # (S, num_models, n, state_dim + 1)
        distance = error[..., :-1].norm(dim=3).mean(2) + error[..., -1].abs().mean(2)
        self.elites.copy_(distance.topk(args.num_elites, dim=1, largest=False).indices)
        of_elites = self.elites[..., None, None]
        uncertainty = covariance_norm(mean.take_along_dim(of_elites, dim=1))  # (S, n)
        quantiles = [uncertainty.quantile(q, dim=1) for q in (0.5, 0.95, 0.99)]  # (S,) each
        if args.uncertainty_threshold is None:
            self.threshold.copy_(quantiles[2].clamp(min=2).unsqueeze(1))
        # Root mean square error of the elites' mean, in standard deviations of the changes
        relative = error.take_along_dim(of_elites, dim=1).mean(1) / model.change_std
        count = model.predicted.sum() * relative.shape[1]
        return self.report(
            model_error=(relative.square().sum((1, 2)) / count).sqrt(),
            uncertainty_50=quantiles[0],
            uncertainty_95=quantiles[1],
            uncertainty_99=quantiles[2],
        )

    def imagined_step(self, state, actions) -> tuple[torch.Tensor, ...]:
        """One step in the model, by a random elite per transition: (S, batch, dim) -> the next
        state in the box (S, batch, state_dim), the penalised reward, whether it goes on, the norm
        of the elites' covariance and the penalty, (S, batch) each."""
        args, (S, batch) = self.args, state.shape[:2]
        mean, variance, goes_on = self.model.expect(state, actions, self.elites)
        uncertainty = covariance_norm(mean)
        terms = (
            (args.uncertainty_penalty, uncertainty),
            (args.reward_penalty, mean[..., -1].var(1)),
            (args.aleatoric_penalty, variance.norm(dim=3).amax(1)),
        )
        penalty = sum(weight * torch.minimum(term, self.threshold) for weight, term in terms)
        picked = torch.randint(args.num_elites, (S, batch), device=state.device).unsqueeze(1)
        outcome = mean.take_along_dim(picked.unsqueeze(3), dim=1).squeeze(1)
        next_state, reward = self.model.following(state, outcome, args.box)
        goes_on = (goes_on.take_along_dim(picked, dim=1).squeeze(1) > 0.5).float()
        return next_state, reward - penalty, goes_on, uncertainty, penalty

    # The policies

    def features(self, frames: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """What actors and values see: the memory of the frames and the scaled observation."""
        return obs if self.memory is None else torch.cat([self.memory(frames), obs], dim=2)

    def team_value(self, features: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """V of the team: features and scaled observations (G, batch, dim) -> (S, batch)."""
        return self.mixer(self.vf(features).squeeze(2), joint(obs, self.num_agents))

    def within_reach(self, values: torch.Tensor) -> torch.Tensor:
        """Values (S, n) of states that follow, no larger and no smaller than what rewards in the
        box, less all penalties, add up to. A rollout is cut where nobody has been: what the
        networks make of that state would else go into their own targets and grow without end."""
        args, horizon = self.args, 1 / max(1 - self.args.gamma, 1e-6)
        weights = args.uncertainty_penalty + args.reward_penalty + args.aleatoric_penalty
        lowest = self.model.low[-1] - weights * self.threshold
        highest = self.model.high[-1]
        return torch.clamp(values, lowest.clamp(max=0) * horizon, highest.clamp(min=0) * horizon)

    def remember(self, history: dict[str, torch.Tensor]) -> torch.Tensor:
        """`Replay.gather_history`'s as frames (G, n, history, obs_dim + action_dim)."""
        obs = self.scaled(history["obs"].flatten(1, 2)).unflatten(1, history["obs"].shape[1:3])
        frames = torch.cat([obs, history["actions"]], dim=3)
        return frames * history["is_there"].unsqueeze(3)

    @torch.no_grad()
    def imagine(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rollouts of the present policies in the model. Every row of the batch is a place to
        start: of n = T * branches rows the first begin, and where a branch ends at step t it goes
        on from row t + 1 of its own.

        Returns:
            scaled obs, next_obs, raw_obs and frames, next_frames (G, T, branches, ...), actions
            (G, T, branches, action_dim), rewards, goes_on (0: a termination), is_cut and penalty
            (S, T, branches).
        """
        args, N = self.args, self.num_agents
        T = args.rollout_length
        starts = batch["obs"].unflatten(1, (T, -1))  # (G, T, branches, obs_dim)
        start_frames = self.remember(batch["history"]).unflatten(1, (T, starts.shape[2]))
        raw_obs, frames, steps = starts[:, 0], start_frames[:, 0], []
        for t in range(T):
            obs, legal = self.scaled(raw_obs), legal_actions(raw_obs, self.action_dim)
            actions = self.actor.sample(self.features(frames, obs), legal)
            played = actions.clamp(-1, 1)
            following = self.imagined_step(joint(raw_obs, N), joint(played, N))
            next_state, rewards, goes_on, uncertainty, penalty = following
            next_raw = of_each(next_state, N)
            is_cut = torch.full_like(rewards, float(t == T - 1))
            if args.early_termination:
                is_cut = torch.maximum(is_cut, (uncertainty > self.threshold).float())
            next_frames = push(frames, obs, played)
            row = {"raw_obs": raw_obs, "obs": obs, "next_obs": self.scaled(next_raw)}
            row |= {"frames": frames, "next_frames": next_frames, "actions": actions}
            row |= {"rewards": rewards, "goes_on": goes_on, "is_cut": is_cut, "penalty": penalty}
            steps.append(row)
            if t < T - 1:
                ended = torch.maximum(is_cut, 1 - goes_on).repeat_interleave(N, dim=0).unsqueeze(2)
                raw_obs = torch.where(ended > 0, starts[:, t + 1], next_raw)
                frames = torch.where(ended.unsqueeze(3) > 0, start_frames[:, t + 1], next_frames)
        return {name: torch.stack([row[name] for row in steps], dim=1) for name in steps[0]}

    def improve(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update by PPO on rollouts that begin at the batch's rows, which come with their
        `history`."""
        args, N = self.args, self.num_agents
        rollouts = self.imagine(batch)
        shape = rollouts["rewards"].shape[1:]  # T, branches
        rows = {name: x.flatten(1, 2) for name, x in rollouts.items()}  # (G or S, n, ...)
        rows["legal"] = legal_actions(rows["raw_obs"], self.action_dim)
        with torch.no_grad():
            features = self.features(rows["frames"], rows["obs"])
            next_features = self.features(rows["next_frames"], rows["next_obs"])
            values = self.team_value(features, rows["obs"])
            next_values = self.team_value(next_features, rows["next_obs"])
            if args.box:
                next_values = self.within_reach(next_values)
            advantages, returns = advantages_and_returns(
                rollouts["rewards"],
                *(x.unflatten(1, shape) for x in (values, next_values)),
                rollouts["goes_on"],
                rollouts["is_cut"],
                args.gamma,
                args.gae_lambda,
            )
            advantages = advantages.flatten(1)
            spread = advantages.std(1, keepdim=True) + 1e-3
            rows["advantages"] = (advantages - advantages.mean(1, keepdim=True)) / spread
            rows["returns"], rows["values"] = returns.flatten(1), values
            log_prob = self.actor.log_prob(features, rows["actions"], rows["legal"])
            rows["log_prob"] = log_prob.unflatten(0, (-1, N)).sum(1)  # the team's, (S, n)
        needed = "obs frames actions legal advantages returns values log_prob".split()
        rows = {name: rows[name] for name in needed}

        n = values.shape[1]  # whole rollouts: it may be less than --transitions
        size = min(args.minibatch_size, n)
        for _ in range(args.epochs):
            order = torch.rand_like(values).argsort(1)
            for first in range(0, n - size + 1, size):
                index = order[:, first : first + size]  # (S, size)
                measured = self.policy_step({name: pick(x, index) for name, x in rows.items()})
        return self.report(
            imagined_reward=(rollouts["rewards"] + rollouts["penalty"]).mean((1, 2)),
            penalty=rollouts["penalty"].mean((1, 2)),
            cut_share=rollouts["is_cut"][:, :-1].sum((1, 2)) / max(1, n - shape[1]),
            **measured,
        )

    def policy_step(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One gradient step on a minibatch; what is reported of it, (S,) each."""
        args, N = self.args, self.num_agents
        features, advantages = self.features(rows["frames"], rows["obs"]), rows["advantages"]
        evaluated = self.actor.evaluate(features, rows["actions"], rows["legal"])
        log_prob, excess = (x.unflatten(0, (-1, N)).sum(1) for x in evaluated)  # (S, size)
        ratio = (log_prob - rows["log_prob"]).clamp(max=10).exp()  # of the joint policies
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        actor_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean(1)

        values, old = self.team_value(features, rows["obs"]), rows["values"]
        near = old + (values - old).clamp(-args.clip, args.clip)
        errors = [(v - rows["returns"]).square().mean(1) for v in (near, values)]
        vf_loss = torch.maximum(*errors)

        # The entropy is kept above its target by a weight that grows while it is below
        entropy = torch.minimum(-(ratio * log_prob).mean(1), -(clipped * log_prob).mean(1))
        with torch.no_grad():
            gap = args.target_entropy - entropy
            self.alpha.copy_((self.alpha + args.entropy_gain * gap).clamp(min=0))
        loss = actor_loss + args.value_coefficient * vf_loss - self.alpha * entropy
        shares = ratio.detach(), clipped.detach()  # the distance depends on states alone
        outside = torch.maximum(*((share * excess).mean(1) for share in shares))
        loss = loss + args.bound_penalty * outside
        step(self.policy_optimizer, loss, (args.num_seeds, args.max_grad_norm))
        return {
            "actor_loss": actor_loss,
            "vf_loss": vf_loss,
            "entropy": entropy,
            "entropy_weight": self.alpha,
            "clip_share": (ratio != clipped).float().mean(1),
        }

    # Acting

    def begin_episodes(self, begins: torch.Tensor) -> None:
        """Forget where an episode begins, (G, E) bool."""
        shape = *begins.shape, self.args.history, self.obs_mean.shape[2] + self.action_dim
        if self.frames is None or self.frames.shape != shape:
            self.frames = torch.zeros(shape, device=begins.device, dtype=self.obs_mean.dtype)
        self.frames.mul_(~begins[..., None, None])

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The policies' likeliest actions, (G, E, obs_dim) -> (G, E, action_dim), which they
        remember."""
        scaled, legal = self.scaled(obs), legal_actions(obs, self.action_dim)
        if self.frames is None or self.frames.shape[1] != obs.shape[1]:
            self.begin_episodes(torch.ones_like(obs[..., 0], dtype=torch.bool))
        actions = self.actor.mode(self.features(self.frames, scaled), legal).clamp(-1, 1)
        self.frames.copy_(push(self.frames, scaled, actions))
        return actions


def push(frames: torch.Tensor, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Frames (G, batch, length, dim) without the oldest and with a new one."""
    new = torch.cat([obs, actions], dim=2).unsqueeze(2)
    return torch.cat([frames, new], dim=2)[:, :, 1:]


def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (S, size) of what teams (S, n) or their agents (G, n, ...) have."""
    index = index.repeat_interleave(len(x) // len(index), dim=0)
    return x.take_along_dim(index.view(*index.shape, *[1] * (x.dim() - 2)), dim=1)


def advantages_and_returns(
    rewards, values, next_values, goes_on, is_cut, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE(lambda), and discounted returns, of rollouts (S, T, branches): where one is cut both go
    on with the value of the state that followed, where it terminates with nothing."""
    advantage = result = torch.zeros_like(rewards[:, 0])
    advantages, returns = [], []
    for t in reversed(range(rewards.shape[1])):
        alive, further = gamma * goes_on[:, t], 1 - is_cut[:, t]
        delta = rewards[:, t] + alive * next_values[:, t] - values[:, t]
        advantage = delta + gae_lambda * alive * further * advantage
        after = further * result + (1 - further) * next_values[:, t]
        result = rewards[:, t] + alive * after
        advantages.append(advantage)
        returns.append(result)
    return torch.stack(advantages[::-1], dim=1), torch.stack(returns[::-1], dim=1)


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__, discrete=None)
    replay, args = run.replay, args.within(run.envs.max_episode_steps)
    branches = args.transitions // args.rollout_length
    with run.device:
        agent = MOMAPPO(*run.sizes, args, run.discrete)
    agent.measure_scales(replay)
    run.begin(agent)

    def fit() -> dict[str, torch.Tensor]:
        index = replay.draw_teams(args.num_models * args.batch_size)
        index = index - (index % 10 == 9).long()  # every tenth row is for validation
        return agent.fit(replay.gather_teams(index))

    def rank() -> dict[str, torch.Tensor]:
        index = replay.draw_teams(5000) % max(10, replay.num_offline // 10 * 10) // 10 * 10 + 9
        return agent.rank(replay.gather_teams(index.clamp(max=replay.num_offline - 1)))

    def improve() -> dict[str, torch.Tensor]:
        index = replay.draw_teams(args.rollout_length * branches)
        history = replay.gather_history(index, args.history)
        return agent.improve(replay.gather_teams(index) | {"history": history})

    kinds = {"fit": fit, "rank": rank, "improve": improve}

    def update(kind: str) -> dict[str, torch.Tensor]:
        return kinds[kind]()

    run.train_offline(update)  # a world model, then policies that live in it
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
