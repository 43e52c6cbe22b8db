"""G networks in one, their optimisers, and what every learner is built on.

Every tensor starts with the group dimension G: g = seed_index * num_agents + agent. Losses are
averaged over the batch and summed over G, so that each group learns as it would alone.
"""

import torch
import torch.nn as nn


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
        if self.weight.shape[2] == 1 and not x.is_cuda:  # faster on a CPU
            return (x * self.weight.mT).sum(2, keepdim=True) + self.bias
        return torch.bmm(x, self.weight).add_(self.bias)


def mlp(num_groups: int, in_features: int, hidden_size: int, out_features: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    return nn.Sequential(
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


class Learner(nn.Module):
    """What a run needs of an algorithm; a script's learner also has

    - `update(batch) -> losses (G,)`, without `.item()` and tensors on the host: one CUDA graph,
    - `act(obs)` and `explore(obs)`: (G, E, obs_dim) -> (G, E, action_dim) in [-1, 1],
    - `q_value(obs, actions)` and `value(obs)`: (G, batch), for OTC's value distance,
    - `optimizers`, a list, and,
    - where updates are of several kinds, such as those of a delayed actor, `kind(number, offline)`,
      which is handed to the update as its argument.
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

    def get_extra_state(self):
        """The optimisers' states, so that `state_dict` holds the whole learner."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def set_extra_state(self, state) -> None:
        for optimizer, its_state in zip(self.optimizers, state, strict=True):
            restore(optimizer, its_state)


# --- Optimisers ---


def adam(parameters, learning_rate: float) -> torch.optim.Adam:
    """Adam in one kernel, able to be captured in a CUDA graph."""
    parameters = list(parameters)
    capturable = parameters[0].is_cuda
    return torch.optim.Adam(parameters, learning_rate, fused=True, capturable=capturable)


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load its state but for what this run sets: the learning rate, and what capture needs.
    Raises ValueError for another optimiser's, which a fused step would read beyond its end."""
    parameters = optimizer.param_groups[0]["params"]
    for number, moments in state["state"].items():
        for name, moment in moments.items():
            shape = () if name == "step" else parameters[number].shape
            if moment.shape != shape or moment.dtype != torch.float32:
                raise ValueError(f"an optimiser's {name} has shape {tuple(moment.shape)}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step on the sum of a loss (G,), with gradients of the optimiser's own parameters only."""
    parameters = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss.sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, live: nn.Module, tau: float) -> None:
    """Move target parameters by a share tau towards the live ones."""
    torch._foreach_lerp_(list(target.parameters()), list(live.parameters()), tau)
