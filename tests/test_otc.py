"""OTC's draw, which every script holds a copy of, and what it is compared with; on BCQ."""

import copy

import numpy as np
import pytest
import torch

from common import sampler, strategies
from common.replay import Replay
from otc_bcq import BCQ, OTC, Args
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    add_deployment,
    array,
    assert_frequencies,
    assert_same,
    only,
    plain_mlp,
    random_team,
    run,
    state_of,
    tiny,
)
from tests.tiny_task import ENV


def strategy_of(replay, args):
    return strategies.make(replay, args, OTC)


@pytest.mark.parametrize("value_mean", ["matches", "references"])
@pytest.mark.parametrize("distance", ["embedding", "value", "two-stage", "raw", "residual"])
def test_transition_distance_equals_its_definition(distance, value_mean):
    torch.manual_seed(0)
    sizes = {"num_value_actions": 1, "references": 30, "candidates": 20, "embedding_dim": 4}
    args = Args(distance=distance, value_mean=value_mean, **sizes)
    replay = Replay(random_team(), 2, 2, 40)
    agent = BCQ(4, OBS_DIM, ACTION_DIM, args)
    agent.value = lambda obs: obs.sum(2) + 2.0  # known, and without noise
    transitions = strategy_of(replay, args)
    for k in (1, 2):
        add_deployment(replay, seed=k)
        replay.terminations[0, 600:] = (torch.rand(160) < 0.3).float()
        transitions.start_deployment(agent, k)
    b, d = replay.draw_merged(20), replay.draw_latest(30)
    found = transitions.transition_distance(agent, b, d)
    B, D, num_ends = replay.gather(b), replay.gather(d), 0
    with torch.no_grad():
        for g in range(4):
            if distance in ("two-stage", "raw", "residual"):
                (e, next_e), (e_star, next_e_star) = (
                    spaces_by_hand(transitions.embedding, distance, replay, x, g) for x in (B, D)
                )
                match = (e[:, None] - e_star[None]).abs().sum(2).argmin(1)
                expected = (next_e - next_e_star[match]).abs().sum(1)
            elif distance == "embedding":
                e = transitions.embedding.encode(B["obs"], B["actions"], B["next_obs"])[0][g]
                e_star = transitions.embedding.encode(D["obs"], D["actions"], D["next_obs"])[0][g]
                expected = (e[:, None] - e_star[None]).abs().sum(2).min(1).values
            else:
                q = agent.q_value(B["obs"], B["actions"])[g]
                q_star = agent.q_value(D["obs"], D["actions"])[g]
                v, v_star = (agent.value(x["next_obs"])[g] for x in (B, D))
                match = (q[:, None] - q_star[None]).abs().argmin(1)
                ends = (B["terminations"][g] > 0) | (D["terminations"][g][match] > 0)
                if value_mean == "references":
                    v_star_mean = v_star[D["terminations"][g] == 0].mean()
                else:
                    v_star_mean = v_star[match][~ends].mean()
                expected = (v / v[~ends].mean() - v_star[match] / v_star_mean).abs()
                # Not ranked: somewhere among the others' distances
                num_ends += int(ends.sum())
                assert (found[g][ends] <= 2 * expected[~ends].max()).all()
                expected[ends] = found[g][ends]
            torch.testing.assert_close(found[g], expected, rtol=1e-4, atol=1e-5)
    assert num_ends > 5 or distance != "value"


def spaces_by_hand(space, distance, replay, batch, g):
    """e(s, a_i) and e(s') of a batch's transitions of group g, from their definitions."""
    offline = replay.obs[:, :600].flatten(0, 1)
    mean, std = offline.mean(0), offline.std(0, correction=0)
    s, s_next = ((batch[name][g] - mean) / std for name in ("obs", "next_obs"))
    a = batch["actions"][g] / replay.actions[g % 2, :600].std(0, correction=0)
    pair = torch.cat([s, a], dim=1)
    if distance == "raw":
        return pair, s_next
    if distance == "residual":
        change = batch["next_obs"][g] - batch["obs"][g]
        scale = (replay.next_obs - replay.obs)[:, :600].flatten(0, 1).std(0, correction=0)
        expected = torch.as_tensor(plain_mlp(space.model, pair.numpy(), g)).float()
        return s, change / scale - expected
    found = []
    for encoder, x in zip(space.encoders, (pair, s_next), strict=True):
        for layer in (0, 2, 4):
            x = x @ encoder[layer].weight[g] + encoder[layer].bias[g]
            x = x if layer == 4 else x.relu()
        found.append(x[:, :4])
    return found


def test_two_stage_learns_to_tell_states_apart_and_each_group_for_itself():
    """Reconstruction falls far below the variance of what is encoded, which is 1 per dimension."""
    torch.manual_seed(0)
    args = Args(distance="two-stage", embedding_learning_rate=3e-3, embedding_dim=6)
    replay = Replay(random_team(), 2, 1, 40)
    space = strategy_of(replay, args).embedding
    losses = [space.update(replay.gather(replay.draw_offline(128))) for _ in range(600)]
    first, last = (x["losses/embedding_reconstruction"] for x in (losses[0], losses[-1]))
    assert (first > 1.7).all() and (last < 0.7).all()
    state, batch, found = space.state_dict(), replay.gather(replay.draw_offline(16)), []
    for factor in (1, 1e3):
        other = strategy_of(replay, args).embedding
        other.load_state_dict(copy.deepcopy(state))
        batch["next_obs"][1] *= factor
        torch.manual_seed(1)
        other.update(batch)
        found.append([parameter.detach() for parameter in other.parameters()])
    same = torch.tensor(
        [[bool((x[g] == y[g]).all()) for g in range(4)] for x, y in zip(*found, strict=True)]
    )
    assert same[:, [0, 2, 3]].all() and not same[:, 1].all()


def test_pi0_is_the_same_whatever_comes_after(tmp_path, monkeypatch, data):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--finetune-updates", "2"]
    states = []
    for number, flags in enumerate(
        ("uniform", "balanced", "otc --distance embedding", "otc --distance two-stage", "otc")
    ):
        folder = tmp_path / str(number)
        run(monkeypatch, "otc_bcq", *argv, "--run-dir", folder, "--sampling", *flags.split())
        states.append(state_of(only(folder) / "offline.pt"))
        for part in ("agent", "rng"):
            assert_same(states[0][part], states[-1][part])


def test_a_mix_has_its_share_of_online_data():
    torch.manual_seed(0)
    replay = Replay(random_team(), 2, 4, 40)
    for given, k, share in (
        (0.3, 1, 0.3),
        (0.0, 2, 0.0),
        # of 512 candidates 512 * 120 / 720 = 85 are online
        (None, 3, np.sum(1 / np.arange(1, 86)) / np.sum(1 / np.arange(1, 513))),
    ):
        add_deployment(replay, seed=k)
        strategy = strategy_of(replay, Args(sampling="mixed", online_share=given))
        strategy.start_deployment(None, k)
        index = torch.cat([strategy.draw(None) for _ in range(100)], dim=1)
        assert abs(replay.is_online(index).float().mean().item() - share) < 0.01
        for g in range(4):  # uniform within both
            is_online = replay.is_online(index[g])
            if given is None:
                assert_frequencies(array(index[g][is_online]) - 600, np.ones(120))
            assert_frequencies(array(index[g][~is_online]), np.ones(600))


def test_a_mix_follows_what_an_embedding_draw_amounts_to():
    """Its default share is that of a draw in which all online candidates come first."""
    torch.manual_seed(0)
    replay = Replay(random_team(), 2, 4, 40)
    for k in (1, 2, 3, 4):
        add_deployment(replay, seed=k)
        mix = strategy_of(replay, Args(sampling="mixed"))
        mix.start_deployment(None, k)
        found = []
        for _ in range(50):
            candidates = replay.draw_merged(512)
            distance = torch.rand(candidates.shape) + ~replay.is_online(candidates)
            picked = sampler.draw_by_rank(distance, torch.ones(4), 128)
            found.append(replay.is_online(candidates.gather(1, picked)).float().mean().item())
        assert abs(np.mean(found) - mix.share.item()) < 0.01


def test_a_failed_deployment_does_not_make_low_values_rank_first():
    """Online values far below the offline ones: the draw does not turn to what is worth little."""
    torch.manual_seed(0)
    args = Args(references=200, candidates=512)
    replay = Replay(random_team(n=4000), 1, 1, 200)
    add_deployment(replay)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, args)
    # Q(s, a) = V(s') = 50 + 10 obs[0] offline, and 30 less online
    online = torch.zeros(replay.num_rows, dtype=torch.bool)
    online[replay.num_offline :] = True
    replay.obs[0, :, 0] = 50 + 10 * replay.obs[0, :, 0] - 30 * online
    replay.next_obs[0, :, 0] = replay.obs[0, :, 0]
    agent.q_value = lambda obs, actions: obs[..., 0]
    agent.value = lambda obs: obs[..., 0]
    transitions = strategy_of(replay, args)
    drawn = [replay.gather(transitions.draw(agent))["next_obs"][..., 0] for _ in range(20)]
    usual = replay.gather(replay.draw_merged(5000))["next_obs"][..., 0].mean()
    assert abs(torch.cat(drawn, 1).mean() - usual) < 8  # 24 with a mean over all of D


@pytest.mark.parametrize("value_of_ends", [0.0, 1e3])
def test_ends_are_drawn_as_often_as_chance_would(value_of_ends):
    """V of a state from which nothing follows says nothing, whatever it is."""
    torch.manual_seed(0)
    args = Args(references=200, candidates=512, adaptive_alpha=False, alpha=2.0)
    replay = Replay(random_team(n=4000), 1, 1, 200)
    add_deployment(replay)
    replay.terminations[0] = (torch.rand(replay.num_rows) < 0.1).float()
    replay.next_obs[0, :, 0] = torch.where(
        replay.terminations[0] > 0, value_of_ends, 5 + torch.rand(replay.num_rows)
    )
    agent = BCQ(2, OBS_DIM, ACTION_DIM, args)
    agent.q_value = lambda obs, actions: obs[..., 0]
    agent.value = lambda obs: obs[..., 0]
    transitions = strategy_of(replay, args)
    drawn = [replay.gather(transitions.draw(agent))["terminations"] for _ in range(300)]
    assert abs(torch.cat(drawn).mean() - replay.terminations.mean()) < 0.02


def test_a_match_that_ends_its_episode_does_not_rank_its_candidate():
    """Half of the candidates have the Q of online ends, whose V is like theirs or unlike anything;
    the others' matches agree a bit. Neither shall come first."""
    torch.manual_seed(0)
    args = Args(references=200, candidates=512, adaptive_alpha=False, alpha=2.0)
    replay = Replay(random_team(n=4000), 1, 1, 200)
    add_deployment(replay)
    side = (torch.rand(replay.num_rows) < 0.5).float()
    replay.obs[0, :, 0] = side  # Q
    replay.terminations[0, :4000] = 0
    replay.terminations[0, 4000:] = side[4000:]
    for value_of_ends in (5.5, 1e3):
        replay.next_obs[0, :, 0] = 5 + torch.rand(replay.num_rows)
        replay.next_obs[0, 4000:, 0] += side[4000:] * (value_of_ends - 5.5)
        agent = BCQ(2, OBS_DIM, ACTION_DIM, args)
        agent.q_value = lambda obs, actions: obs[..., 0]
        agent.value = lambda obs: obs[..., 0]
        transitions = strategy_of(replay, args)
        drawn = [replay.gather(transitions.draw(agent))["obs"][..., 0] for _ in range(300)]
        assert abs(torch.cat(drawn).mean() - 0.5) < 0.03


def test_self_matches_have_distance_zero_unless_excluded():
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 1, 40)
    add_deployment(replay)
    latest = replay.draw_latest(40)
    for exclude in (False, True):
        args = Args(distance="embedding", exclude_self_matches=exclude)
        transitions = strategy_of(replay, args)
        transitions.start_deployment(None, 1)
        distance = transitions.transition_distance(None, latest, latest)
        assert (distance > 1e-4).all() if exclude else (distance < 1e-4).all()


@pytest.mark.parametrize("distance", ["embedding", "value", "two-stage", "raw", "residual"])
def test_a_self_match_is_excluded_whatever_the_distance(distance):
    """What is its own match changes where it may not be one, and nothing else does."""
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 1, 40)
    replay.terminations.zero_()  # ends are drawn by chance
    add_deployment(replay)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, Args(num_value_actions=1))
    agent.value = lambda obs: obs.sum(2) + 20.0
    latest, offline = replay.draw_latest(40), replay.draw_offline(40)
    found = []
    for exclude in (False, True):
        args = Args(distance=distance, exclude_self_matches=exclude, value_mean="references")
        torch.manual_seed(1)
        transitions = strategy_of(replay, args)
        transitions.start_deployment(agent, 1)
        both = torch.cat([latest, offline], dim=1)
        found.append(transitions.transition_distance(agent, both, latest))
    own, other = (torch.stack(found)[..., part] for part in (slice(40), slice(40, 80)))
    assert (own[0] < 1e-4).all() or distance == "value"  # whose V are over two means
    assert ((own[1] - own[0]).abs() > 1e-4).float().mean() > 0.95
    torch.testing.assert_close(other[0], other[1])


@pytest.mark.parametrize(("alpha", "replacement"), [(0.0, True), (1.0, True), (2.0, False)])
def test_a_draw_follows_the_ranks_of_distances_to_the_latest_data(monkeypatch, alpha, replacement):
    """Equation (3), of candidates whose distances are known; references are D^2's, each once."""
    torch.manual_seed(0)
    sizes = {"candidates": 40, "references": 30, "batch_size": 20}
    replay = Replay(random_team(), 1, 2, 40)
    for k in (1, 2):
        add_deployment(replay, seed=k)
    transitions = strategy_of(replay, Args(alpha=alpha, replacement=replacement, **sizes))
    monkeypatch.setattr(replay, "draw_merged", lambda n: torch.arange(n).flip(0).expand(2, n))
    references = []

    def distance(agent, candidates, latest):
        references.append(latest)
        return candidates.float()

    monkeypatch.setattr(transitions, "transition_distance", distance)
    drawn = torch.stack([transitions.draw(None) for _ in range(400)])  # (400, G, 20): ranks less 1
    references = torch.stack(references)
    assert references.shape == (400, 2, 30)
    assert references.min() == 640 and references.max() == 679
    assert all(len(set(its)) == 30 for its in references[:, 0].tolist())
    for g in range(2):
        if replacement:
            assert_frequencies(drawn[:, g], np.arange(1, 41) ** -alpha)
        else:
            assert all(len(set(its)) == 20 for its in drawn[:, g].tolist())
            assert (drawn[:, g] == 0).any(1).float().mean() > 0.95


def test_alpha_has_its_ceiling(monkeypatch):
    replay = Replay(random_team(), 1, 2, 40)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, Args())
    monkeypatch.setattr(sampler, "adapt_alpha", lambda alpha, *_: 3 * alpha)
    for most, expected in ((None, 1.5), (1.25, 1.25)):
        transitions = strategy_of(replay, Args(alpha=0.5, alpha_max=most, distance_candidates=200))
        for k in (1, 2):
            add_deployment(replay, seed=k)
            transitions.start_deployment(agent, k)
            assert (transitions.alpha == (expected if k == 2 else 0.5)).all()
        replay.num_online.zero_()


def test_alpha_telescopes_over_deployments():
    """Equation (4): after K deployments alpha is the last mean distance over the first."""
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 4, 40)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, Args())
    transitions = strategy_of(replay, Args(distance_candidates=200))
    distances = []
    for k in range(1, 5):
        add_deployment(replay, seed=k)
        transitions.start_deployment(agent, k)
        distances.append(transitions.mean_distance.clone())
    torch.testing.assert_close(transitions.alpha, distances[-1] / distances[0])


def test_the_mean_distance_is_exact_where_all_data_enters_it():
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 1, 40)
    add_deployment(replay)
    transitions = strategy_of(replay, Args(distance="embedding", distance_candidates=640))
    transitions.start_deployment(None, 1)
    data = replay.gather(torch.arange(640).expand(2, -1))
    with torch.no_grad():
        e, _ = transitions.embedding.encode(data["obs"], data["actions"], data["next_obs"])
    nearest = (e[:, :, None] - e[:, None, 600:]).abs().sum(3).min(2).values
    torch.testing.assert_close(transitions.mean_distance, nearest.mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampling", ["otc", "uniform", "balanced", "online", "offline"])
def test_strategies_draw_what_they_say(sampling):
    torch.manual_seed(0)
    args = Args(sampling=sampling, batch_size=64, candidates=100, references=30)
    replay = Replay(random_team(), 1, 2, 40)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, args)
    transitions = strategy_of(replay, args)
    for k in (1, 2):
        add_deployment(replay, seed=k)
        transitions.start_deployment(agent, k)
    draws = [replay.is_online(transitions.draw(agent)).float().mean() for _ in range(50)]
    share = torch.stack(draws).mean()
    expected = {"uniform": 80 / 680, "online": 1, "offline": 0}
    if sampling in expected:
        assert share.item() == pytest.approx(expected[sampling], abs=0.02)
    elif (
        sampling == "balanced"
    ):  # half the mass at first; here, where the ratio is 1, less and less
        assert draws[0].item() == pytest.approx(0.5, abs=0.15)
        assert 80 / 680 < share < 0.4
    else:  # self-matches come first
        assert share > 1.2 * 80 / 680


def test_balanced_replay_prefers_what_looks_online():
    """Offline data of two clusters, online data in one of them."""
    torch.manual_seed(0)
    team = random_team(n=1000)
    team.obs[:500] += 4.0
    replay = Replay(team, 1, 1, 100)
    random = np.random.default_rng(0)
    obs = (random.normal(size=(1, 100, 2, OBS_DIM)) + 4.0).astype(np.float32)
    actions = random.uniform(-1, 1, (1, 100, 2, ACTION_DIM)).astype(np.float32)
    replay.add(obs, actions, np.zeros((1, 100)), obs, np.zeros((1, 100), bool))
    transitions = strategy_of(replay, Args(sampling="balanced"))
    transitions.start_deployment(None, 1)
    for _ in range(200):
        index = transitions.draw(None)
    offline = index[index < 1000]
    assert (offline < 500).float().mean() > 0.75
