"""Random data, a brute-force network and closed forms that the scripts' tests share."""

import numpy as np
import torch

from common.datasets import TeamDataset

OBS_DIM, ACTION_DIM = 5, 2


def random_batch(G, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "obs": torch.randn(G, size, OBS_DIM, generator=generator),
        "next_obs": torch.randn(G, size, OBS_DIM, generator=generator),
        "actions": torch.rand(G, size, ACTION_DIM, generator=generator) * 2 - 1,
        "rewards": torch.randn(G, size, generator=generator),
        "terminations": (torch.rand(G, size, generator=generator) < 0.2).float(),
    }


def random_team(n=600, num_agents=2, seed=0):
    random = np.random.default_rng(seed)
    return TeamDataset(
        obs=random.normal(size=(n, 1, OBS_DIM)).astype(np.float32),
        actions=random.uniform(-1, 1, (n, num_agents, ACTION_DIM)).astype(np.float32),
        rewards=random.normal(size=n).astype(np.float32),
        next_obs=random.normal(size=(n, 1, OBS_DIM)).astype(np.float32),
        terminations=random.random(n) < 0.05,
        truncations=np.zeros(n, bool),
        source="random numbers",
    )


def add_deployment(replay, seed=1):
    random = np.random.default_rng(seed)
    shape = (replay.num_seeds, replay.deployment_steps)
    replay.add(
        obs=random.normal(size=(*shape, replay.num_agents, OBS_DIM)).astype(np.float32),
        actions=random.uniform(-1, 1, (*shape, replay.num_agents, ACTION_DIM)).astype(np.float32),
        rewards=random.normal(size=shape).astype(np.float32),
        next_obs=random.normal(size=(*shape, replay.num_agents, OBS_DIM)).astype(np.float32),
        terminations=np.zeros(shape, bool),
    )


def plain_mlp(network, x, g):
    """A group's network as plain float64 numpy, one row at a time; ReLU between its layers."""
    x = np.asarray(x, np.float64)
    layers = [layer for layer in network if hasattr(layer, "weight")]
    for i, layer in enumerate(layers):
        weight, bias = (p[g].detach().double().numpy() for p in (layer.weight, layer.bias))
        x = x @ weight + bias[0]
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def set_scales(agent):
    """Observations in units of their own."""
    with torch.no_grad():
        agent.obs_mean += torch.randn(OBS_DIM)
        agent.obs_std += torch.rand(OBS_DIM)


def scaled(agent, obs):
    """Observations as the learner's networks see them, in float64."""
    return (obs - agent.obs_mean.double().numpy()) / agent.obs_std.double().numpy()


def central_difference(parameters, direction, loss, size=1e-6):
    """Slope of `loss()` as the parameters move along the direction."""
    values = []
    with torch.no_grad():
        for move in (size, -size):
            torch._foreach_add_(parameters, direction, alpha=move)
            values.append(loss())
            torch._foreach_add_(parameters, direction, alpha=-move)
    return (values[0] - values[1]) / (2 * size)


def best_gain(cost, gamma=0.9, push=0.3):
    """k of the best action -k s in s' = s + push a with the reward -s^2 - cost a^2 (Riccati)."""
    p = 0.0
    for _ in range(1000):
        k = gamma * push * p / (cost + gamma * push**2 * p)
        p = 1 + cost * k**2 + gamma * p * (1 - push * k) ** 2
    return k
