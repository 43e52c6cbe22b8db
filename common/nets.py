"""G networks in one, their optimisers, and what every learner is built on.

Every tensor starts with the group dimension G: g = seed_index * num_agents + agent. Losses are
averaged over the batch and summed over G, so that each group learns as it would alone.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Module):
    """G independent linear layers: (G, batch, in) -> (G, batch, out)."""

    def __init__(self, num_groups: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_groups, 1, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if 2 * len(x) == len(weight):  # the first of twins alone
            weight, bias = weight[: len(x)], bias[: len(x)]
        if weight.shape[2] == 1 and x.is_cpu:  # faster there
            return (x * weight.mT).sum(2, keepdim=True) + bias
        return torch.bmm(x, weight).add_(bias)


def joint(x: torch.Tensor, num_agents: int) -> torch.Tensor:
    """What the agents of each team see or do, side by side: (G, batch, dim) -> (S, batch,
    num_agents * dim)."""
    return x.unflatten(0, (-1, num_agents)).transpose(1, 2).flatten(2)


def of_each(x: torch.Tensor, num_agents: int) -> torch.Tensor:
    """The inverse of `joint`."""
    return x.unflatten(2, (num_agents, -1)).transpose(1, 2).flatten(0, 1)


class Stack(nn.Sequential):
    """`Linear`s with ReLU between them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(G, batch, in) -> (G, batch, out); of twins (2, G, batch, in) -> (2 G, batch, out)."""
        hidden = x.shape[-2] * self[0].weight.shape[2]  # numbers of a group's hidden layer
        if not x.is_cpu or torch.is_grad_enabled() or hidden < 160_000:
            return super().forward(x if x.dim() == 3 else x.flatten(0, 1))
        # Many, and no gradient, on a CPU: group by group, for the cache's sake
        layers = [layer for layer in self if isinstance(layer, Linear)]
        weights = zip(*(layer.weight for layer in layers), strict=True)
        biases = zip(*(layer.bias for layer in layers), strict=True)
        inputs = x if x.dim() == 3 else [each for part in x for each in part]  # copies nothing
        outputs = []
        networks = list(zip(weights, biases, strict=True))
        if 2 * len(inputs) == len(networks):  # as `Linear`
            networks = networks[: len(inputs)]
        for h, ((*hidden, last), (*shifts, shift)) in zip(inputs, networks, strict=True):
            for weight, bias in zip(hidden, shifts, strict=True):
                h = torch.mm(h, weight).add_(bias).relu_()
            if last.shape[1] == 1:
                outputs.append(torch.addmv(shift[0], h, last[:, 0]).unsqueeze(1))
            else:
                outputs.append(torch.mm(h, last).add_(shift))
        return torch.stack(outputs)


def mlp(num_groups: int, in_features: int, hidden_size: int, out_features: int) -> Stack:
    """Two hidden layers with ReLU."""
    return Stack(
        Linear(num_groups, in_features, hidden_size),
        nn.ReLU(inplace=True),
        Linear(num_groups, hidden_size, hidden_size),
        nn.ReLU(inplace=True),
        Linear(num_groups, hidden_size, out_features),
    )


class Critic(nn.Module):
    """Q(s, a_i) of G groups."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim + action_dim, hidden_size, 1)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """(G, batch, obs_dim), (G, batch, action_dim) -> (G, batch)."""
        return self.network(torch.cat([obs, actions], dim=2)).squeeze(2)


def twin(first: Stack, second: Stack) -> Stack:
    """Two networks of G groups as one of 2 G, the first's before the second's."""
    for layer, other in zip(first, second, strict=True):
        if isinstance(layer, Linear):
            layer.weight = nn.Parameter(torch.cat([layer.weight, other.weight]).detach())
            layer.bias = nn.Parameter(torch.cat([layer.bias, other.bias]).detach())
    return first


class TwinCritic(nn.Module):
    """Two critics Q(s, a_i) of G groups from starts of their own, in one stack of 2 G networks."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = twin(*(mlp(G, obs_dim + action_dim, hidden_size, 1) for _ in range(2)))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """(G, batch, obs_dim), (G, batch, action_dim) -> (2, G, batch)."""
        twice = [x.expand(2, -1, -1, -1) for x in (obs, actions)]
        return self.network(torch.cat(twice, dim=3)).view(2, len(obs), -1)

    def first(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The first critic alone: (G, batch)."""
        return self.network(torch.cat([obs, actions], dim=2)).squeeze(2)


class Mixer(nn.Module):
    """A team's value out of its agents': their sum, weighted by what the mixer sees of the team,
    plus a bias. Weights are of any sign."""

    def __init__(self, S: int, num_agents: int, input_dim: int, hidden_size: int):
        super().__init__()
        self.num_agents = num_agents
        self.network = mlp(S, input_dim, hidden_size, num_agents + 1)

    def forward(self, values, seen):
        """(G, batch), (S, batch, input_dim) -> (S, batch); of twins (2, G, batch) -> (2, S,
        batch)."""
        output = self.network(seen)
        values = values.unflatten(-2, (-1, self.num_agents)).mT  # (..., S, batch, N)
        return (output[..., :-1] * values).sum(-1) + output[..., -1]


def kl_divergence(mean: torch.Tensor, log_std: torch.Tensor, own=None) -> torch.Tensor:
    """KL of N(mean, std) from N(0, 1), averaged over batch and latent dimensions, or those of
    `own`: (G, batch, latent) -> (G,)."""
    return mean_over_own(-0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()), own)


# --- Agents of different sizes ---
# `own` (G, 1, size) is 1 where an entry is the agent's own and 0 where it pads a smaller one, which
# nothing may count; None where no agent is padded.


def keep_own(x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """(G, ..., size) with 0 in the padding."""
    return x if own is None else x * own.view(len(own), *[1] * (x.dim() - 2), -1)


def mean_over_own(x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Mean over batch and own entries: (G, ..., batch, size) -> (G, ...)."""
    if own is None:
        return x.mean((-2, -1))
    total = keep_own(x, own).sum((-2, -1)) / x.shape[-2]
    return total / count_own(x, own).view(-1, *[1] * (x.dim() - 3))


def count_own(x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Number of own entries of (G, ..., size): (G,)."""
    return x.new_full((len(x),), x.shape[-1]) if own is None else own.sum((1, 2))


class Actor(nn.Module):
    """A network that gives actions; `Learner.take_own` says which of their entries count."""

    own = None


# --- Policies ---


class DeterministicActor(Actor):
    """pi(s) in the action box [-1, 1]."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, action_dim)

    def forward(self, obs):
        """(G, batch, action_dim)"""
        return keep_own(torch.tanh(self.network(obs)), self.own)


class GaussianPolicy(Actor):
    """pi(a_i | s) for continuous actions: a Gaussian with a tanh mean and a std that depends on the
    state.

    It is not squashed, so that the density of data actions at the bound stays finite.
    """

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-std in (-6, 0), (G, batch, action_dim) each; a sigmoid, as a clamp would
        lose its gradient outside."""
        mean, raw_log_std = self.network(obs).chunk(2, dim=2)
        return torch.tanh(mean), -6 * torch.sigmoid(raw_log_std - 1.5)

    def log_prob(self, obs, actions, legal=None) -> torch.Tensor:
        """(G, batch)"""
        return self.log_density(*self(obs), actions)

    def log_density(self, mean, log_std, actions) -> torch.Tensor:
        """`log_prob` by the Gaussians' means and log-stds."""
        scaled = (actions - mean) * (-log_std).exp()
        log_density = -(0.5 * scaled.square() + log_std + 0.5 * math.log(2 * math.pi))
        return keep_own(log_density, self.own).sum(2)

    def mode(self, obs, legal=None) -> torch.Tensor:
        """The mean, (G, batch, action_dim)."""
        return keep_own(self(obs)[0], self.own)

    def sample(self, obs, legal=None) -> torch.Tensor:
        """(G, batch, action_dim)"""
        mean, log_std = self(obs)
        return keep_own(mean + log_std.exp() * torch.randn_like(mean), self.own)


class SoftmaxPolicy(Actor):
    """pi(a_i | s) over the legal ones of one-hot actions; `legal` (G, batch, action_dim) bool."""

    def __init__(self, G: int, obs_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.network = mlp(G, obs_dim, hidden_size, action_dim)

    def logits(self, obs, legal) -> torch.Tensor:
        """(G, batch, action_dim), very low where an action is not legal."""
        return self.network(obs).masked_fill(~legal, -1e9)

    def log_prob(self, obs, actions, legal) -> torch.Tensor:
        """(G, batch)"""
        return (F.log_softmax(self.logits(obs, legal), dim=2) * actions).sum(2)

    def mode(self, obs, legal) -> torch.Tensor:
        """The likeliest legal action, one-hot: (G, batch, action_dim); zeros where none is."""
        return self._one_hot(self.logits(obs, legal), legal)

    def sample(self, obs, legal) -> torch.Tensor:
        """One-hot, (G, batch, action_dim)."""
        logits = self.logits(obs, legal)
        gumbel = -(-torch.rand_like(logits).clamp(1e-9, 1 - 1e-7).log()).log()
        return self._one_hot(logits + gumbel, legal)

    @staticmethod
    def _one_hot(scores, legal) -> torch.Tensor:
        best = scores.argmax(2, keepdim=True)
        return torch.zeros_like(scores).scatter(2, best, 1.0) * legal


def legal_actions(obs: torch.Tensor, action_dim: int) -> torch.Tensor:
    """Which actions are legal, by the end of discrete tasks' observations as they come: (G, batch,
    action_dim) bool."""
    return obs[..., -action_dim:] > 0.5


class Learner(nn.Module):
    """What a run needs of an algorithm; a script's learner also has

    - `update(batch) -> losses (G,)`, without `.item()` and tensors on the host: one CUDA graph,
    - `act(obs)` and, if it is tuned online, `explore(obs)`: (G, E, obs_dim) -> (G, E, action_dim)
      in [-1, 1],
    - `q_value(obs, actions)` and `value(obs)`: (G, batch), for OTC's value distance; the latter is
      also logged,
    - `optimizers`, a list, and,
    - where updates are of several kinds, such as those of a delayed actor, `kind(number, offline)`,
      which is handed to the update as its argument; with a memory, `begin_episodes(begins)` (G, E).

    `main` calls `measure_scales` before `Training.begin` if `scaled` is to scale.
    """

    own = None  # of the actions' entries

    def __init__(self, G: int, obs_dim: int):
        super().__init__()
        # Scales of the offline observations, kept with the weights, applied to online ones as well
        self.register_buffer("obs_mean", torch.zeros(G, 1, obs_dim))
        self.register_buffer("obs_std", torch.ones(G, 1, obs_dim))

    def take_own(self, replay) -> None:
        """Learn which entries of the actions are the agents' own."""
        self.own = replay.own_actions
        for module in self.modules():
            if isinstance(module, Actor):
                module.own = self.own

    def measure_scales(self, replay) -> None:
        """Take the mean and standard deviation of each agent's offline observations."""
        obs_mean, obs_std = replay.obs_statistics()
        self.obs_mean.copy_(obs_mean)
        self.obs_std.copy_(obs_std + 1e-3)

    def scaled(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations as the networks see them: (G, batch, obs_dim)."""
        return (obs - self.obs_mean) / self.obs_std

    def keep_measured(self, *names: str) -> None:
        """Where no update measures everything: what `report` is to keep."""
        self.names = names
        self.register_buffer("measured", torch.zeros(len(names), len(self.obs_mean)))

    def report(self, **measured: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep what an update measured, of each group or each team, and return everything as last
        measured, (G,) each."""
        for name, value in measured.items():
            row = self.measured[self.names.index(name)].view(len(value), -1)
            row.copy_(value.detach().unsqueeze(1))
        return {f"losses/{n}": x for n, x in zip(self.names, self.measured, strict=True)}

    def get_extra_state(self):
        """The optimisers' states, so that `state_dict` holds the whole learner."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def set_extra_state(self, state) -> None:
        for optimizer, its_state in zip(self.optimizers, state, strict=True):
            restore(optimizer, its_state)


# --- Optimisers ---


def adam(parameters, learning_rate: float) -> torch.optim.Adam:
    """Adam in one kernel."""
    return torch.optim.Adam(list(parameters), learning_rate, fused=True)


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load its state but for what this run sets: a fixed learning rate, and what capture needs.
    Raises ValueError for another optimiser's, which a fused step would read beyond its end."""
    parameters = optimizer.param_groups[0]["params"]
    for number, moments in state["state"].items():
        for name, moment in moments.items():
            shape = () if name == "step" else parameters[number].shape
            if moment.shape != shape or moment.dtype != torch.float32:
                raise ValueError(f"an optimiser's {name} has shape {tuple(moment.shape)}")
    groups = optimizer.state_dict()["param_groups"]
    for group, its in zip(groups, state["param_groups"], strict=True):
        if isinstance(group["lr"], torch.Tensor):  # which changes, and so is part of the state
            group["lr"].copy_(its["lr"])
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip=None) -> None:
    """One step on the sum of a loss (G,), with gradients of the optimiser's own parameters only.
    `clip`, a number of teams and a norm: the gradient of each team is shortened to that norm."""
    parameters = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, parameters, torch.ones_like(loss))
    if clip is not None:
        gradients = clipped(gradients, *clip)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if parameters[0].is_cuda:  # what a CUDA graph needs, and nothing else
        optimizer.param_groups[0]["capturable"] = torch.cuda.is_current_stream_capturing()
    optimizer.step()


def clipped(gradients: tuple[torch.Tensor, ...], num_teams: int, norm: float) -> list:
    """Gradients of stacks of networks, the same number per team in each, shortened so that all of a
    team's together have at most this norm."""
    by_team = [gradient.view(num_teams, -1) for gradient in gradients]
    lengths = sum(each.square().sum(1, keepdim=True) for each in by_team).sqrt()  # (num_teams, 1)
    shares = (norm / (lengths + 1e-6)).clamp(max=1)
    return [(s * shares).view_as(g) for s, g in zip(by_team, gradients, strict=True)]


@torch.no_grad()
def follow(target: nn.Module, live: nn.Module, tau: float) -> None:
    """Move target parameters by a share tau towards the live ones."""
    torch._foreach_lerp_(list(target.parameters()), list(live.parameters()), tau)
