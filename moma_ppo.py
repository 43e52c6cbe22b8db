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
    step,
)
from common.replay import Replay


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
    """keep imagined states and rewards within the smallest and largest of the data"""

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
        if self.minibatch_size > self.transitions or self.rollout_length > self.transitions:
            raise InputError(
                f"--transitions {self.transitions}: expected at least --minibatch-size "
                f"{self.minibatch_size} and --rollout-length {self.rollout_length}"
            )


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent; what a team
# has once, with S.


class WorldModel(nn.Module):
    """Members from (joint observation, joint action) to Gaussians of its change and of the reward,
    and the logit of going on; row s * num_models + m is member m of seed s.

    Entries of the joint observation that copy an earlier one, or never change, are not predicted.
    """

    def __init__(self, S: int, state_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, rows = args, S * args.num_models
        sizes = [state_dim + action_dim, *[args.model_hidden_size] * args.model_layers]
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [Linear(rows, fan_in, fan_out), nn.ReLU(inplace=True)]
        self.network = nn.Sequential(*layers, Linear(rows, sizes[-1], 2 * (state_dim + 1) + 1))
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("std", torch.ones(state_dim))
        # Of the changes of state and the reward behind them: scales, which are predicted; the box
        self.register_buffer("change_mean", torch.zeros(state_dim + 1))
        self.register_buffer("change_std", torch.ones(state_dim + 1))
        self.register_buffer("predicted", torch.ones(state_dim + 1))
        self.register_buffer("low", torch.full((state_dim + 1,), -torch.inf))
        self.register_buffer("high", torch.full((state_dim + 1,), torch.inf))
        self.register_buffer("source", torch.arange(state_dim))  # the entry that each one copies
        self.register_buffer("elites", torch.arange(args.num_elites).repeat(S, 1))
        self.register_buffer("threshold", torch.full((S, 1), args.uncertainty_threshold or 2.0))

    def measure(self, replay: Replay) -> None:
        """Scales, box and copies, by the offline data."""
        n = replay.num_offline
        obs, next_obs, rewards = replay.obs[:, :n], replay.next_obs[:, :n], replay.rewards[:, :n]
        change, views = next_obs - obs, len(obs)  # of all agents, or one that all have

        def of_state(x: torch.Tensor) -> torch.Tensor:
            return x.flatten().repeat(replay.num_agents // views)

        low = of_state(torch.minimum(obs.amin(1), next_obs.amin(1)))
        high = of_state(torch.maximum(obs.amax(1), next_obs.amax(1)))
        self.mean.copy_(of_state(obs.mean(1)))
        self.std.copy_(of_state(obs.std(1, correction=0)) + 1e-3)
        self.change_mean.copy_(torch.cat([of_state(change.mean(1)), rewards.mean(1)]))
        stds = of_state(change.std(1, correction=0)), rewards.std(1, correction=0)
        self.change_std.copy_(torch.cat(stds) + 1e-3)
        self.low.copy_(torch.cat([low, rewards.amin(1)]))
        self.high.copy_(torch.cat([high, rewards.amax(1)]))
        self.source.copy_(of_state(first_copies(obs, next_obs).to(obs.device)))
        is_first = self.source == torch.arange(len(self.source), device=obs.device)
        self.predicted[:-1] = (is_first & (high > low)).float()

    def forward(self, state, actions, network=None):
        """Mean and log-std in (-6, 2) of the standardised changes and reward, and the logit: (rows,
        batch, state_dim), (rows, batch, action_dim) -> (rows, batch, state_dim + 1) twice, (rows,
        batch)."""
        scaled = (state - self.mean) / self.std * self.predicted[:-1]
        output = (network or self.network)(torch.cat([scaled, actions], dim=2))
        mean, raw_log_std = output[..., :-1].chunk(2, dim=2)
        return mean, 8 * torch.sigmoid(raw_log_std) - 6, output[..., -1]

    def losses(self, state, actions, next_state, rewards, terminations) -> tuple:
        """Negative log-likelihood of the changes, weighted by variance^beta (Seitzer et al., 2022,
        https://arxiv.org/abs/2203.09168), without its constant and averaged over the entries,
        likewise of the reward, and cross-entropy of going on: (rows, batch, dim) and (rows, batch)
        -> (rows,) each."""
        mean, log_std, logit = self(state, actions)
        target = torch.cat([next_state - state, rewards.unsqueeze(2)], dim=2)
        target = (target - self.change_mean) / self.change_std
        nll = log_std + 0.5 * ((target - mean) * (-log_std).exp()).square()
        nll = nll * (2 * self.args.model_beta * log_std.detach()).exp()
        nll, reward_nll = (nll * self.predicted).split([nll.shape[2] - 1, 1], dim=2)
        count = self.predicted[:-1].sum().clamp(min=1)
        bce = F.binary_cross_entropy_with_logits(logit, 1 - terminations, reduction="none")
        return nll.sum(2).mean(1) / count, reward_nll.mean((1, 2)), bce.mean(1)

    def expect(self, state, actions, members: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What members (S, E) expect of (S, batch, dim), in the data's units: mean and variance of
        changes and reward (S, E, batch, state_dim + 1), probability of going on (S, E, batch)."""
        S, E = members.shape
        rows = torch.arange(S, device=state.device).unsqueeze(1) * self.args.num_models + members
        rows = rows.flatten()
        weights = {name: p.index_select(0, rows) for name, p in self.network.named_parameters()}

        def network(x):
            return torch.func.functional_call(self.network, weights, x)

        inputs = (x.repeat_interleave(E, dim=0) for x in (state, actions))
        mean, log_std, logit = self(*inputs, network)
        mean = self.predicted * (self.change_mean + self.change_std * mean)
        variance = self.predicted * (self.change_std * log_std.exp()).square()
        return tuple(x.unflatten(0, (S, E)) for x in (mean, variance, torch.sigmoid(logit)))

    def step(self, state, actions) -> tuple[torch.Tensor, ...]:
        """One imagined step, by a random elite per transition: (S, batch, dim) -> the next state in
        the box (S, batch, state_dim), the penalised reward, whether it goes on, and the norm of the
        elites' covariance, (S, batch) each; and the penalty."""
        args, (S, batch) = self.args, state.shape[:2]
        mean, variance, goes_on = self.expect(state, actions, self.elites)
        uncertainty = covariance_norm(mean)
        pick = torch.randint(args.num_elites, (S, batch), device=state.device).unsqueeze(1)
        chosen = mean.take_along_dim(pick.unsqueeze(3), dim=1).squeeze(1)
        following = torch.cat([state, torch.zeros_like(state[..., :1])], dim=2) + chosen
        if args.box:
            following = torch.clamp(following, self.low, self.high)
        terms = (
            (args.uncertainty_penalty, uncertainty),
            (args.reward_penalty, mean[..., -1].var(1)),
            (args.aleatoric_penalty, variance.norm(dim=3).amax(1)),
        )
        penalty = sum(weight * torch.minimum(term, self.threshold) for weight, term in terms)
        goes_on = goes_on.take_along_dim(pick, dim=1).squeeze(1) > 0.5
        next_state = following[..., :-1].index_select(2, self.source)
        return next_state, following[..., -1] - penalty, goes_on.float(), uncertainty, penalty


def first_copies(obs: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
    """Of every entry of observations (views, n, obs_dim), counted over all views, the first one
    that is equal to it in all of the data: (views, obs_dim)."""
    columns = [
        (o[:, j], o2[:, j]) for o, o2 in zip(obs, next_obs, strict=True) for j in range(o.shape[1])
    ]
    first: list[int] = []

    def same(i: int, k: int) -> bool:
        return all(torch.equal(a, b) for a, b in zip(columns[i], columns[k], strict=True))

    for k in range(len(columns)):
        first.append(next((i for i in range(k) if first[i] == i and same(i, k)), k))
    return torch.tensor(first).view(len(obs), -1)


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
        self.model = WorldModel(S, N * obs_dim, N * action_dim, args)
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
        # What was last measured, since not every kind of update measures everything
        self.latest = ("model_loss", "reward_loss", "continuation_loss", "model_error")
        self.latest += ("uncertainty_50", "uncertainty_95", "uncertainty_99")
        self.latest += ("imagined_reward", "penalty", "cut_share", "actor_loss", "vf_loss")
        self.latest += ("entropy", "entropy_weight", "clip_share")
        for name in self.latest:
            self.register_buffer(name, torch.zeros(S))

    def measure_scales(self, replay: Replay) -> None:
        """Take the scales of the offline data, and the world model's box."""
        super().measure_scales(replay)
        self.model.measure(replay)

    def report(self, **measured: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep what was measured, (S,) each, and return it, (G,), with what was before."""
        for name, value in measured.items():
            getattr(self, name).copy_(value.detach())
        N = self.num_agents
        return {f"losses/{n}": getattr(self, n).repeat_interleave(N) for n in self.latest}

    def kind(self, number: int, offline: bool) -> str:
        """What update `number` does: the name of a method."""
        before = self.args.model_updates
        return "fit" if number <= before else "rank" if number == before + 1 else "improve"

    def update(self, batch: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
        """One update of a kind, on a batch as `Replay.gather_teams` returns it; losses (G,)."""
        return getattr(self, kind)(batch)

    # The world model

    def transitions(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The team's joint observations, actions and next observations (S, n, N * dim), rewards and
        terminations (S, n)."""
        N = self.num_agents
        columns = (joint(batch[name], N) for name in ("obs", "actions", "next_obs"))
        return *columns, batch["rewards"][::N], batch["terminations"][::N]

    def fit(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step of every member on its own part of a batch."""
        args, members = self.args, self.args.num_models
        rows = (x.unflatten(1, (members, -1)).flatten(0, 1) for x in self.transitions(batch))
        losses = self.model.losses(*rows)  # (S * num_models,) each
        clip = args.num_seeds * members, args.max_grad_norm
        step(self.model_optimizer, sum(losses), clip)
        names = ("model_loss", "reward_loss", "continuation_loss")
        means = (loss.unflatten(0, (-1, members)).mean(1) for loss in losses)
        return self.report(**dict(zip(names, means, strict=True)))

    @torch.no_grad()
    def rank(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Choose the elites by their distance from the next states and rewards of a batch that no
        member was fitted to, and the threshold by how much they disagree there."""
        args, model = self.args, self.model
        state, actions, next_state, rewards, _ = self.transitions(batch)
        everyone = torch.arange(args.num_models, device=state.device).repeat(len(state), 1)
        mean, _, _ = model.expect(state, actions, everyone)
        target = torch.cat([next_state - state, rewards.unsqueeze(2)], dim=2).unsqueeze(1)
        error = model.predicted * (mean - target)  # (S, num_models, n, state_dim + 1)
        distance = error[..., :-1].norm(dim=3).mean(2) + error[..., -1].abs().mean(2)
        elites = distance.topk(args.num_elites, dim=1, largest=False).indices
        model.elites.copy_(elites)
        chosen = mean.take_along_dim(elites[..., None, None], dim=1)
        uncertainty = covariance_norm(chosen)  # (S, n)
        quantiles = [uncertainty.quantile(q, dim=1) for q in (0.5, 0.95, 0.99)]  # (S,) each
        if args.uncertainty_threshold is None:
            model.threshold.copy_(quantiles[2].clamp(min=2).unsqueeze(1))
        # Root mean square error of the elites' mean, in standard deviations of the changes
        relative = model.predicted * (chosen.mean(1) - target.squeeze(1)) / model.change_std
        names = ("uncertainty_50", "uncertainty_95", "uncertainty_99")
        count = model.predicted.sum() * relative.shape[1]
        model_error = (relative.square().sum((1, 2)) / count).sqrt()
        return self.report(model_error=model_error, **dict(zip(names, quantiles, strict=True)))

    # The policies

    def features(self, frames: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """What actors and values see: the memory of the frames and the scaled observation."""
        return obs if self.memory is None else torch.cat([self.memory(frames), obs], dim=2)

    def team_value(self, features: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """V of the team: features and scaled observations (G, batch, dim) -> (S, batch)."""
        return self.mixer(self.vf(features).squeeze(2), joint(obs, self.num_agents))

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
            following = self.model.step(joint(raw_obs, N), joint(played, N))
            next_state, rewards, goes_on, uncertainty, penalty = following
            next_raw = next_state.unflatten(2, (N, -1)).transpose(1, 2).flatten(0, 1)
            is_cut = torch.full_like(rewards, float(t == T - 1))
            if args.early_termination:
                is_cut = torch.maximum(is_cut, (uncertainty > self.model.threshold).float())
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
        needed = (
            "obs",
            "frames",
            "actions",
            "legal",
            "advantages",
            "returns",
            "values",
            "log_prob",
        )
        rows = {name: rows[name] for name in needed}

        n = values.shape[1]
        for _ in range(args.epochs):
            order = torch.rand_like(values).argsort(1)
            for first in range(0, n - args.minibatch_size + 1, args.minibatch_size):
                index = order[:, first : first + args.minibatch_size]  # (S, size)
                measured = self.policy_step({name: pick(x, index) for name, x in rows.items()})
        return self.report(
            imagined_reward=(rollouts["rewards"] + rollouts["penalty"]).mean((1, 2)),
            penalty=rollouts["penalty"].mean((1, 2)),
            cut_share=rollouts["is_cut"][:, : max(1, shape[0] - 1)].mean((1, 2)),
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
    replay, longest = run.replay, run.envs.max_episode_steps
    args.history = min(args.history, longest - 1)  # nothing is behind or ahead of an episode
    args.rollout_length = min(args.rollout_length, longest)
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
        index = replay.draw_teams(5000) // 10 * 10 + 9
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
