"""The ICQ learner, against brute force and tasks whose solution is known."""

import numpy as np
import pytest
import torch

from common.replay import Replay
from icq import ICQ, Args, batch_softmax
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    central_difference,
    plain_mlp,
    random_batch,
    random_team,
    set_scales,
    twins,
)


def followed_batch(G, size=16, seed=0):
    """Some rows end their episode, some have no following action for another reason."""
    batch = random_batch(G, size, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    batch["next_actions"] = torch.rand(G, size, ACTION_DIM, generator=generator) * 2 - 1
    cut = torch.rand(G, size, generator=generator) < 0.3
    batch["is_followed"] = ((batch["terminations"] == 0) & ~cut).float()
    assert 0 < batch["is_followed"].mean() < 1
    return batch


def test_the_softmax_has_mean_one_over_the_masked_entries():
    values = torch.tensor([[0.0, np.log(3.0), 500.0], [1.0, 2.0, 3.0]]).float()
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.5, 1.5, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(batch_softmax(values, mask), expected)
    same = batch_softmax(torch.full((1, 5), 1e4), torch.ones(1, 5))
    torch.testing.assert_close(same, torch.ones(1, 5))


def losses_by_hand(agent, batch, sampled, g, constants=None):
    """Group g's losses in float64, row by row; `sampled` are the policy's actions. `constants`
    holds targets and weights, which take no gradient, as they were found before."""
    args, data = agent.args, {key: value[g].double().numpy() for key, value in batch.items()}
    mean, std = (b[g].double().numpy() for b in (agent.obs_mean, agent.obs_std))
    size = len(data["rewards"])
    s, s2 = ((data[key] - mean) / std for key in ("obs", "next_obs"))

    def q(qf, s, a):
        return plain_mlp(qf.network, np.concatenate([s, a]), g)[0]

    def smaller(first, second, s, a):
        return min(q(first, s, a), q(second, s, a))

    live = twins(agent)
    if constants is None:
        rows = [b for b in range(size) if data["is_followed"][b]]
        target = twins(agent, "target_qf")
        following = {b: smaller(*target, s2[b], data["next_actions"][b]) for b in rows}
        total = sum(np.exp(v / args.target_temperature) for v in following.values())
        y = agent.reward_scale.item() * data["rewards"]
        for b, v in following.items():
            weight = len(rows) * np.exp(v / args.target_temperature) / total
            y[b] += args.gamma * min(weight, 1) * v
        advantage = [
            smaller(*live, s[b], data["actions"][b]) - smaller(*live, s[b], sampled[g, b].numpy())
            for b in range(size)
        ]
        weights = np.exp(np.array(advantage) / args.temperature)
        constants = y, size * weights / weights.sum()
    y, weights = constants
    known = [b for b in range(size) if data["is_followed"][b] or data["terminations"][b]]
    log_std = agent.actor.log_std[g, 0].detach().double().numpy()
    log_probs = []
    for b in range(size):
        x = (data["actions"][b] - np.tanh(plain_mlp(agent.actor.network, s[b], g))) / np.exp(
            log_std
        )
        log_probs.append(np.sum(-0.5 * x**2 - log_std - 0.5 * np.log(2 * np.pi)))
    errors = [
        np.mean([(q(qf, s[b], data["actions"][b]) - y[b]) ** 2 for b in known]) for qf in live
    ]
    losses = {"losses/qf1_loss": errors[0], "losses/qf2_loss": errors[1]}
    return losses | {"losses/actor_loss": -np.mean(weights * np.array(log_probs))}, constants


def test_losses_and_gradients_equal_a_brute_force_without_batches(monkeypatch):
    torch.manual_seed(0)
    args = Args(hidden_size=16, tau=0.0, temperature=0.3, target_temperature=0.5)
    args.actor_learning_rate = args.critic_learning_rate = 0.0
    agent, groups = ICQ(3, OBS_DIM, ACTION_DIM, args).double(), range(3)
    set_scales(agent)
    agent.reward_scale.fill_(0.3)
    with torch.no_grad():
        for p in agent.target.parameters():
            p += 0.1 * torch.randn_like(p)
    batch = {key: value.double() for key, value in followed_batch(3).items()}
    sampled, sample = [], type(agent.actor).sample

    def kept(*args):
        sampled.append(sample(*args).detach())
        return sampled[-1]

    with monkeypatch.context() as patch:
        patch.setattr(type(agent.actor), "sample", kept)
        losses = agent.update(batch)
    (sampled,) = sampled
    by_hand = [losses_by_hand(agent, batch, sampled, g) for g in groups]
    for g, (expected, _) in enumerate(by_hand):
        for name, value in expected.items():
            assert losses[name][g].item() == pytest.approx(value, rel=1e-8), name
    names = ("actor", "qf1", "qf2")
    for name, part in zip(names, (agent.actor, *twins(agent)), strict=True):
        parameters = list(part.parameters())
        for g in groups:
            direction = [torch.zeros_like(p) for p in parameters]
            for d in direction:
                d[g] = torch.randn_like(d[g])

            def loss(name=name, g=g):
                values, _ = losses_by_hand(agent, batch, sampled, g, by_hand[g][1])
                return values[f"losses/{name}_loss"]

            slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
            expected = central_difference(parameters, direction, loss)
            assert slope.item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_rows_where_the_data_breaks_off_teach_the_critics_nothing():
    ends = []
    for spoil in (False, True):
        torch.manual_seed(0)
        agent = ICQ(2, OBS_DIM, ACTION_DIM, Args(hidden_size=16))
        batch = followed_batch(2)
        broken = (batch["is_followed"] == 0) & (batch["terminations"] == 0)
        if spoil:
            batch["rewards"][broken] = 1e3
            batch["next_actions"][broken] = 1.0
        agent.update(batch)
        ends.append([p.detach() for p in agent.live.parameters()])
    assert all(map(torch.equal, *ends))


def test_a_bandit_ends_in_its_closed_form_and_each_group_in_its_own():
    """Uniform actions, reward k a: the policy is the best Gaussian fit to exp(k a / temperature) on
    [-1, 1], whose mean is coth(x) - 1/x, x = k / temperature."""
    torch.manual_seed(0)
    args = Args(temperature=0.5, hidden_size=32, actor_learning_rate=5e-3)
    args.critic_learning_rate = 5e-3
    agent, slopes = ICQ(2, 1, 1, args), torch.tensor([1.0, -0.5]).view(2, 1)
    chosen = []
    for i in range(700):
        obs, actions = torch.randn(2, 128, 1), torch.rand(2, 128, 1) * 2 - 1
        batch = {"obs": obs, "actions": actions, "rewards": slopes * actions.squeeze(2)}
        batch |= {"next_obs": obs, "next_actions": actions, "is_followed": torch.zeros(2, 128)}
        agent.update(batch | {"terminations": torch.ones(2, 128)})
        if i >= 500:
            chosen.append(agent.act(torch.linspace(-1, 1, 21).view(1, 21, 1).expand(2, -1, -1)))
    x = (slopes / 0.5).double()
    expected = (1 / torch.tanh(x) - 1 / x).float().view(2, 1, 1)
    assert ((torch.stack(chosen).mean(0) - expected).abs().mean((1, 2)) < 0.06).all()


def test_values_are_those_of_the_following_actions():
    """Two states in turn, reward 1 in the first after action 1 alone: with a target temperature so
    high that the data's actions count alike, Q is the data policy's, geometric in gamma."""
    torch.manual_seed(0)
    args = Args(gamma=0.5, tau=0.1, hidden_size=32, target_temperature=1e6)
    args.critic_learning_rate = args.actor_learning_rate = 3e-3
    agent = ICQ(1, 1, 1, args)
    for _ in range(1200):
        actions, next_actions = (torch.randint(2, (1, 128, 1)) * 2.0 - 1 for _ in range(2))
        batch = {"obs": torch.ones(1, 128, 1), "next_obs": torch.ones(1, 128, 1)}
        batch |= {"actions": actions, "rewards": (actions.squeeze(2) > 0).float()}
        batch |= {"next_actions": next_actions, "is_followed": torch.ones(1, 128)}
        agent.update(batch | {"terminations": torch.zeros(1, 128)})
    # V = 0.5 + 0.5 V = 1, so Q = 0.5 and 1.5; the smaller of twins lies a little below
    q = agent.q_value(torch.ones(1, 2, 1), torch.tensor([[[-1.0], [1.0]]]))
    torch.testing.assert_close(q, torch.tensor([[0.5, 1.5]]), rtol=0, atol=0.12)


def test_data_that_is_not_in_order_is_noted(capsys):
    team = random_team()
    for in_order in (False, True):
        if in_order:
            team.obs[1:] = team.next_obs[:-1]
        ICQ(2, OBS_DIM, ACTION_DIM, Args()).measure_scales(Replay(team, 1, 0, 1))
        assert ("are followed by their episode's next one" in capsys.readouterr().err) != in_order


def test_the_unit_of_the_rewards_does_not_matter_unless_a_scale_is_given():
    kept = {}
    for reward_scale in (None, 1.0):
        for unit in (1.0, 50.0):
            torch.manual_seed(0)
            team = random_team()
            team.rewards *= unit
            replay = Replay(team, 1, 0, 1)
            agent = ICQ(2, OBS_DIM, ACTION_DIM, Args(reward_scale=reward_scale))
            agent.measure_scales(replay)
            losses = agent.update(replay.gather_following(replay.draw_offline(32)))
            kept[reward_scale, unit] = losses["losses/qf1_loss"]
    torch.testing.assert_close(kept[None, 1.0], kept[None, 50.0], rtol=0.01, atol=0)
    assert (kept[1.0, 50.0] > 100 * kept[1.0, 1.0]).all()
