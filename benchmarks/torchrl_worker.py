"""torchrl's side of `benchmarks.peers`; runs in the environment which that makes, and needs nothing
of this project.

    python benchmarks/torchrl_worker.py DATA.hdf5 ACTION_DIM SIZES COMPILE DEVICE

SIZES is JSON, {ALGORITHM: [batch size, hidden units], ...}. Reads lines "ALGORITHM UPDATES" and
answers each with the seconds that they took, batches included.
"""

import json
import logging
import sys
import time

import h5py
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, SoftUpdate, TD3BCLoss

path, action_dim, sizes, _, device = sys.argv[1:]
action_dim, sizes = int(action_dim), json.loads(sizes)
answers, sys.stdout = sys.stdout, sys.stderr
torch.set_num_threads(1)
logging.getLogger("torchrl").setLevel("WARNING")  # it would write between the answers
with h5py.File(path) as file:
    # The first agent's: everything observed, its own actions
    n = min(len(file["rewards"]), 100_000)
    names = "observations", "actions", "rewards", "terminals", "next_observations"
    part = {name: torch.from_numpy(file[name][:n]) for name in names}
rewards, done = part["rewards"].float().unsqueeze(1), part["terminals"].bool().unsqueeze(1)
following = {"observation": part["next_observations"], "reward": rewards}
data = TensorDict(
    {
        "observation": part["observations"],
        "action": part["actions"][:, :action_dim].contiguous(),
        "next": following | {"done": done, "terminated": done},
    },
    batch_size=n,
)
obs_dim = data["observation"].shape[1]
box = Bounded(-1.0, 1.0, (action_dim,), device=device)


def network(hidden: int, in_features: int, out_features: int) -> nn.Module:
    cells = {"num_cells": [hidden, hidden], "activation_class": nn.ReLU, "device": device}
    return MLP(in_features=in_features, out_features=out_features, **cells)


def critic(hidden: int) -> nn.Module:
    keys = ["observation", "action"]
    return ValueOperator(network(hidden, obs_dim + action_dim, 1), in_keys=keys)


class TD3BC:
    """As in Fujimoto and Gu, 2021: the actor at every second update."""

    def __init__(self, hidden: int):
        policy = nn.Sequential(network(hidden, obs_dim, action_dim), nn.Tanh())
        actor = TensorDictModule(policy, ["observation"], ["action"])
        self.loss = TD3BCLoss(actor, critic(hidden), action_spec=box, num_qvalue_nets=2, alpha=2.5)
        self.loss.make_value_estimator(gamma=0.99)
        self.targets = SoftUpdate(self.loss, tau=0.005)
        self.of_critics = adam(self.loss.qvalue_network_params)
        self.of_actor = adam(self.loss.actor_network_params)
        self.made = 0

    def update(self, batch: TensorDict) -> torch.Tensor:
        q_loss, _ = self.loss.qvalue_loss(batch)
        step(self.of_critics, q_loss)
        self.made += 1
        if self.made % 2 == 0:
            step(self.of_actor, self.loss.actor_loss(batch)[0])
            self.targets.step()
        return q_loss


class IQL:
    """As in Kostrikov et al., 2022."""

    def __init__(self, hidden: int):
        heads = nn.Sequential(network(hidden, obs_dim, 2 * action_dim), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(heads, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            spec=box,
        )
        value = ValueOperator(network(hidden, obs_dim, 1), in_keys=["observation"])
        options = {"num_qvalue_nets": 2, "temperature": 3.0, "expectile": 0.7}
        self.loss = IQLLoss(actor, critic(hidden), value, **options)
        self.loss.make_value_estimator(gamma=0.99)
        self.targets = SoftUpdate(self.loss, tau=0.005)
        self.optimizer = adam(self.loss)

    def update(self, batch: TensorDict) -> torch.Tensor:
        losses = self.loss(batch)
        loss = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]
        step(self.optimizer, loss)
        self.targets.step()
        return loss


def adam(of) -> torch.optim.Adam:
    parameters = of.parameters() if isinstance(of, nn.Module) else of.flatten_keys().values()
    return torch.optim.Adam(list(parameters), 3e-4)


def step(optimizer: torch.optim.Adam, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


learners, buffers = {}, {}
for line in sys.stdin:
    name, updates = line.split()
    batch_size, hidden = sizes[name]
    if name not in learners:
        learners[name] = {"TD3BC": TD3BC, "IQL": IQL}[name](hidden)
        storage = LazyTensorStorage(n, device=device)
        buffers[name] = TensorDictReplayBuffer(storage=storage, batch_size=batch_size)
        buffers[name].extend(data)
    now = time.process_time if device == "cpu" else time.perf_counter
    start = now()
    for _ in range(int(updates)):
        loss = learners[name].update(buffers[name].sample())
    float(loss)  # waits for a GPU
    print(now() - start, file=answers, flush=True)
