"""OMSD: sequential score decomposition. Training is central, execution decentralised.

Joint IQL critics of the team, and per agent a diffusion model of its actions in the data given what
the agents before it do. Then deterministic policies climb the joint Q and the models' scores
together, so that agents that the data knows in several ways to coordinate choose the same one.
With one agent it is SRPO.

Paper: Qiao, Li, Yang, Zha and Wang, Offline Multi-agent Reinforcement Learning via Score
Decomposition, 2025, https://arxiv.org/abs/2505.05968. Against its code
(https://github.com/qiaodan-cuhk/diffmarl): agents and seeds are stacked, observations are scaled,
time limits are no ends, and the ablations are what they are called; see docs/omsd.md.

    python omsd.py --env bandit-2

What it scores and how long it takes: docs/omsd.md.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import InputError, cli
from common.cli import Natural, OfflineArgs, Positive, Share
from common.loop import Training
from common.nets import (
    Learner,
    Linear,
    TwinCritic,
    adam,
    follow,
    joint,
    keep_own,
    mean_over_own,
    mlp,
    of_each,
    step,
)
from common.replay import Replay


@dataclass
class Args(OfflineArgs):
    # Other defaults than the other scripts'
    env: str = "simple-spread-medium-replay"
    offline_updates: Natural = 15_000
    batch_size: int = 256

    # OMSD arguments
    policy_updates: int = 5_000
    """the last so many of --offline-updates, which move the policies; those before train critics
    and denoisers. Published: 1e5 after 5e5 of the critics and 2e6 of the denoisers"""
    score: Literal["decomposed", "independent", "joint", "none"] = "decomposed"
    """whose score holds an agent's actions to the data: its own given the agents before it, its own
    whatever the others do, or its part of all agents' joint score; none: IQL's own policies, clones
    weighted by the team's advantage, for which the arguments of scores, denoisers and beta mean
    nothing"""
    beta: float | None = None
    """weight of the gradient of Q against the score, as published; default: that of this --env"""
    expectile: Share | None = None
    """of V, tau in IQL; default: that of this --env"""
    temperature: float | None = None
    """of --score none: weights are exp(temperature * advantage); default: that of this --env"""
    score_weight: Literal["vds", "one", "ratio"] | None = None
    """weight of the predicted noise at noise level t: vds sigma^2, as published, one 1, ratio
    alpha/sigma, which with a low --t-max is the score of hardly noised data; default: vds, of the
    bandits ratio"""
    t_min: Annotated[float, cli.Range(0, 1, open=True)] = 0.02
    """least noise level at which a score is asked for"""
    t_max: Share | None = None
    """largest one; default: 0.98, of the bandits 0.2"""
    control_variate: bool = True
    """subtract the noise that was added from the predicted one: of the same mean for the policies,
    and far less noisy at the high noise levels that vds weights most. Published: off"""
    condition: Literal["local", "joint"] = "local"
    """what an agent's denoiser sees besides actions: its observation, or those of all agents, as
    the one of --score joint always does"""
    prefix: Literal["before", "after"] = "before"
    """the agents before act by their policies as they are before an update, all of which are then
    made at once, or after their own, one agent after another; not of --score none"""
    order: str = "index"
    """of the agents in the decomposition, and in which --prefix after moves them: index, random
    (one per seed), or such as 2,0,1"""
    normalize_q: bool = False
    """divide each agent's gradient of Q by its root mean square over the batch, so that one beta
    serves values of any size"""
    timeout_terminal: bool = False
    """published behaviour: a time limit ends an episode as if nothing followed"""
    hidden_size: int = 64
    """units in each of the two hidden layers of critics and policies; published: 256"""
    denoiser_size: int = 64
    """units of the denoisers' trunk, a quarter of those inside its blocks; published: 512"""
    dropout: Annotated[float, cli.Range(0, 0.99)] = 0.1
    """in the denoisers' blocks while they train"""
    learning_rate: float = 1e-3
    """Adam's, of everything; for denoisers it falls to a thirtieth, for policies to 0. Published:
    3e-4"""
    value_unit: Positive | None = None
    """value that one unit of the critics' outputs stands for; default: the standard deviation of
    the offline rewards"""
    gamma: Share = 0.99
    """discount"""
    tau: Share = 0.005
    """rate at which the target critics follow"""

    def check(self) -> None:
        """Refuse a run without one of its stages, and noise levels in the wrong order."""
        super().check()
        if self.policy_updates >= self.offline_updates:
            raise InputError(
                f"--policy-updates {self.policy_updates}: less than --offline-updates "
                f"{self.offline_updates} are expected, whose first ones train critics and denoisers"
            )
        t_max = preset(self)["t_max"]
        if self.t_min > t_max:
            raise InputError(f"--t-min {self.t_min}: at most --t-max {t_max}")


# The released code's beta (the middle of its range, or its best), expectile and temperature of each
# data set
PRESETS = {
    "simple-spread-random": {"beta": 0.5, "expectile": 0.5, "temperature": 0.5},
    "simple-spread-medium": {"beta": 0.01, "expectile": 0.7, "temperature": 0.5},
    "simple-spread-expert": {"beta": 0.001, "expectile": 0.5, "temperature": 3.0},
    "simple-tag-random": {"beta": 0.2, "expectile": 0.7, "temperature": 5.0},
    "simple-tag-medium": {"beta": 0.02, "expectile": 0.5, "temperature": 1.0},
    "simple-tag-expert": {"beta": 0.005, "expectile": 0.7, "temperature": 7.0},
    "simple-world-random": {"beta": 0.2, "expectile": 0.7, "temperature": 7.0},
    "simple-world-medium": {"beta": 0.05, "expectile": 0.9, "temperature": 1.0},
    "simple-world-expert": {"beta": 0.01, "expectile": 0.5, "temperature": 3.0},
    "halfcheetah-local-expert": {"beta": 0.005},
    # Not published
    "bandit-2": {"beta": 1.0, "score_weight": "ratio", "t_max": 0.2},
    "bandit-3": {"beta": 1.0, "score_weight": "ratio", "t_max": 0.2},
}
OTHERWISE = {
    **{"beta": 0.02, "expectile": 0.7, "temperature": 3.0},
    **{"score_weight": "vds", "t_max": 0.98},
}


def preset(args: Args) -> dict:
    """What holds of `OTHERWISE`'s arguments: what is given, else the data set's, else those."""
    given = {name: getattr(args, name) for name in OTHERWISE}
    given = {name: value for name, value in given.items() if value is not None}
    return OTHERWISE | PRESETS.get(args.env, {}) | given


# --- Networks ---
# Every tensor starts with the group dimension G: g = seed_index * num_agents + agent; what is one
# per team with the number of seeds S. Critics are common.nets.TwinCritic.


class Denoiser(nn.Module):
    """The noise in noised actions, given a condition: one network for every noise level t."""

    FREQUENCIES, SCALE = 16, 30.0

    def __init__(self, G: int, noised_dim: int, condition_dim: int, size: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        # Fourier features: quantiles of |N(0, SCALE^2)|, the same in every network
        quantiles = 0.5 + (torch.arange(self.FREQUENCIES) + 0.5) / (2 * self.FREQUENCIES)
        frequencies = 2 * math.pi * self.SCALE * torch.special.ndtri(quantiles)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(Linear(G, 2 * self.FREQUENCIES, 64), nn.ReLU(), Linear(G, 64, 64))
        self.inputs = Linear(G, noised_dim + condition_dim, 32)
        self.trunk = Linear(G, 32 + 64, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(Linear(G, size, 4 * size), nn.ReLU(), Linear(G, 4 * size, size))
            for _ in range(2)
        )
        self.head = Linear(G, size, noised_dim)

    def forward(self, noised, condition, t, training: bool = False):
        """(G, batch, noised_dim), (G, batch, condition_dim), (G, batch, 1) -> (G, batch,
        noised_dim)."""
        angles = t * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=2))
        inputs = self.inputs(torch.cat([noised, condition], dim=2))
        x = self.trunk(torch.cat([inputs, time], dim=2))
        for block in self.blocks:
            kept = x
            if training and self.dropout:
                kept = x * (torch.rand_like(x) >= self.dropout) / (1 - self.dropout)
            x = x + block(kept)
        return self.head(F.relu(x))


def noise_schedule(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma at noise level t in [0, 1], of noised actions alpha a + sigma z: the
    variance-preserving diffusion in continuous time of Song et al., 2021."""
    log_alpha = -(20 - 0.1) / 4 * t.square() - 0.1 / 2 * t
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


WEIGHTS = {
    "vds": lambda alpha, sigma: sigma.square(),
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "ratio": lambda alpha, sigma: alpha / sigma,
}


# --- Learner ---


class OMSD(Learner):
    """S teams of N OMSD learners; losses are averaged over the batch and summed over G or S."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, args: Args):
        super().__init__(G, obs_dim)
        self.args, self.settings = args, preset(args)
        self.S, self.N = S, N = args.num_seeds, G // args.num_seeds
        self.model_updates = args.offline_updates - args.policy_updates
        sizes = S, N * obs_dim, N * action_dim, args.hidden_size
        self.vf = mlp(S, N * obs_dim, args.hidden_size, 1)
        self.qf, self.target_qf = TwinCritic(*sizes), TwinCritic(*sizes)
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.target_qf.requires_grad_(False)
        # Value that one unit of the critics' outputs stands for
        self.register_buffer("unit", torch.ones(()))
        self.actor = mlp(G, obs_dim, args.hidden_size, action_dim)

        is_joint = args.score == "joint"  # one network per team
        seen = obs_dim if args.condition == "local" and not is_joint else N * obs_dim
        prefix = (N - 1) * action_dim if args.score == "decomposed" else 0
        noised = N * action_dim if is_joint else action_dim
        its_sizes = noised, seen + prefix, args.denoiser_size, args.dropout
        if args.score != "none":
            self.denoiser = Denoiser(S if is_joint else G, *its_sizes)
        # The groups of each team's first N - 1 agents, (G, N - 1), and which of them come before g,
        # (G, 1, N - 1, 1)
        order = torch.stack([order_of(args, N, s) for s in range(S)]).to(self.obs_mean.device)
        place = order.argsort(1).flatten()  # of each agent in its team's order, (G,)
        first = (torch.arange(S).unsqueeze(1) * N + order)[:, : N - 1].repeat_interleave(N, 0)
        self.register_buffer("first", first, persistent=False)
        is_before = torch.arange(N - 1) < place.unsqueeze(1)
        self.register_buffer("is_before", is_before.view(G, 1, N - 1, 1).float(), persistent=False)
        # Whose turn it is in each step of an update, (steps, G)
        one_by_one = (torch.arange(N).unsqueeze(1) == place).float()
        at_once = args.prefix == "before" or args.score == "none"
        turns = torch.ones(1, G) if at_once else one_by_one
        self.register_buffer("turns", turns, persistent=False)

        self.register_buffer("made", torch.tensor(0))  # updates
        self.keep_measured(
            *("vf_loss", "qf1_loss", "qf2_loss", "qf1_values", "denoiser_loss"),
            *("actor_loss", "score_drive", "q_drive", "policy_q", "bc_error"),
        )
        rate = torch.tensor(args.learning_rate)  # as a tensor it can change in a captured graph
        self.vf_optimizer = adam(self.vf.parameters(), args.learning_rate)
        self.qf_optimizer = adam(self.qf.parameters(), args.learning_rate)
        if args.score != "none":
            self.denoiser_optimizer = adam(self.denoiser.parameters(), rate.clone())
        # One per turn: Adam leaves those alone whose gradients have always been 0
        self.actor_optimizers = [adam(self.actor.parameters(), rate.clone()) for _ in turns]
        self.optimizers = [self.vf_optimizer, self.qf_optimizer, *self.actor_optimizers]
        if args.score != "none":
            self.optimizers.append(self.denoiser_optimizer)

    def measure_scales(self, replay: Replay) -> None:
        """Take the mean and standard deviation of the offline observations, and the latter of the
        rewards as the critics' unit."""
        super().measure_scales(replay)
        given = self.args.value_unit
        self.unit.copy_(replay.reward_std() + 1e-3 if given is None else torch.tensor(given))

    def kind(self, number: int, offline: bool) -> str:
        """What update `number` trains: critics and denoisers, or policies."""
        return "model" if number <= self.model_updates else "policy"

    def update(self, batch: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
        """One update of the networks of a stage on a batch as `Replay.gather` returns it, the same
        transitions for all agents of a team; losses (G,), of the other stage as last measured."""
        self.anneal()
        obs, next_obs = self.scaled(batch["obs"]), self.scaled(batch["next_obs"])
        if kind == "model":
            its_batch = {**batch, "obs": obs, "next_obs": next_obs}
            losses = self.update_critics(its_batch)
            if self.args.score != "none":
                losses |= self.update_denoisers(obs, batch["actions"])
        elif self.args.score == "none":
            losses = self.update_clones(obs, batch["actions"])
        else:
            losses = self.update_policies(obs, batch["actions"])
        self.made += 1
        return self.report(**losses)

    def anneal(self) -> None:
        """Set the learning rates, which fall by half a cosine over their networks' updates."""
        rate = self.args.learning_rate
        if self.args.score != "none":
            of_denoisers = rate * (1 + 29 * fall(self.made / self.model_updates)) / 30
            self.denoiser_optimizer.param_groups[0]["lr"].copy_(of_denoisers)
        done = (self.made - self.model_updates) / self.args.policy_updates
        for optimizer in self.actor_optimizers:
            optimizer.param_groups[0]["lr"].copy_(rate * fall(done))

    def policy(self, obs: torch.Tensor) -> torch.Tensor:
        """pi_i of scaled observations: (G, batch, obs_dim) -> (G, batch, action_dim)."""
        return keep_own(torch.tanh(self.actor(obs)), self.own)

    # Stage 1

    def update_critics(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """IQL with joint actions, observations scaled."""
        args = self.args
        obs, next_obs, actions = (joint(batch[k], self.N) for k in ("obs", "next_obs", "actions"))
        rewards, terminations = (batch[k][:: self.N] for k in ("rewards", "terminations"))
        with torch.no_grad():
            target_q = self.unit * self.target_qf(obs, actions).amin(0)
            next_value = self.unit * self.vf(next_obs).squeeze(2)
            target = rewards + args.gamma * (1 - terminations) * next_value
        above = target_q - self.unit * self.vf(obs).squeeze(2)  # (S, batch)
        expectile_weights = (self.settings["expectile"] - (above < 0).float()).abs()
        vf_loss = (expectile_weights * above.square()).mean(1)
        step(self.vf_optimizer, vf_loss)

        q = self.unit * self.qf(obs, actions)  # (2, S, batch)
        qf_loss = (q - target).square().mean(2)  # (2, S)
        step(self.qf_optimizer, qf_loss)
        follow(self.target_qf, self.qf, args.tau)
        losses = {"vf_loss": vf_loss, "qf1_loss": qf_loss[0], "qf2_loss": qf_loss[1]}
        return losses | {"qf1_values": q[0].mean(1)}

    def update_denoisers(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every denoiser predicts the noise in the data's actions, the prefix being the data's."""
        found, noise, *_ = self.predict(obs, actions, (1e-3, 1.0), training=True)
        loss = (found - noise).square().sum(2).mean(1)
        step(self.denoiser_optimizer, loss)
        return {"denoiser_loss": loss}

    def predict(self, obs, actions, levels: tuple[float, float], training: bool = False):
        """Noise actions at levels drawn between two: the noise that the denoisers find and that
        which was added, (G, batch, action_dim) or, of --score joint, (S, batch, N * action_dim),
        and alpha and sigma (..., 1)."""
        noised, own = actions, self.own
        if self.args.score == "joint":
            noised, own = joint(actions, self.N), None if own is None else joint(own, self.N)
        low, high = levels
        t = low + (high - low) * torch.rand_like(noised[..., :1])
        noise, (alpha, sigma) = torch.randn_like(noised), noise_schedule(t)
        noised = keep_own(alpha * noised + sigma * noise, own)
        found = self.denoiser(noised, self.condition(obs, actions), t, training)
        return keep_own(found, own), keep_own(noise, own), alpha, sigma

    def condition(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """What a denoiser is told: of scaled observations (G, batch, obs_dim), and of the actions
        (G, batch, action_dim) of the agents before its own, 0 in the others' places."""
        score = self.args.score
        if score == "joint":
            return joint(obs, self.N)
        local = self.args.condition == "local"
        seen = obs if local else joint(obs, self.N).repeat_interleave(self.N, dim=0)
        if score == "independent":
            return seen
        first = actions[self.first].transpose(1, 2)  # (G, batch, N - 1, action_dim), in order
        return torch.cat([seen, (self.is_before * first).flatten(2)], dim=2)

    # Stage 2

    def update_policies(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Policies climb Q and descend the noise in their own actions, all agents at once or one
        after another."""
        for turn, optimizer in zip(self.turns, self.actor_optimizers, strict=True):
            policy_actions = self.policy(obs)
            score_drive, q_drive, q = self.drives(obs, policy_actions.detach())
            actor_loss = ((score_drive - q_drive) * policy_actions).sum(2).mean(1)
            step(optimizer, turn * actor_loss)
        return {
            "actor_loss": actor_loss,
            "score_drive": mean_over_own(score_drive.square(), self.own).sqrt(),
            "q_drive": mean_over_own(q_drive.square(), self.own).sqrt(),
            "policy_q": q.mean(1),
            "bc_error": mean_over_own((policy_actions - actions).square(), self.own),
        }

    def update_clones(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of --score none: policies clone the data's actions, each row weighted by
        min(exp(temperature * A), 100) of the team's advantage A = Q - V, as in IQL."""
        with torch.no_grad():
            its = joint(obs, self.N), joint(actions, self.N)
            advantage = self.target_qf(*its).amin(0) - self.vf(its[0]).squeeze(2)
            advantage *= self.unit
            weights = (self.settings["temperature"] * advantage).exp().clamp(max=100)  # (S, batch)
        policy_actions = self.policy(obs)
        errors = (policy_actions - actions).square()
        actor_loss = (weights.repeat_interleave(self.N, dim=0) * errors.sum(2)).mean(1)
        step(self.actor_optimizers[0], actor_loss)
        return {"actor_loss": actor_loss, "bc_error": mean_over_own(errors, self.own)}

    def drives(self, obs: torch.Tensor, actions: torch.Tensor):
        """What moves each agent's action, of scaled observations and the policies' actions: the
        weighted noise predicted in it, and beta times the gradient of Q, (G, batch, action_dim)
        each; and Q (S, batch). Nothing is differentiated through."""
        args, settings = self.args, self.settings
        with torch.no_grad():
            levels = args.t_min, settings["t_max"]
            found, noise, alpha, sigma = self.predict(obs, actions, levels)
            found = found - noise if args.control_variate else found
            score_drive = WEIGHTS[settings["score_weight"]](alpha, sigma) * found
            score_drive = of_each(score_drive, self.N) if args.score == "joint" else score_drive
        obs, actions = joint(obs, self.N), joint(actions, self.N).requires_grad_()
        q = self.unit * self.target_qf(obs, actions).mean(0)
        gradient = of_each(torch.autograd.grad(q.sum(), actions)[0], self.N)
        if args.normalize_q:
            rms = mean_over_own(gradient.square(), self.own).sqrt()  # (G,)
            gradient = gradient / rms.clamp(min=1e-8).view(-1, 1, 1)
        return score_drive, settings["beta"] * gradient, q.detach()

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(G, E, obs_dim) -> (G, E, action_dim)."""
        return self.policy(self.scaled(obs))


def fall(done: torch.Tensor) -> torch.Tensor:
    """From 1 to 0 by half a cosine, as `done` goes from 0 to 1."""
    return (1 + (math.pi * done.clamp(0, 1)).cos()) / 2


def order_of(args: Args, num_agents: int, seed_index: int) -> torch.Tensor:
    """The agents of one team in the order of --order, (N,); InputError for what is none."""
    if args.order == "index":
        return torch.arange(num_agents)
    if args.order == "random":
        generator = torch.Generator("cpu").manual_seed(args.seed + seed_index)
        return torch.randperm(num_agents, generator=generator, device="cpu")
    try:
        order = [int(part) for part in args.order.split(",")]
    except ValueError:
        order = []
    if sorted(order) != list(range(num_agents)):
        example = ",".join(str(i) for i in reversed(range(num_agents)))
        raise InputError(f"--order {args.order}: expected index, random, or such as {example}")
    return torch.tensor(order)


def end_at_timeouts(replay: Replay) -> None:
    """Make every offline row terminal from which the next one does not go on: where a time limit,
    or the end of the data, cuts an episode off."""
    replay.terminations[0, : replay.num_offline].masked_fill_(~replay.goes_on(), 1)


# --- Main ---


def main(args: Args) -> None:
    run = Training(args, __file__)
    replay = run.replay
    with run.device:
        agent = OMSD(*run.sizes, args)
    agent.measure_scales(replay)
    if args.timeout_terminal:
        end_at_timeouts(replay)
    run.begin(agent)

    def update(kind: str) -> dict[str, torch.Tensor]:
        index = replay.draw_offline(args.batch_size)
        index = index[:: agent.N].repeat_interleave(agent.N, dim=0)  # one for the whole team
        return agent.update(replay.gather(index), kind)

    run.train_offline(update)  # critics and denoisers, then policies
    run.finish()


if __name__ == "__main__":
    cli.cli(main, Args)
