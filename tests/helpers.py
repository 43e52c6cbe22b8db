"""Random data, brute force, closed forms, tiny runs and tests of draws that several tests share."""

import contextlib
import copy
import dataclasses
import importlib
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from common import cli
from common.datasets import TeamDataset
from common.nets import Learner
from tests.tiny_task import DISCRETE_ENV, ENV

ROOT = Path(__file__).parent.parent

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


def twins(agent, name="qf"):
    """An agent's two critics, each as a module on their stack's memory, gradients too."""
    stack = getattr(agent, name)
    half = len(stack.network[0].weight) // 2
    found = []
    for groups in (slice(half), slice(half, None)):
        critic = copy.deepcopy(stack)
        for layer, its in zip(stack.network, critic.network, strict=True):
            for key, whole in layer.named_parameters():
                part = torch.nn.Parameter(whole.detach()[groups], whole.requires_grad)
                part.grad = None if whole.grad is None else whole.grad[groups]
                setattr(its, key, part)
        critic.forward = getattr(critic, "first", None)
        found.append(critic)
    return found


def by_group(name, parameter, num_groups):
    """(num_groups, ...), the groups' own parts of a stack: of twins, one network after another."""
    if name.startswith(("qf.network.", "target_qf.network.")):
        return parameter.unflatten(0, (-1, num_groups)).transpose(0, 1)
    return parameter.unflatten(0, (num_groups, -1))


def set_scales(agent):
    """Observations in units of their own, which differ by group."""
    with torch.no_grad():
        agent.obs_mean += torch.randn_like(agent.obs_mean)
        agent.obs_std += torch.rand_like(agent.obs_std)


def scaled(agent, obs, g):
    """An observation as group g's networks see it, in float64."""
    mean, std = (x[g, 0].double().numpy() for x in (agent.obs_mean, agent.obs_std))
    return (obs - mean) / std


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


def linear_quadratic_error(agent, num_updates, num_last, kind_of=None):
    """Mean distance of two groups' policies, (2,), from the best gain in s' = s + 0.3 a + noise.

    Uniform actions, observed as 50 + 10 s; each group has its own cost of an action, and so its own
    gain. Policies are averaged over the last updates.
    """
    agent.obs_mean.fill_(50.0)
    agent.obs_std.fill_(10.0)
    costs = torch.tensor([1.0, 3.0]).view(2, 1)
    gains = torch.tensor([best_gain(1.0), best_gain(3.0)]).view(2, 1, 1)
    line, chosen = torch.linspace(-1, 1, 41).view(1, 41, 1).expand(2, -1, -1), []
    for number in range(1, num_updates + 1):
        state, actions = torch.rand(2, 128, 1) * 3 - 1.5, torch.rand(2, 128, 1) * 2 - 1
        rewards = -state.square().squeeze(2) - costs * actions.square().squeeze(2)
        next_state = state + 0.3 * actions + 0.05 * torch.randn_like(state)
        batch = {"obs": 50 + 10 * state, "next_obs": 50 + 10 * next_state, "actions": actions}
        batch |= {"rewards": rewards, "terminations": torch.zeros(2, 128)}
        update_number(agent, batch, number, kind_of)
        if number > num_updates - num_last:
            chosen.append(agent.act(50 + 10 * line))
    return (torch.stack(chosen).mean(0) + gains * line).abs().mean((1, 2))


# --- The scripts ---

# Flags that make a run of a script tiny, beside those of `tiny`; a script without a row needs none
FLAGS = {
    "otc_bcq": "--num-act-actions 5",
    "otc_cql": "--num-penalty-actions 3",
    "otc_td3bc": "--policy-delay 3",
    "otc_bremen": "--num-models 2 --clone-updates 40 --improve-every 10 --rollouts 8 "
    "--rollout-length 4 --value-updates 3 --cg-iterations 3",
    "omar": "--sampler-samples 3 --num-penalty-actions 3",
    "moma_ppo": "--num-models 3 --num-elites 2 --model-updates 40 --model-hidden-size 8 "
    "--transitions 32 --rollout-length 4 --minibatch-size 16 --epochs 2 --history 2 "
    "--memory-size 4",
    "omsd": "--policy-updates 20 --denoiser-size 8",
}


def learner_of(script: str) -> type[Learner]:
    """The one learner that a script defines."""
    module = importlib.import_module(script)
    (learner,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Learner) and each.__module__ == script
    )
    return learner


# Name of each script's learner, and its flags; found by themselves
SCRIPTS = {
    path.stem: (learner_of(path.stem).__name__, FLAGS.get(path.stem, ""))
    for path in sorted(ROOT.glob("*.py"))
}
WITH_OTC = [script for script in SCRIPTS if hasattr(importlib.import_module(script), "OTC")]
# Those that train a team together
CENTRAL = ["maiql", "matd3bc", "moma_ppo", "omsd"]
every_script = pytest.mark.parametrize("script", SCRIPTS)
every_otc_script = pytest.mark.parametrize("script", WITH_OTC)
# Those with twin critics and their targets, and those whose observations are numbers with a scale
WITH_TARGETS = [script for script in WITH_OTC if script != "otc_bremen"]
WITH_SCALES = ["otc_awac", "otc_cql", "otc_td3bc", "omar", "icq"]


def make(script, G, device="cpu", **options):
    """A small learner, and the kinds that its updates have: a function of their number."""
    module = importlib.import_module(script)
    if script in CENTRAL:  # teams of two, or of one where G is odd
        options = {"num_seeds": G if G % 2 else G // 2, **options}
    if script == "moma_ppo":
        options = {"num_models": 3, "num_elites": 2, "model_hidden_size": 8, **options}
        options |= {"model_updates": 8, "transitions": 32, "rollout_length": 4, "epochs": 2}
        options |= {"minibatch_size": 8, "history": 3, "memory_size": 8}
    if script == "omsd":
        options = {"offline_updates": 20, "policy_updates": 12, "denoiser_size": 8, **options}
    if script == "otc_bremen":
        options = {"num_models": 2, "clone_updates": 8, "improve_every": 4, **options}
        # Few iterations: a converged conjugate gradient amplifies rounding.
        options |= {"rollouts": 8, "rollout_length": 4, "value_updates": 3, "cg_iterations": 4}
    args = module.Args(hidden_size=16, batch_size=16, **options)
    with torch.device(device):
        agent = learner_of(script)(G, OBS_DIM, ACTION_DIM, args)
    kind_of = None
    if hasattr(agent, "kind"):

        def kind_of(number):
            return agent.kind(number, offline=True)

    return agent, kind_of


def update(agent, batch, *kind):
    """One update as the scripts make it, with imagined rollouts from the batch's own states, and
    actions that follow where the batch has none."""
    if type(agent).__name__ == "ICQ" and "next_actions" not in batch:
        followed = {"next_actions": batch["actions"].roll(1, dims=1)}
        batch = batch | followed | {"is_followed": 1 - batch["terminations"]}
    if type(agent).__name__ == "MOMAPPO":
        if kind == ("fit",):  # each of three members gets its part
            batch = {name: x[:, : x.shape[1] // 3 * 3] for name, x in batch.items()}
        elif kind == ("improve",):
            rows = {name: batch[name][:, : len(batch["obs"][0]) // 4 * 4] for name in batch}
            frames = {n: rows[n].unsqueeze(2).expand(-1, -1, 3, -1) for n in ("obs", "actions")}
            batch = rows | {
                "history": frames | {"is_there": torch.ones_like(frames["obs"][..., 0])}
            }
        return agent.update(batch, *kind)
    losses = agent.update(batch, *kind)
    if kind == ("improve",):
        losses |= agent.improve(batch["obs"][:, : agent.args.rollouts])
    return losses


def update_number(agent, batch, number, kind_of):
    return update(agent, batch, *(() if kind_of is None else (kind_of(number),)))


def state_of(path):
    """A checkpoint's content, but for what names its folder."""
    state = torch.load(path, weights_only=True)
    del state["args"], state["events"]
    return state


def assert_same(one, other, where="state"):
    """Nested states are equal bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(one, other, **same, msg=lambda text: f"{where}: {text}")
    else:
        assert one == other or (one != one and other != other), where  # or both nan


# --- Whole runs on the tiny task ---

QUICK = {
    "--offline-updates": 60,
    "--eval-every": 30,
    "--log-every": 10,
    "--batch-size": 16,
    "--hidden-size": 16,
    "--device": "cpu",
    "--deployments": 2,
    "--deployment-steps": 60,
    "--finetune-updates": 20,
    "--candidates": 32,
    "--references": 40,
    "--distance-candidates": 100,
}


def tiny(script):
    """Flags of a run of a second or two, those of QUICK that the script has."""
    names = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    quick = ((k, str(v)) for k, v in QUICK.items() if k[2:].replace("-", "_") in names)
    return [*(text for pair in quick for text in pair), *SCRIPTS[script][1].split()]


def for_learner(script, argv):
    """The arguments as text; those of the tiny task are its discrete twin's where need be."""
    argv = [str(each) for each in argv]
    if script == "otc_cql_discrete":
        argv = [DISCRETE_ENV if each == ENV else each for each in argv]
        argv = [each.replace("point.hdf5", "steps.hdf5") for each in argv]
    return argv


def run(monkeypatch, script, *argv):
    """Run a script in this process; its signal handlers go with it."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *for_learner(script, argv)])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.cli(module.main, module.Args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_running(pid):
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def only(folder, pattern="*"):
    (found,) = Path(folder).glob(pattern)
    return found


def logged(folder):
    """{tag: events} of a run's TensorBoard, in the order in which TensorBoard reads its files: of
    their names as texts."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(path))
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            found.setdefault(tag, []).extend(accumulator.Scalars(tag))
    return found


def logged_steps(folder):
    """{tag: steps} of a run's TensorBoard, as often as they are there."""
    return {tag: [event.step for event in events] for tag, events in logged(folder).items()}


def scalars(folder):
    """{tag: {step: value}} of a run's TensorBoard."""
    return {tag: {e.step: e.value for e in events} for tag, events in logged(folder).items()}


# --- Draws ---


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def assert_frequencies(index, probabilities, z: float = 5.0) -> None:
    """Chi-square test (Wilson and Hilferty's approximation) of draws against probabilities."""
    index, expected = np.ravel(index), np.asarray(probabilities, np.float64)
    expected = expected / expected.sum() * index.size
    observed = np.bincount(index, minlength=expected.size)
    assert observed.size == expected.size
    assert not observed[expected == 0].any()
    # Neighbouring bins, sorted by size, are merged until each expects 8 or more.
    order = np.argsort(-expected, kind="stable")
    bins = np.floor(np.cumsum(np.minimum(expected[order], 8)) / 8 - 1e-9).astype(int)
    bins = np.minimum(bins, max(0, int(expected.sum() // 8) - 1))
    observed = np.bincount(bins, observed[order])
    expected = np.bincount(bins, expected[order])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 0, "too few draws for a test"
    statistic = ((observed - expected) ** 2 / expected).sum()
    limit = freedom * (1 - 2 / (9 * freedom) + z * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} at {freedom} degrees of freedom"


class Watch(TorchDispatchMode):
    """Records the largest tensor made, and raises at operations that would wait for the host on
    CUDA."""

    WAITS = ("local_scalar_dense", "nonzero", "masked_select", "unique2", "unique_dim", "equal")
    TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].lstrip("_")
        waits = name in self.WAITS or self.TAGS & set(func.tags)
        if name in ("index", "index_put", "index_put_"):  # by a mask
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not waits, f"{name} waits for the host"
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes():
                held = result.untyped_storage().nbytes() // result.element_size()
                self.largest = max(self.largest, held)
        return results


@contextlib.contextmanager
def no_host_waits(device):
    """Fails where the code waits for the host: by CUDA's debug mode, on CPU by the operations
    used."""
    if device == "cpu":
        with Watch():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
