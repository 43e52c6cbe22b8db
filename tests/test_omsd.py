"""OMSD against closed forms, an independent SRPO and worlds whose solution is known."""

import math

import numpy as np
import pytest
import torch

from benchmarks.omsd_bandit import exact_end, exact_noise
from common import InputError
from common.datasets import load
from common.nets import joint
from common.replay import Replay
from omsd import OMSD, OTHERWISE, PRESETS, Args, end_at_timeouts, noise_schedule, preset
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    Watch,
    by_group,
    random_batch,
    random_team,
    set_scales,
)
from tests.test_learners import addresses
from tests.test_uneven import uneven_team
from tests.tiny_task import ENV

DIMS = OBS_DIM, ACTION_DIM


def made(num_agents=2, num_seeds=1, dims=DIMS, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "denoiser_size": 8, "dropout": 0.0, "env": "other"}
    sizes |= {"offline_updates": 200, "policy_updates": 100, "num_seeds": num_seeds}
    return OMSD(num_agents * num_seeds, *dims, Args(**(sizes | options)))


def team_batch(num_agents, num_seeds=1, size=8, seed=0):
    """One batch per team: the same rewards and terminations for its agents."""
    batch = random_batch(num_agents * num_seeds, size, seed)
    for name in ("rewards", "terminations"):
        batch[name] = batch[name][::num_agents].repeat_interleave(num_agents, 0)
    return batch


def double(batch):
    return {key: value.double() for key, value in batch.items()}


class Function(torch.nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def set_critics(agent, function):
    agent.target_qf.forward = lambda *inputs: function(*inputs).expand(2, -1, -1)


class Noise:
    """In place of torch's draws: of each, rows that depend on the agent's number alone."""

    def __init__(self, monkeypatch, rows=lambda x: x):
        self.rows, self.random = rows, np.random.default_rng(0)
        monkeypatch.setattr(torch, "rand_like", lambda x: self.draw(x, self.random.random))
        monkeypatch.setattr(torch, "randn_like", lambda x: self.draw(x, self.random.normal))

    def draw(self, x, numbers):
        size = tuple(x.shape)
        found = numbers(size=size)
        return self.rows(torch.as_tensor(found, dtype=x.dtype))


# --- Diffusion ---


def test_noise_levels_are_the_published_ones():
    t = torch.tensor([0.02, 0.1, 0.2, 0.5, 0.98])
    alpha, sigma = noise_schedule(t)
    torch.testing.assert_close(
        alpha, torch.tensor([0.9970, 0.9467, 0.8114, 0.2812, 0.0080]), rtol=0, atol=6e-5
    )
    torch.testing.assert_close(
        sigma, torch.tensor([0.0772, 0.3221, 0.5845, 0.9597, 1.0]), rtol=0, atol=6e-5
    )


def bandit_batch(size, num_agents=2):
    sign = torch.where(torch.rand(size) < 0.5, 1.0, -1.0)
    actions = (0.8 * sign + 0.1 * torch.randn(num_agents, size)).unsqueeze(2)
    return torch.zeros(num_agents, size, 5), actions


# x, noise expected by a marginal and by a conditional denoiser
EXPECTED = {
    0.2: ([0.1, 0.4, 0.8, 1.0], [-0.033, -0.018, 0.358, 0.640], [-0.922, -0.418, 0.253, 0.589]),
    0.5: ([0.1, 0.4, 0.8, 1.0], [0.098, 0.394, 0.788, 0.985], [-0.130, 0.182, 0.599, 0.807]),
}


def test_denoisers_of_the_bandit_approach_the_analytic_score():
    """Loss .153 of the first agent, .041 of the second, which knows the mode."""
    options = {"env": "bandit-2", "learning_rate": 4e-3, "denoiser_size": 16}
    agent = made(dims=(5, 1), offline_updates=701, policy_updates=1, **options)
    for _ in range(700):
        agent.anneal()
        agent.update_denoisers(*bandit_batch(256))
        agent.made += 1
    obs, actions = bandit_batch(40_000)
    with torch.no_grad():
        t = 1e-3 + (1 - 1e-3) * torch.rand(2, 40_000, 1)
        noise, (alpha, sigma) = torch.randn_like(actions), noise_schedule(t)
        condition = agent.condition(obs, actions)
        found = agent.denoiser(alpha * actions + sigma * noise, condition, t)
        first, second = (found - noise).square().mean((1, 2)).tolist()
        assert 0.150 < first < 0.18 and 0.038 < second < 0.065, (first, second)
        for t, (x, *expected) in EXPECTED.items():
            x = torch.tensor(x).view(1, -1, 1).expand(2, -1, 1)
            condition = agent.condition(torch.zeros(2, 4, 5), torch.full_like(x, 0.8))
            found = agent.denoiser(x, condition, torch.full_like(x, t)).squeeze(2)
            torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.2)


def test_the_exact_noise_is_the_tables():
    for t, (x, *expected) in EXPECTED.items():
        for log_odds, values in zip((0.0, 50.0), expected, strict=True):
            x_ = torch.tensor(x).view(-1, 1)
            found = exact_noise(x_, torch.tensor(t), log_odds).flatten()
            torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=1e-3)


def test_the_least_loss_of_the_bandits_denoisers_is_known():
    """What even the exact scores leave: of who knows the mode the mean over t of alpha^2 s^2 /
    (alpha^2 s^2 + sigma^2), 0.041, of who does not 0.154; of the data, which is clipped, 0.040 and
    0.1535."""
    torch.manual_seed(0)
    levels = (1e-3 + (1 - 1e-3) * (torch.arange(4000) + 0.5) / 4000).double()
    alpha, sigma = noise_schedule(levels)
    known = ((0.1 * alpha).square() / ((0.1 * alpha).square() + sigma.square())).mean().item()
    assert known == pytest.approx(0.0406, abs=1e-4)
    t = levels[torch.randint(4000, (400_000,))].unsqueeze(1)
    alpha, sigma = noise_schedule(t)
    for clips, first, second in ((False, 0.154, known), (True, 0.1535, 0.0398)):
        actions = bandit_batch(400_000)[1].double()
        a_1, a_2 = actions.clamp(-1, 1) if clips else actions
        z = torch.randn(400_000, 1, dtype=torch.float64)
        for a, log_odds, least in ((a_1, 0.0, first), (a_2, 160 * a_1, second)):
            loss = (exact_noise(alpha * a + sigma * z, t, log_odds) - z).square().mean().item()
            assert loss == pytest.approx(least, abs=4e-3)


@pytest.mark.parametrize(("task", "expected"), [("bandit-2", 0.5), ("bandit-3", 0.75)])
def test_the_product_of_marginals_is_far_from_the_data(tmp_path, monkeypatch, task, expected):
    """Total variation 1 - 2^(1 - n), and 0 of the product of what each knows of those before."""
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path))
    signs = load(task, size=10_000).actions[:, :, 0] > 0
    n = signs.shape[1]
    code = signs @ (2 ** np.arange(n))
    joint = np.bincount(code, minlength=2**n) / len(code)
    patterns = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1
    share = signs.mean(0)
    marginals = np.where(patterns, share, 1 - share).prod(1)
    assert np.abs(joint - marginals).sum() / 2 == pytest.approx(expected, abs=1e-3)
    chain = np.ones(2**n)
    for i in range(n):
        for k, pattern in enumerate(patterns):
            same = (signs[:, :i] == pattern[:i]).all(1)
            chain[k] *= (signs[same, i] == pattern[i]).mean() if same.any() else 0
    assert np.abs(joint - chain).sum() / 2 == pytest.approx(0, abs=1e-3)


# --- Who is told what ---


def told(agent, actions, g):
    """The part of denoiser g's condition after its observation, (batch, ...)."""
    return agent.condition(torch.zeros(*actions.shape[:2], OBS_DIM), actions)[g, :, OBS_DIM:]


@pytest.mark.parametrize(("order", "sequence"), [("index", [0, 1, 2]), ("2,0,1", [2, 0, 1])])
def test_a_denoiser_is_told_the_actions_of_the_agents_before_its_own(order, sequence):
    agent, actions = made(3, 2, order=order), torch.randn(6, 4, ACTION_DIM)
    for s in (0, 3):
        for place, i in enumerate(sequence):
            before = [actions[s + j] for j in sequence[:place]]
            zeros = [torch.zeros(4, ACTION_DIM)] * (2 - place)
            assert torch.equal(told(agent, actions, s + i), torch.cat([*before, *zeros], dim=1))
    assert told(made(3, score="independent"), actions[:3], 2).shape == (4, 0)


def test_a_random_order_is_each_seeds_own_and_the_same_alone():
    stack = made(5, 4, order="random", seed=3)
    for s in range(4):
        alone = made(5, 1, order="random", seed=3 + s)
        assert torch.equal(stack.first[5 * s : 5 * s + 5] - 5 * s, alone.first)
        assert torch.equal(stack.is_before[5 * s : 5 * s + 5], alone.is_before)
    assert (
        len({tuple(row) for row in stack.first[::5].sub(torch.arange(0, 20, 5)[:, None]).tolist()})
        > 1
    )
    for order in ("0,1", "0,0,1,2,3", "first", "0;1"):
        with pytest.raises(InputError, match="expected index, random, or such as 4,3,2,1,0"):
            made(5, order=order)


def test_the_condition_may_be_all_observations():
    obs, actions = torch.randn(4, 3, OBS_DIM), torch.randn(4, 3, ACTION_DIM)
    found = made(2, 2, condition="joint", score="independent").condition(obs, actions)
    for g in range(4):
        s = g // 2 * 2
        assert torch.equal(found[g], torch.cat([obs[s], obs[s + 1]], dim=1))
    joint = made(2, 2, score="joint").condition(obs, actions)
    assert torch.equal(joint, found[::2])


# --- Drives ---


@pytest.mark.parametrize("weight", ["vds", "one", "ratio"])
@pytest.mark.parametrize("t_max", [0.02, 0.98])
def test_a_single_gaussians_score_vanishes_at_its_mean(weight, t_max):
    """And anywhere else pulls towards it, by as much with the control variate and with far less
    noise where noise levels are high."""
    mean, std = 0.3, 0.1

    def exact(noised, condition, t, training):
        alpha, sigma = noise_schedule(t)
        return sigma * (noised - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    pulls = []
    for control_variate in (False, True):
        options = {"score_weight": weight, "t_max": t_max, "control_variate": control_variate}
        agent = made(1, dims=(1, 1), beta=0.0, t_min=0.02, **options)
        agent.denoiser = Function(exact)
        for action in (mean, mean - 0.2, mean + 0.2):
            actions = torch.full((1, 100_000, 1), action)
            drive, q_drive, _ = agent.drives(torch.zeros(1, 100_000, 1), actions)
            assert (q_drive == 0).all()
            pulls.append((drive.mean().item(), drive.std().item() / math.sqrt(100_000)))
    for at_mean, below, above in (
        [pull / error for pull, error in its] for its in (pulls[:3], pulls[3:])
    ):
        assert abs(at_mean) < 5 and below < -10 and above > 10
    for (pull, error), (with_it, its_error) in zip(pulls[:3], pulls[3:], strict=True):
        assert abs(pull - with_it) < 5 * math.hypot(error, its_error)
        assert t_max < 0.98 or its_error < (0.9 if weight == "ratio" else 0.6) * error


@pytest.mark.parametrize("normalize_q", [False, True])
def test_the_drive_of_a_linear_critic_is_beta_times_its_slope(normalize_q):
    agent = made(2, 2, beta=0.7, normalize_q=normalize_q)
    slope = torch.tensor([[1.0, -2.0, 0.5, 0.25], [3.0, 0.0, -1.0, 1.0]])  # (S, N * action_dim)
    set_critics(agent, lambda obs, actions: (slope.unsqueeze(1) * actions).sum(2))
    batch = team_batch(2, 2)
    _, drive, q = agent.drives(batch["obs"], batch["actions"])
    by_agent = slope.view(4, 1, 2)
    expected = (
        by_agent / by_agent.square().mean(2, keepdim=True).sqrt() if normalize_q else by_agent
    )
    torch.testing.assert_close(drive, (0.7 * expected).expand_as(drive), rtol=1e-6, atol=0)
    torch.testing.assert_close(q, (slope.unsqueeze(1) * joint(batch["actions"], agent.N)).sum(2))


@pytest.mark.parametrize("score", ["decomposed", "independent", "joint"])
def test_nothing_but_the_own_action_is_differentiated(monkeypatch, score):
    """The gradient of an actor is that of (w eps - beta dQ/da) a_i / batch with the first factor
    fixed: not through the prefix, the noise, or the score."""
    agent, batch = made(3, score=score, beta=0.3).double(), double(team_batch(3))
    kept = {}
    drives = agent.drives

    def noted(obs, actions):
        assert not actions.requires_grad
        kept["drives"] = drives(obs, actions)
        assert not any(x.requires_grad for x in kept["drives"])
        return kept["drives"]

    monkeypatch.setattr(agent, "drives", noted)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    actor = [p.detach().clone().requires_grad_() for p in agent.actor.parameters()]
    agent.update(batch, "policy")
    names = [name for name, _ in agent.actor.named_parameters()]
    obs = agent.scaled(batch["obs"])
    by_name = dict(zip(names, actor, strict=True))
    actions = torch.tanh(torch.func.functional_call(agent.actor, by_name, obs))
    score_drive, q_drive, _ = kept["drives"]
    expected = torch.autograd.grad(((score_drive - q_drive) * actions).sum() / 8, actor)
    for p, gradient in zip(agent.actor.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
    for name, p in agent.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == name.startswith("actor."), name


def test_only_later_agents_depend_on_a_denoiser_and_on_the_prefix(monkeypatch):
    """Of three agents: a change of one's denoiser moves that one alone, of one's action those
    after it."""
    obs, actions = torch.randn(3, 8, OBS_DIM), torch.rand(3, 8, ACTION_DIM)
    ends = []
    for change in (None, "denoiser", "action"):
        agent, its = made(3), actions.clone()
        if change == "denoiser":
            with torch.no_grad():
                agent.denoiser.head.weight[1] += 1
        if change == "action":
            its[1] = -its[1]
        torch.manual_seed(1)
        ends.append(agent.drives(obs, its)[0])
    plain, denoiser, action = ends
    assert [torch.equal(a, b) for a, b in zip(plain, denoiser, strict=True)] == [True, False, True]
    assert [torch.equal(a, b) for a, b in zip(plain, action, strict=True)] == [True, False, False]


def test_a_large_beta_climbs_the_critic_alone():
    """To the top where it has one inside the box, else to the bound."""
    agent = made(2, dims=(1, 1), beta=1e4, learning_rate=1e-2, policy_updates=150)
    set_critics(agent, lambda obs, a: -(a[..., 0] - 0.3).square() + a[..., 1])
    batch = {k: torch.zeros(2, 16, 1) for k in ("obs", "next_obs", "actions")}
    for _ in range(150):
        agent.update(batch, "policy")
    first, second = agent.act(torch.zeros(2, 1, 1)).flatten().tolist()
    assert first == pytest.approx(0.3, abs=0.02) and second > 0.99


# --- Against SRPO, written anew ---


def plain(network, x, g=0):
    """A group's network on (batch, in), layer by layer."""
    for layer in network:
        x = x @ layer.weight[g] + layer.bias[g, 0] if hasattr(layer, "weight") else layer(x)
    return x


def plain_denoiser(net, noised, obs, t):
    angles = t[:, None] * net.frequencies
    time = plain(net.time, torch.cat([torch.sin(angles), torch.cos(angles)], 1))
    x = plain([net.inputs], torch.cat([noised, obs], 1))
    x = plain([net.trunk], torch.cat([x, time], 1))
    for block in net.blocks:
        x = x + plain(block, x)
    return plain([net.head], torch.relu(x))


@pytest.mark.parametrize("score", ["decomposed", "independent", "joint"])
@pytest.mark.parametrize("weight", ["vds", "one", "ratio"])
@pytest.mark.parametrize("control_variate", [False, True])
def test_one_agent_learns_as_in_srpo(monkeypatch, score, weight, control_variate):
    """Twenty updates of the policy, by a loop of its own with torch's own schedule."""
    beta, options = 0.2, {"policy_updates": 20, "learning_rate": 0.01}
    options["control_variate"] = control_variate
    agent = made(1, score=score, score_weight=weight, beta=beta, **options).double()
    reference = made(1, score=score, score_weight=weight, beta=beta, **options).double()
    for each in (agent, reference):
        torch.manual_seed(5)
        set_scales(each)
        with torch.no_grad():
            for p in each.target_qf.parameters():
                p += 0.1 * torch.randn_like(p)
        each.made.fill_(each.model_updates)
    batches = [double(team_batch(1, size=16, seed=i)) for i in range(20)]

    noise = Noise(monkeypatch)
    for batch in batches:
        agent.update(batch, "policy")

    noise.random = np.random.default_rng(0)
    optimizer = torch.optim.Adam(reference.actor.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for batch in batches:
        s = (batch["obs"][0] - reference.obs_mean[0]) / reference.obs_std[0]
        a = torch.tanh(plain(reference.actor, s))
        fixed = a.detach().requires_grad_()
        t = 0.02 + 0.96 * torch.as_tensor(noise.random.random(16))
        z = torch.as_tensor(noise.random.normal(size=(16, ACTION_DIM)))
        log_alpha = -(20 - 0.1) * t**2 / 4 - 0.1 * t / 2
        alpha = torch.exp(log_alpha)[:, None]
        sigma = torch.sqrt(1 - alpha**2)
        with torch.no_grad():
            e = plain_denoiser(reference.denoiser, alpha * fixed + sigma * z, s, t)
            e = e - z if control_variate else e
        qs = [
            reference.unit * plain(reference.target_qf.network, torch.cat([s, fixed], 1), k).sum()
            for k in (0, 1)
        ]
        (guidance,) = torch.autograd.grad(sum(qs) / 2, fixed)
        w = {"vds": sigma**2, "one": 1.0, "ratio": alpha / sigma}[weight]
        loss = ((w * e * a).sum(1) - beta * (guidance * a).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for one, other in zip(agent.actor.parameters(), reference.actor.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_losses_of_the_critics_and_denoisers_equal_a_loop_over_rows(monkeypatch):
    agent = made(2, expectile=0.8, learning_rate=0.0, tau=0.0).double()
    agent.unit.fill_(3.0)
    with torch.no_grad():
        for p in agent.target_qf.parameters():
            p += 0.1 * torch.randn_like(p)
    batch = double(team_batch(2, size=6))
    noise = Noise(monkeypatch)
    losses = agent.update(batch, "model")
    noise.random = np.random.default_rng(0)
    t, z = noise.random.random((2, 6, 1)), noise.random.normal(size=(2, 6, ACTION_DIM))
    value, errors, of_agent = [], ([], []), ([], [])
    with torch.no_grad():
        for b in range(6):
            s, s2, a = (batch[k][:, b].flatten()[None] for k in ("obs", "next_obs", "actions"))
            sa = torch.cat([s, a], 1)
            target_q = min(3 * plain(agent.target_qf.network, sa, k).item() for k in (0, 1))
            u = target_q - 3 * plain(agent.vf, s).item()
            value.append((0.8 if u > 0 else 0.2) * u**2)
            follows = 1 - batch["terminations"][0, b].item()
            y = batch["rewards"][0, b].item()
            y += 0.99 * follows * 3 * plain(agent.vf, s2).item()
            for k in (0, 1):
                errors[k].append((3 * plain(agent.qf.network, sa, k).item() - y) ** 2)
            for i in range(2):
                its_t = torch.tensor([1e-3 + 0.999 * t[i, b, 0]])
                alpha, sigma = noise_schedule(its_t)
                its_z, prefix = torch.as_tensor(z[i, b])[None], batch["actions"][0, b][None]
                condition = torch.cat([batch["obs"][i, b][None], i * prefix], 1)
                x = alpha * batch["actions"][i, b] + sigma * its_z
                alone = made(1, dims=(OBS_DIM + ACTION_DIM, ACTION_DIM)).double().denoiser
                for p, many in zip(alone.parameters(), agent.denoiser.parameters(), strict=True):
                    p.copy_(many[i : i + 1])
                found = plain_denoiser(alone, x, condition, its_t)
                of_agent[i].append((found - its_z).square().sum().item())
    expected = {"vf_loss": [np.mean(value)] * 2, "denoiser_loss": np.mean(of_agent, 1)}
    expected |= {f"qf{k + 1}_loss": [np.mean(errors[k])] * 2 for k in (0, 1)}
    for name, each in expected.items():
        np.testing.assert_allclose(losses[f"losses/{name}"].numpy(), each, rtol=1e-5)


def test_v_is_an_expectile():
    """Of two equally likely values, 0 and 1: V = tau."""
    agent = made(1, dims=(1, 1), expectile=0.7, learning_rate=1e-2)
    set_critics(agent, lambda obs, actions: (actions[..., 0] > 0).float())
    obs = torch.zeros(1, 64, 1)
    for _ in range(100):
        actions = torch.where(torch.arange(64) % 2 == 0, 0.5, -0.5).view(1, 64, 1)
        batch = {"obs": obs, "next_obs": obs, "actions": actions}
        agent.update_critics(batch | {k: torch.zeros(1, 64) for k in ("rewards", "terminations")})
    assert agent.vf(obs[:, :1]).item() == pytest.approx(0.7, abs=0.03)


def test_without_a_score_policies_are_clones_weighted_by_the_teams_advantage():
    """Of two equally frequent joint actions, with Q - V = 0 and 1 and a ceiling of 100: a policy
    goes where the weighted squares are least."""
    for temperature, weight in ((0.0, 1.0), (2.0, np.exp(2)), (9.0, 100.0)):
        options = {"score": "none", "temperature": temperature, "learning_rate": 1e-2}
        agent = made(2, dims=(1, 1), policy_updates=400, offline_updates=401, **options)
        set_critics(agent, lambda obs, actions: (actions[..., 0] > 0).float())
        agent.vf = Function(lambda obs: torch.zeros(*obs.shape[:2], 1))
        agent.made += 1
        batch = {k: torch.zeros(2, 64, 1) for k in ("obs", "next_obs")}
        good = (torch.arange(64) % 2 == 0).view(1, 64, 1)
        batch["actions"] = torch.cat([torch.where(good, 0.5, -0.5), torch.where(good, -0.2, 0.3)])
        for _ in range(400):
            agent.update(batch, "policy")
        found = agent.policy(batch["obs"][:, :1]).flatten().tolist()
        expected = [(weight * 0.5 - 0.5) / (weight + 1), (weight * -0.2 + 0.3) / (weight + 1)]
        assert found == pytest.approx(expected, abs=0.01)


# --- Teams ---


def permuted(agent, other, p):
    """Give `other` the networks of `agent`, whose agent i is its agent p[i]."""
    N, inverse = len(p), np.argsort(p)

    def moved(start, dim):
        """Rows `start` ... of an input that has a part of size `dim` of every agent."""
        return (start + torch.arange(N * dim)).view(N, dim)[inverse].flatten()

    with torch.no_grad():
        for part in ("actor", "denoiser"):
            parts = (getattr(learner, part).parameters() for learner in (agent, other))
            for mine, its in zip(*parts, strict=True):
                its.copy_(mine[inverse])
        if agent.args.condition == "joint":
            rows = torch.arange(other.denoiser.inputs.weight.shape[1])
            seen = slice(ACTION_DIM, ACTION_DIM + N * OBS_DIM)
            rows[seen] = moved(ACTION_DIM, OBS_DIM)
            other.denoiser.inputs.weight.copy_(other.denoiser.inputs.weight[:, rows])
        rows = moved(0, OBS_DIM)
        other.vf.load_state_dict(agent.vf.state_dict())
        other.vf[0].weight.copy_(agent.vf[0].weight[:, rows])
        rows = torch.cat([rows, moved(N * OBS_DIM, ACTION_DIM)])
        for name in ("qf", "target_qf"):
            mine, its = getattr(agent, name).network, getattr(other, name).network
            its.load_state_dict(mine.state_dict())
            its[0].weight.copy_(mine[0].weight[:, rows])


@pytest.mark.parametrize("prefix", ["before", "after"])
@pytest.mark.parametrize("condition", ["local", "joint"])
def test_agents_permuted_with_their_data_give_permuted_results(monkeypatch, prefix, condition):
    p = [2, 0, 1]  # agent i of the one team is agent p[i] of the other
    inverse, options = np.argsort(p), {"prefix": prefix, "condition": condition}
    agent, other = (made(3, **options, order=o).double() for o in ("index", "2,0,1"))
    permuted(agent, other, p)
    ends = []
    for learner, rows in ((agent, lambda x: x), (other, lambda x: x[inverse])):
        Noise(monkeypatch, rows)
        for number in range(12):
            batch = {k: rows(v) for k, v in double(team_batch(3, seed=number)).items()}
            losses = learner.update(batch, "model" if number < 6 else "policy")
        its = [losses[f"losses/{name}"] for name in ("denoiser_loss", "score_drive", "policy_q")]
        ends.append([p.detach() for p in learner.actor.parameters()] + its)
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one[inverse], two, rtol=1e-6, atol=1e-9)
        assert one[0].numel() == 1 or not torch.allclose(one, two)


@pytest.mark.parametrize("score", ["decomposed", "independent", "joint", "none"])
@pytest.mark.parametrize("prefix", ["before", "after"])
def test_a_team_trains_in_the_stack_as_it_does_alone(monkeypatch, score, prefix):
    options = {"score": score, "prefix": prefix, "dropout": 0.1}
    stack, alone = made(2, 3, **options).double(), made(2, 1, **options).double()
    pairs = [
        (one, by_group(name, many.detach(), 3)[2])
        for one, (name, many) in zip(alone.parameters(), stack.named_parameters(), strict=True)
    ]
    with torch.no_grad():
        for one, many in pairs:
            one.copy_(many)

    for learner, seeds in ((stack, 3), (alone, 1)):
        numbers = np.random.default_rng(0)

        def draw(x, numbers=numbers, seeds=seeds, uniform=False):
            size = (x.shape[0] // seeds, *x.shape[1:])
            found = numbers.random(size) if uniform else numbers.normal(size=size)
            return torch.as_tensor(found).repeat(seeds, *[1] * (x.dim() - 1))

        monkeypatch.setattr(torch, "randn_like", draw)
        monkeypatch.setattr(torch, "rand_like", lambda x, draw=draw: draw(x, uniform=True))
        for number in range(12):
            batch = double(team_batch(2, 3, seed=number))
            batch["rewards"][:4] *= 10
            batch = {k: v[-2 * seeds :] for k, v in batch.items()}
            learner.update(batch, "model" if number < 6 else "policy")
    for one, many in pairs:
        torch.testing.assert_close(one.detach(), many, rtol=1e-7, atol=1e-9)


def test_after_their_own_update_agents_move_one_by_one(monkeypatch):
    """The first moves as if all moved at once, the second sees where it went."""
    ends, seen = [], []
    for prefix in ("before", "after"):
        agent, batch = made(2, prefix=prefix, beta=0.0), team_batch(2)
        drives, kept = agent.drives, []

        def noted(obs, actions, drives=drives, kept=kept):
            kept.append(actions.clone())
            torch.manual_seed(7)
            return drives(obs, actions)

        monkeypatch.setattr(agent, "drives", noted)
        agent.update(batch, "policy")
        ends.append([p.detach() for p in agent.actor.parameters()])
        seen.append(kept)
    (at_once,), (first, second) = seen
    assert torch.equal(at_once, first)
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])
    for before, after in zip(*ends, strict=True):
        assert torch.equal(before[0], after[0])
    assert any(not torch.equal(before[1], after[1]) for before, after in zip(*ends, strict=True))


@pytest.mark.parametrize("score", ["decomposed", "independent", "joint"])
def test_weights_of_the_padding_do_not_matter(score):
    """Of an agent with one joint beside one with two: bit for bit, whoever sees them."""
    replay, results = Replay(uneven_team(), 1, 0, 1), []
    for shaken in (False, True):
        agent = made(2, score=score, normalize_q=True)
        agent.take_own(replay)
        agent.measure_scales(replay)
        with torch.no_grad():
            for weight in (agent.actor[-1].weight, agent.actor[-1].bias):
                weight[0, :, 1] += shaken
            for part in (agent.denoiser.head.weight, agent.denoiser.head.bias):
                part[0, :, 1] += shaken
            agent.denoiser.inputs.weight[0, 1] += shaken
            if score == "decomposed":  # agent 0's second joint, as agent 1 is told of it
                agent.denoiser.inputs.weight[1, ACTION_DIM + OBS_DIM + 1] += shaken
            for qf in (agent.qf, agent.target_qf):
                qf.network[0].weight[:, 2 * OBS_DIM + 1] += shaken
        torch.manual_seed(1)
        found = []
        for number in range(10):
            index = replay.draw_offline(16)[:1].repeat(2, 1)
            losses = agent.update(replay.gather(index), "model" if number < 5 else "policy")
            found += [value.clone() for value in losses.values()]
        acted = agent.act(replay.gather(index)["obs"])
        assert (acted[0, :, 1] == 0).all() and (acted[1, :, 1] != 0).any()
        results.append([*found, acted])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def exact_learner(score, seeds, **options):
    """Stage 2 by the exact scores of the bandit's data and its reward."""
    agent = made(
        2, seeds, dims=(5, 1), env="bandit-2", score=score, learning_rate=5e-3,
        policy_updates=200, **options,
    )  # fmt: skip

    def denoise(noised, condition, t, training):
        if score == "joint":
            return exact_noise(noised, t, 0.0)
        log_odds = torch.zeros_like(noised)
        if score == "decomposed":
            log_odds[1::2] = 160 * condition[1::2, :, 5:]
        return exact_noise(noised.unsqueeze(-1), t.unsqueeze(-1), log_odds.unsqueeze(-1))[..., 0]

    agent.denoiser = Function(denoise)
    set_critics(agent, lambda obs, actions: actions.prod(2))
    return agent


@pytest.mark.parametrize("score", ["decomposed", "independent", "joint"])
def test_by_exact_scores_policies_come_to_rest_where_the_exact_drives_vanish(score):
    """From where agents disagree, decomposed and joint ones come to agree, independent ones
    stay."""
    seeds = 4
    agent = exact_learner(score, seeds, beta=0.3)
    obs = torch.ones(2 * seeds, 32, 5)
    agent.made.fill_(agent.model_updates)
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.copy_(torch.tensor([-0.4, 0.3]).repeat(seeds).view(-1, 1, 1).atanh())
    batch = {"obs": obs, "next_obs": obs, "actions": obs[..., :1]}
    for _ in range(200):
        agent.update(batch, "policy")
    ends = agent.act(obs[:, :1]).view(seeds, 2)
    rest = exact_end(ends, score, "ratio", (0.02, 0.2), 0.3, steps=60).float()
    torch.testing.assert_close(ends, rest, rtol=0, atol=0.06)
    reward = ends.prod(1)
    assert (reward < -0.5).all() if score == "independent" else (reward > 0.5).all()


# --- Runs ---


def test_time_limits_are_no_ends_unless_asked(data):
    """The tiny task's episodes end by the limit of 20 steps alone."""
    replay = Replay(load(ENV, str(data)), 2, 0, 1)
    assert replay.terminations.sum() == 0
    end_at_timeouts(replay)
    expected = torch.zeros(1000)
    expected[19::20] = 1
    assert torch.equal(replay.terminations[0], expected)


def test_an_end_stays_one_with_time_limits():
    team = random_team(50)
    team.next_obs[:-1] = team.obs[1:]
    replay = Replay(team, 1, 0, 1)
    before = replay.terminations.clone()
    end_at_timeouts(replay)
    assert torch.equal(replay.terminations[0, :-1], before[0, :-1]) and before.sum() > 0


def test_presets_hold_unless_given():
    assert preset(Args(env="simple-spread-random")) == OTHERWISE | PRESETS["simple-spread-random"]
    found = preset(Args(env="bandit-2", beta=0.0, t_max=0.5))
    assert found["beta"] == 0 and found["t_max"] == 0.5 and found["score_weight"] == "ratio"
    assert preset(Args(env="halfcheetah-medium")) == OTHERWISE
    for options in PRESETS.values():
        assert set(options) <= set(OTHERWISE)


@pytest.mark.parametrize("kind", ["model", "policy"])
@pytest.mark.parametrize(
    "options", [{}, {"score": "joint"}, {"score": "none"}, {"prefix": "after", "dropout": 0.1}]
)
def test_an_update_can_be_captured(kind, options):
    """It never waits for the host, makes tensors on its own device only, and what it reads and
    writes stays where it is."""
    replay = Replay(random_team(num_agents=3), 2, 0, 1)
    agent = made(3, 2, **options)
    agent.measure_scales(replay)

    def update():
        index = replay.draw_offline(16)[::3].repeat_interleave(3, dim=0)
        return agent.update(replay.gather(index), kind)

    for _ in range(3):
        update()
    before = addresses(agent, replay)
    for _ in range(3):
        with torch.device("meta"), Watch():
            losses = update()
        assert all(value.device.type == "cpu" for value in losses.values())
    assert addresses(agent, replay) == before
