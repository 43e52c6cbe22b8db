"""Discrete CQL: legal actions alone are chosen, valued and penalised; the dead teach nothing."""

import math

import numpy as np
import pytest
import torch

import otc_cql_discrete as script
from common.datasets import TeamDataset
from common.replay import Replay
from tests.helpers import central_difference, plain_mlp, scaled, twins

A, FEATURES = 4, 3
OBS = FEATURES + A
G, BATCH = 2, 24


def make(num_groups=G, **options):
    torch.manual_seed(0)
    args = script.Args(hidden_size=8, **options)
    return script.DiscreteCQL(num_groups, OBS, A, args)


def observations(shape, generator, dead=0.2):
    """Random features and masks; of the living at least one action is legal."""
    features = torch.randn(*shape, FEATURES, generator=generator)
    legal = torch.rand(*shape, A, generator=generator) < 0.5
    legal[..., 0] |= ~legal.any(-1)
    legal &= torch.rand(*shape, 1, generator=generator) >= dead
    return torch.cat([features, legal.float()], dim=-1)


def random_batch(seed=0, dead=0.2, size=BATCH):
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = (observations((G, size), generator, dead) for _ in range(2))
    noise = torch.rand(G, size, A, generator=generator)
    return {
        "obs": obs,
        "next_obs": next_obs,
        "actions": script.one_hot_argmax(noise, obs[..., -A:] > 0),
        "rewards": torch.randn(G, size, generator=generator),
        "terminations": (torch.rand(G, size, generator=generator) < 0.2).float(),
    }


def with_scales(agent):
    with torch.no_grad():
        agent.obs_mean += torch.randn(OBS)
        agent.obs_std += torch.rand(OBS)
    return agent


def brute_force(agent, batch):
    """The losses as the equations say, in float64, one transition and one action at a time."""
    args, result = agent.args, {"qf1_loss": [], "qf2_loss": [], "gap": []}
    live, target = ([q.network for q in twins(agent, name)] for name in ("qf", "target_qf"))
    for g in range(G):
        errors, gaps = [[], []], []
        for row in range(batch["obs"].shape[1]):
            obs, next_obs, a, reward, ended = (
                batch[key][g, row].double().numpy()
                for key in ("obs", "next_obs", "actions", "rewards", "terminations")
            )
            legal, next_legal = np.flatnonzero(obs[-A:]), np.flatnonzero(next_obs[-A:])
            if len(legal) == 0:
                continue
            y = reward
            if len(next_legal) and not ended:
                x = scaled(agent, next_obs, g)
                q = [plain_mlp(net, x, g) for net in live]
                best = max(next_legal, key=lambda i: min(q[0][i], q[1][i]))
                y = reward + args.gamma * min(plain_mlp(net, x, g)[best] for net in target)
            for i, net in enumerate(live):
                q = plain_mlp(net, scaled(agent, obs, g), g)
                errors[i].append((q[a.argmax()] - y) ** 2)
                gaps.append(math.log(sum(math.exp(q[j]) for j in legal)) - q[a.argmax()])
        result["qf1_loss"].append(np.mean(errors[0]))
        result["qf2_loss"].append(np.mean(errors[1]))
        result["gap"].append(np.mean(gaps))
    return result


def test_losses_equal_a_float64_brute_force():
    agent, batch = with_scales(make()), random_batch()
    with torch.no_grad():  # targets of their own
        for parameter in agent.target.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = brute_force(agent, batch)
    losses = agent.update(batch)
    for name in ("qf1_loss", "qf2_loss"):
        np.testing.assert_allclose(losses[f"losses/{name}"], expected[name], rtol=1e-5)
    np.testing.assert_allclose(losses["losses/conservative_gap"], expected["gap"], rtol=1e-5)


def test_the_step_follows_the_gradient_of_the_whole_loss(monkeypatch):
    """Squared errors against a fixed target, and cql_alpha times the penalty of both critics."""
    agent, batch = make(cql_alpha=0.7).double(), random_batch(1)
    batch = {key: value.double() for key, value in batch.items()}
    taken = []
    monkeypatch.setattr(script, "step", lambda optimizer, loss: taken.append(loss))
    losses = agent.update(batch)
    parts = [losses[f"losses/{name}"] for name in ("qf1_loss", "qf2_loss")]
    expected = sum(parts) + 0.7 * 2 * losses["losses/conservative_gap"]
    torch.testing.assert_close(taken[0].detach().sum(0), expected)
    # and its gradient by differences: the target does not move with the live critics' values
    agent.target.load_state_dict(agent.live.state_dict())
    parameters = list(agent.live.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def loss():
        taken.clear()
        agent.update(batch)
        agent.target.load_state_dict(target)
        return float(taken[0].sum())

    target = {k: v.clone() for k, v in agent.target.state_dict().items()}
    agent.update(batch)
    gradients = torch.autograd.grad(taken[-1].sum(), parameters)
    agent.target.load_state_dict(target)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    assert central_difference(parameters, direction, loss, 1e-7) == pytest.approx(
        float(slope), rel=1e-4
    )


def poisoned(agent, legal_only):
    """The same learner with the largest values for what is illegal."""
    with torch.no_grad():
        for net in (*agent.live, *agent.target):
            net.network[-1].bias[..., legal_only] += 1e6
    return agent


def test_illegal_actions_are_never_chosen():
    agent = poisoned(make(epsilon=1.0), slice(2, 4))
    obs = observations((G, 500), torch.Generator().manual_seed(3))
    legal = obs[..., -A:] > 0
    for actions in (agent.act(obs), agent.explore(obs)):
        assert not (actions.bool() & ~legal).any()
        assert ((actions == 0) | (actions == 1)).all()
        assert torch.equal(actions.sum(2), legal.any(2).float())  # none of the dead


def test_exploring_is_uniform_over_the_legal_actions_epsilon_of_the_time():
    agent = poisoned(make(epsilon=0.3), slice(0, 1))  # greedy: action 0
    obs = torch.zeros(G, 20_000, OBS)
    obs[..., FEATURES:] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    share = agent.explore(obs).mean((0, 1))
    expected = torch.tensor([0.7 + 0.1, 0.0, 0.1, 0.1])
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)
    assert torch.equal(make(epsilon=0.0).explore(obs), make().act(obs))


def test_illegal_actions_enter_neither_a_target_nor_the_penalty():
    """Huge values of an action that is nowhere legal change nothing; of a legal one they do."""
    batch = random_batch(2)
    for key in ("obs", "next_obs"):
        batch[key][..., FEATURES + 3] = 0
        batch[key][..., FEATURES] = batch[key][..., FEATURES:].any(2)
    batch["actions"] = batch["obs"][..., FEATURES:] * torch.tensor([1.0, 0, 0, 0])
    names = ("losses/qf1_loss", "losses/qf2_loss", "losses/conservative_gap")
    plain = make().update(batch)
    huge = poisoned(make(), slice(3, 4)).update(batch)
    legal = poisoned(make(), slice(1, 2)).update(batch)
    for name in names:
        torch.testing.assert_close(huge[name], plain[name])
        assert (legal[name] > 1e3).all()


def test_a_gradient_never_reaches_an_illegal_action():
    agent, batch = make(), random_batch(4)
    values = torch.randn(2, G, BATCH, A, requires_grad=True)
    legal = batch["obs"][..., -A:] > 0
    gaps = agent.conservative_gap(values, (values * batch["actions"]).sum(3), legal)
    assert (gaps[:, ~legal.any(2)] == 0).all() and (gaps >= 0).all()
    gaps.sum().backward()
    assert values.grad.isfinite().all() and (values.grad[:, ~legal] == 0).all()
    assert values.grad[:, legal].abs().max() > 0


def test_the_dead_carry_no_loss_and_what_they_hold_does_not_matter():
    batch = random_batch(5)
    dead = ~(batch["obs"][..., -A:] > 0).any(2)
    assert 0 < dead.float().mean() < 1
    other = {key: value.clone() for key, value in batch.items()}
    other["rewards"][dead] = 1e6
    other["obs"][..., :FEATURES][dead] = 1e6
    other["next_obs"][dead] = random_batch(6)["next_obs"][dead]
    first, second = make(), make()
    losses, others = first.update(batch), second.update(other)
    for name in losses:
        torch.testing.assert_close(losses[name], others[name])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    # as if they were not there
    agent = make()
    for g in range(G):
        living = {key: value[g : g + 1, ~dead[g]] for key, value in batch.items()}
        pair = {key: torch.cat([value, value]) for key, value in living.items()}
        alone = make().update(pair)["losses/qf1_loss"][g]
        torch.testing.assert_close(alone, agent.update(batch)["losses/qf1_loss"][g])
        agent = make()


def test_a_batch_of_the_dead_changes_nothing():
    agent, batch = make(), random_batch(7, dead=1.0)
    before = {k: v.clone() for k, v in agent.live.state_dict().items()}
    losses = agent.update(batch)
    assert all(value.isfinite().all() and (value == 0).all() for value in losses.values())
    assert all(torch.equal(v, before[k]) for k, v in agent.live.state_dict().items())


def test_death_and_termination_end_the_bootstrap():
    batch = random_batch(8, dead=0.0)
    batch["rewards"][:] = 3.0
    agent = make()
    with torch.no_grad():
        for net in agent.live:  # Q = 3 everywhere, so that the loss is the bootstrap's
            net.network[-1].weight.zero_()
            net.network[-1].bias.fill_(3.0)
    batch["terminations"][:] = 0
    assert (agent.update(batch)["losses/qf1_loss"] > 1e-4).all()
    for name, value in (("terminations", 1.0), ("next_obs", 0.0)):
        agent = make()
        with torch.no_grad():
            for net in agent.live:
                net.network[-1].weight.zero_()
                net.network[-1].bias.fill_(3.0)
        ended = {**batch, name: torch.full_like(batch[name], value)}
        assert (agent.update(ended)["losses/qf1_loss"] == 0).all(), name


def test_values_are_of_the_greedy_action_and_zero_for_the_dead():
    agent = with_scales(make())
    obs = observations((G, 50), torch.Generator().manual_seed(9))
    q, best = torch.full((G, 50), -torch.inf), agent.value(obs)
    for action in range(A):
        one_hot = torch.nn.functional.one_hot(torch.tensor(action), A).float().expand(G, 50, A)
        legal = obs[..., FEATURES + action] > 0
        q = torch.where(legal, torch.maximum(q, agent.q_value(obs, one_hot)), q)
    dead = q.isinf()
    assert dead.any() and (best[dead] == 0).all()
    torch.testing.assert_close(best[~dead], q[~dead])


def test_agreement_is_the_share_of_greedy_actions_among_those_of_the_living():
    agent, batch = with_scales(make()), random_batch(seed=4)
    actions, alive = agent.act(batch["obs"]), batch["obs"][..., -A:].amax(2)
    same = (actions * batch["actions"]).sum(2)
    expected = (same * alive).sum(1) / alive.sum(1)
    assert ((expected > 0) & (expected < 1)).all()
    found = agent.update(batch)["losses/greedy_agreement"]
    torch.testing.assert_close(found, expected)


def test_it_learns_the_values_of_a_small_problem():
    """Two states: action 1 pays 1 and leads to death, action 2 pays 0.5 and stays; action 3 would
    pay most and is illegal. Without the penalty Q(s, 2) is 0.5 / (1 - gamma)."""
    agent = script.DiscreteCQL(
        1,
        1 + 3,
        3,
        script.Args(hidden_size=16, learning_rate=1e-2, tau=0.05, cql_alpha=0.0, gamma=0.5),
    )
    alive, dead = torch.tensor([1.0, 1, 1, 0]), torch.zeros(4)
    batch = {
        "obs": alive.expand(1, 3, 4),
        "actions": torch.eye(3)[None],
        "rewards": torch.tensor([[1.0, 0.5, 9.0]]),
        "next_obs": torch.stack([dead, alive, dead])[None],
        "terminations": torch.zeros(1, 3),
    }
    batch["actions"][0, 2] = torch.tensor([1.0, 0, 0])
    batch["rewards"][0, 2] = 1.0
    for _ in range(600):
        agent.update(batch)
    found = agent.q_value(batch["obs"][:, :2], torch.eye(3)[None, :2])
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0]]), atol=0.02, rtol=0)


# --- Replay ---


def team(n=40, num_agents=3, seed=0):
    random = np.random.default_rng(seed)
    obs = random.normal(size=(n, num_agents, OBS)).astype(np.float32)
    legal = random.random((n, num_agents, A)) < 0.7
    legal[..., 0] |= ~legal.any(-1)
    legal &= random.random((n, num_agents, 1)) < 0.6
    obs[..., FEATURES:] = legal
    actions = np.eye(A, dtype=np.float32)[legal.argmax(-1)] * legal.any(-1, keepdims=True)
    return TeamDataset(
        obs=obs,
        actions=actions,
        rewards=np.arange(n, dtype=np.float32),
        next_obs=obs + 0.5,
        terminations=np.zeros(n, bool),
        truncations=np.zeros(n, bool),
        source="random",
        discrete=True,
    )


def test_an_agents_dead_rows_stand_for_its_living_ones():
    data, S, M = team(), 2, 20
    replay = Replay(data, S, 2, M)
    online = [team(M, seed=s) for s in (1, 2)]

    def add(replay):
        names = ("obs", "actions", "next_obs", "terminations")
        arrays = {name: np.stack([getattr(x, name) for x in online]) for name in names}
        rewards = np.stack([100 * (s + 1) + x.rewards for s, x in enumerate(online)])
        replay.add(**arrays, rewards=rewards)

    add(replay)
    restored = Replay(data, S, 2, M)
    restored.load_state_dict(replay.state_dict())
    index = torch.arange(40 + M).expand(S * 3, -1)
    for each in (replay, restored):
        batch = each.gather(index)
        for g in range(S * 3):
            seed, agent = divmod(g, 3)
            rewards = batch["rewards"][g]
            for rows, source, first in (
                (slice(0, 40), data, 0),
                (slice(40, None), online[seed], 1),
            ):
                alive = source.obs[:, agent, FEATURES:].any(1)
                living = source.rewards[alive] + first * 100 * (seed + 1)
                found = rewards[rows].numpy()
                own = source.rewards + first * 100 * (seed + 1)
                assert (found[alive] == own[alive]).all()  # the living stand for themselves
                assert set(found[~alive]) <= set(living)
                times = np.unique(found[~alive], return_counts=True)[1]
                assert times.max() <= math.ceil((~alive).sum() / alive.sum())  # evenly
        assert (batch["obs"][..., FEATURES:].any(2)).all()


def test_an_agents_death_ends_its_transition_and_no_other_agents():
    data = team(num_agents=2)
    data.obs[..., FEATURES] = 1  # all live
    data.next_obs[..., FEATURES:] = 1
    data.next_obs[7, 0, FEATURES:] = 0
    data.terminations[9] = True
    index = torch.arange(40).expand(2, -1)
    ends = Replay(data, 1, 1, 5).gather(index)["terminations"]
    assert torch.nonzero(ends).tolist() == [[0, 7], [0, 9], [1, 9]]


def test_where_nobody_dies_rows_stand_for_themselves():
    data = team()
    data.discrete = False
    replay = Replay(data, 1, 1, 5)
    assert replay.stand_ins is None
    index = torch.arange(40).expand(3, -1)
    assert (replay.gather(index)["rewards"] == torch.arange(40)).all()
