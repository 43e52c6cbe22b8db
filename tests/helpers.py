"""Random data and a brute-force network that the scripts' tests share."""

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
