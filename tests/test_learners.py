"""What every learner must do, alone and in the stack."""

import importlib
import io

import numpy as np
import pytest
import torch

from common import strategies
from common.device import Graphed, multiply_by_onednn
from common.replay import Replay
from tests.helpers import (
    CENTRAL,
    OBS_DIM,
    SCRIPTS,
    WITH_OTC,
    WITH_SCALES,
    WITH_TARGETS,
    Watch,
    add_deployment,
    assert_same,
    by_group,
    every_script,
    make,
    random_batch,
    random_team,
    twins,
    update,
    update_number,
)


@every_script
def test_a_group_trains_in_the_stack_as_it_does_alone(monkeypatch, script):
    """Same start, data and noise: group 2 of three, and the same learner by itself, in float64, so
    that not even a trust region's choice of steps differs.

    The others' data is larger by far, so that a mean over all groups would show.
    """
    batches = [{k: v.double() for k, v in random_batch(3, seed=i).items()} for i in range(24)]
    for batch in batches:
        for name in ("obs", "next_obs", "rewards"):
            batch[name][:2] *= 10

    def in_every_group(numbers, shape):
        return torch.as_tensor(numbers(tuple(shape[1:]))).expand(tuple(shape))

    def normal(*shape, device=None):
        return in_every_group(lambda s: noise.normal(size=s), shape)

    def uniform(x):
        return in_every_group(lambda s: noise.random(s), x.shape)

    def integers(high, shape, device=None):
        return in_every_group(lambda s: noise.integers(high, size=s), shape)

    torch.manual_seed(0)
    (stack, kind_of), (alone, _) = make(script, 3), make(script, 1)
    stack.double(), alone.double()

    def pairs():
        """Parameters alone, and group 2's in the stack, which may hold several of each group."""
        both = zip(alone.parameters(), stack.named_parameters(), strict=True)
        return [(one, by_group(name, many, 3)[2]) for one, (name, many) in both]

    with torch.no_grad():
        for one, many in pairs():
            one.copy_(many)
    starts = [p.detach().clone() for p in alone.parameters()]
    monkeypatch.setattr(torch, "randn", normal)
    monkeypatch.setattr(torch, "randn_like", lambda x: normal(*x.shape))
    monkeypatch.setattr(torch, "rand_like", uniform)
    monkeypatch.setattr(torch, "randint", integers)
    last = []
    for agent, groups in ((stack, slice(None)), (alone, slice(2, 3))):
        noise = np.random.default_rng(0)
        for number, batch in enumerate(batches, 1):
            its_batch = {k: v[groups] for k, v in batch.items()}
            losses = update_number(agent, its_batch, number, kind_of)
        last.append({tag: loss[-1] for tag, loss in losses.items()})
    torch.testing.assert_close(*last, rtol=1e-7, atol=1e-9)
    for one, many in pairs():
        torch.testing.assert_close(one, many, rtol=1e-7, atol=1e-9)
    named = zip(alone.named_parameters(), starts, strict=True)
    still = {name for (name, parameter), start in named if torch.equal(parameter, start)}
    assert still <= {"log_factor"}  # CQL's, which only --lagrange moves


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in CENTRAL])
def test_other_agents_actions_do_not_matter_bit_for_bit(script):
    trained = []
    for spoil in (False, True):
        team = random_team(num_agents=3)
        if spoil:
            team.actions[:, [0, 2]] = np.random.default_rng(9).uniform(-1, 1, (len(team), 2, 2))
        torch.manual_seed(0)
        replay = Replay(team, 1, 0, 1)
        agent, kind_of = make(script, 3)
        if hasattr(agent, "measure_scales"):
            agent.measure_scales(replay)
        for number in range(1, 21):
            batch = replay.gather(replay.draw_offline(16))
            update_number(agent, batch, number, kind_of)
        trained.append([by_group(name, p.detach(), 3) for name, p in agent.named_parameters()])
    for one, other in zip(*trained, strict=True):
        assert torch.equal(one[1], other[1])
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(*trained, strict=True))


@every_script
def test_a_state_dict_holds_all_that_training_depends_on(script):
    """Another learner that loads it goes on bit for bit as the first does."""
    torch.manual_seed(0)
    replay = Replay(random_team(), 2, 0, 1)
    (first, kind_of), (second, _) = make(script, 4), make(script, 4)
    if hasattr(first, "measure_scales"):
        first.measure_scales(replay)

    def train(agent, numbers):
        for number in numbers:
            batch = replay.gather(replay.draw_offline(16))
            losses = update_number(agent, batch, number, kind_of)
        return {name: value.clone() for name, value in losses.items()}

    train(first, range(1, 14))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same(second.state_dict(), first.state_dict())
    ends = []
    for agent in (first, second):
        torch.manual_seed(1)
        losses = train(agent, range(14, 30))
        ends.append((losses, agent.state_dict(), agent.act(torch.ones(4, 3, OBS_DIM))))
    assert_same(*ends)


@every_script
def test_a_state_of_another_device_keeps_updates_capturable(script):
    """A CPU's optimisers are not capturable, a GPU's must stay so, and a learning rate its own."""
    state, agent = make(script, 4)[0].state_dict(), make(script, 4)[0]
    for optimizer in agent.optimizers:
        optimizer.param_groups[0].update(capturable=True, lr=0.5)
    agent.load_state_dict(state)
    for optimizer in agent.optimizers:
        group = optimizer.param_groups[0]
        assert group["capturable"] and group["lr"] == 0.5


@every_script
def test_losses_and_what_the_sampler_needs_have_one_value_per_group(script):
    torch.manual_seed(0)
    agent, kind_of = make(script, 3)
    tags = set()
    for number in range(1, 14):
        batch = random_batch(3, seed=number)
        losses = update_number(agent, batch, number, kind_of)
        assert all(tag.startswith("losses/") for tag in losses)
        assert all(loss.shape == (3,) and loss.isfinite().all() for loss in losses.values())
        assert not any(loss.requires_grad for loss in losses.values())
        tags.add(frozenset(losses))
    assert len(tags) == 1
    obs, actions = batch["obs"], batch["actions"]
    chosen = agent.act(obs)
    assert chosen.shape == actions.shape and chosen.abs().max() <= 1 and not chosen.requires_grad
    if script in WITH_OTC:
        q, v = agent.q_value(obs, actions), agent.value(obs)
        assert q.shape == v.shape == obs.shape[:2] and not q.requires_grad | v.requires_grad


STRATEGIES = {
    "otc value": {"sampling": "otc", "distance": "value"},
    "otc embedding": {"sampling": "otc", "distance": "embedding"},
    "balanced": {"sampling": "balanced"},
    "uniform": {"sampling": "uniform"},
    "online": {"sampling": "online"},
    "offline": {"sampling": "offline"},
}


def prepared(script, strategy, device="cpu", **flags):
    """A fine-tuning update with what is logged of it, its kinds, the learner, the sampler and the
    replay after one deployment."""
    options = {**STRATEGIES[strategy], "candidates": 64, "references": 30, **flags}
    replay = Replay(random_team(), 2, 2, 40, device)
    agent, kind_of = make(script, 4, device, **options)
    with torch.device(device):
        otc = importlib.import_module(script).OTC
        transitions = strategies.make(replay, agent.args, otc)
    if hasattr(agent, "measure_scales"):
        agent.measure_scales(replay)
    add_deployment(replay)
    transitions.start_deployment(agent, 1)

    gather = replay.gather_following if script == "icq" else replay.gather
    if "critic" in flags:
        gather = replay.gather_team

    def finetune_update(*kind):
        index = transitions.draw(agent)
        return update(agent, gather(index), *kind) | transitions.diagnostics(index)

    return finetune_update, kind_of, agent, transitions, replay


def addresses(*holders):
    """{name: address} of all the tensors that objects hold, in modules and optimisers too."""
    found = {}

    def look(name, thing):
        if isinstance(thing, torch.Tensor):
            found[name] = thing.data_ptr()
        elif isinstance(thing, torch.nn.Module):
            for key, tensor in [*thing.named_parameters(), *thing.named_buffers()]:
                found[f"{name}.{key}"] = tensor.data_ptr()
            for key, value in vars(thing).items():
                look(f"{name}.{key}", value)
        elif isinstance(thing, torch.optim.Optimizer):
            look(f"{name}.state", list(thing.state.values()))
        elif isinstance(thing, strategies.Priorities | Replay):
            look(name, vars(thing))
        elif isinstance(thing, dict):
            for key, value in thing.items():
                look(f"{name}.{key}", value)
        elif isinstance(thing, list | tuple):
            for i, value in enumerate(thing):
                look(f"{name}.{i}", value)

    for holder in holders:
        look(type(holder).__name__, holder)
    return found


WITH_STRATEGY = [
    (script, strategy)
    for script in WITH_OTC
    for strategy in STRATEGIES
    if script == "otc_bcq" or strategy.startswith("otc") or strategy == "balanced"
]


WITH_FLAGS = [(*pair, {}) for pair in WITH_STRATEGY]
WITH_FLAGS += [
    ("otc_bcq", strategy, {"exclude_self_matches": True, "replacement": False})
    for strategy in ("otc value", "otc embedding")
]
WITH_FLAGS += [
    ("otc_cql", "uniform", {"lagrange": True}),
    ("omar", "uniform", {"penalise_policy": True, "refit": "elite", "omar_coefficient": 0.5}),
    ("omar", "uniform", {"critic": "centralised", "num_seeds": 2}),
    ("otc_bremen", "uniform", {"termination": "learned"}),
]


@pytest.mark.parametrize(("script", "strategy", "flags"), WITH_FLAGS, ids=str)
def test_an_update_can_be_captured(script, strategy, flags):
    """Without a GPU: it never waits for the host, makes tensors on its own device only (any other
    would be a meta tensor here), and what it reads and writes stays where it is."""
    torch.manual_seed(0)
    finetune_update, kind_of, agent, transitions, replay = prepared(script, strategy, **flags)

    def call(number):
        return finetune_update(*(() if kind_of is None else (kind_of(number),)))

    for number in range(1, 14):
        call(number)
    before = addresses(agent, transitions, replay)
    for number in range(14, 18):
        with torch.device("meta"), Watch():
            returned = call(number)
        assert all(value.device.type == "cpu" for value in returned.values())
    add_deployment(replay, seed=2)
    transitions.start_deployment(agent, 2)
    call(18)
    assert addresses(agent, transitions, replay) == before


def trained_with_diagnostics(script, strategy, device, graphed):
    """Parameters after 40 fine-tuning updates, and what each update returned."""
    torch.manual_seed(0)
    finetune_update, kind_of, agent, _, _ = prepared(script, strategy, device)
    call, returned = Graphed(finetune_update, graphed, kind_of), []
    torch.manual_seed(1)
    if device == "cuda":  # no update may wait for the host
        torch.cuda.set_sync_debug_mode("default" if graphed else "error")
    try:
        for number in range(1, 41):
            returned.append({tag: value.clone() for tag, value in call(number).items()})
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return [p.detach() for p in agent.parameters()], returned


def test_fast_products_on_a_cpu_are_float32():
    """Where oneDNN may round products to bfloat16, and elsewhere: a number that it does not hold
    passes, and errors are those of float32's sums."""
    multiply_by_onednn()
    torch.manual_seed(0)
    identity = torch.eye(256).repeat(2, 1, 1)
    for rows in (1, 10, 128, 3840):
        x = torch.full((2, rows, 256), 1 + 2**-20)
        assert torch.equal(torch.bmm(x, identity), x)
        x, w = torch.randn(2, rows, 256), torch.randn(2, 256, 256)
        for a, b in ((x, w), (x, w.mT), (x.mT, x)):
            scale = (a.abs().double() @ b.abs().double()).max()
            assert (a @ b - a.double() @ b.double()).abs().max() < 1e-6 * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("script", "strategy"), WITH_STRATEGY)
def test_graph_equals_eager_on_a_gpu(script, strategy):
    eager, graph = (trained_with_diagnostics(script, strategy, "cuda", g) for g in (False, True))
    torch.testing.assert_close(eager, graph, rtol=1e-4, atol=1e-5)


# --- Target networks ---


@pytest.mark.parametrize("script", WITH_TARGETS)
def test_twin_critics_differ_and_targets_follow_without_gradient(script):
    torch.manual_seed(0)
    agent, kind_of = make(script, 2, tau=0.25)
    for live, target in zip(agent.live.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(live, target) and live.data_ptr() != target.data_ptr()
    first, second = twins(agent)
    critics = [p.detach().clone() for p in first.parameters()]
    for number in (2, 4, 6):  # turns of TD3+BC's actor, with which its targets follow
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert not torch.equal(one, other)
        before = [p.clone() for p in agent.target.parameters()]
        update_number(agent, random_batch(2, seed=number), number, kind_of)
        pairs = zip(before, agent.live.parameters(), agent.target.parameters(), strict=True)
        for old, live, target in pairs:
            torch.testing.assert_close(target, 0.75 * old + 0.25 * live)
    for old, now in zip(critics, first.parameters(), strict=True):
        assert not torch.equal(old, now)
    assert all(p.grad is None and not p.requires_grad for p in agent.target.parameters())


# --- Scales of the observations ---


@pytest.mark.parametrize("script", WITH_SCALES)
def test_observations_are_scaled_by_the_offline_datas_statistics_alone(script):
    team = random_team()
    team.obs[:] = team.obs * [1, 10, 0.1, 0, 3] + [0, 5, -7, 2, 100]  # one never changes
    replay = Replay(team, 2, 1, 40)
    torch.manual_seed(0)
    agent, kind_of = make(script, 4)
    agent.measure_scales(replay)
    rows = team.obs[:, 0].astype(np.float64)
    mean, std = rows.mean(0), rows.std(0) + 1e-3
    obs = replay.gather(torch.arange(7).expand(4, -1))["obs"]
    expected = (obs.double().numpy() - mean) / std
    np.testing.assert_allclose(agent.scaled(obs).numpy(), expected, rtol=2e-3, atol=1e-3)

    before, acted = agent.scaled(obs), agent.act(obs)
    add_deployment(replay)
    for number in (1, 2):
        update_number(agent, replay.gather(replay.draw_online(16)), number, kind_of)
    assert torch.equal(agent.scaled(obs), before)
    agent.measure_scales(replay)  # measured again, for instance on resuming: still offline data
    assert torch.equal(agent.scaled(obs), before)

    # They belong to the learner's state
    other, _ = make(script, 4)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.scaled(obs), before) and torch.equal(other.act(obs), agent.act(obs))
    assert not torch.equal(agent.act(obs), acted)


@pytest.mark.parametrize("script", WITH_SCALES)
def test_the_units_of_the_observations_do_not_matter(script):
    """The same data in other units, origin and all: the same policy and the same values."""
    trained = []
    for unit, origin in ((1.0, 0.0), (1000.0, 500.0)):
        team = random_team()
        team.obs[:] = unit * team.obs + origin
        team.next_obs[:] = unit * team.next_obs + origin
        replay = Replay(team, 1, 0, 1)
        torch.manual_seed(0)
        agent, kind_of = make(script, 2)
        agent.measure_scales(replay)
        for number in range(1, 41):
            update_number(agent, replay.gather(replay.draw_offline(32)), number, kind_of)
        batch = replay.gather(torch.arange(100).expand(2, -1))
        q = agent.q_value(batch["obs"], batch["actions"])
        trained.append((agent.act(batch["obs"]), q, agent.value(batch["obs"])))
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)
        assert one.std() > 0.02
