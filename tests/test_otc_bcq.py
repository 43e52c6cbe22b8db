"""The BCQ learner."""

import numpy as np
import pytest
import torch

from otc_bcq import BCQ, Args
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    plain_mlp,
    random_batch,
    twins,
)


def test_losses_equal_a_brute_force_without_batches(monkeypatch):
    """Every loss of one update in float64 loops over groups, states and decoded actions."""
    torch.manual_seed(0)
    args = Args(learning_rate=0.0, tau=0.0, num_target_actions=3)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, args)
    # Targets of their own, so that a live network in their place would show
    with torch.no_grad():
        for p in agent.target.parameters():
            p += 0.1 * torch.randn_like(p)
    batch = random_batch(2, size=4)
    noise = []
    draw = torch.randn
    draw_like = torch.randn_like

    def kept(maker):
        def make(*a, **k):
            noise.append(maker(*a, **k))
            return noise[-1]

        return make

    monkeypatch.setattr(torch, "randn", kept(draw))
    monkeypatch.setattr(torch, "randn_like", kept(draw_like))
    losses = agent.update(batch)
    encoder_noise, target_noise, actor_noise = [n.double().numpy() for n in noise]

    data = {key: value.double().numpy() for key, value in batch.items()}
    for g in range(2):
        vae, kl, q1_loss, q2_loss, actor_loss = [], [], [], [], []
        for b in range(4):
            s, a = data["obs"][g, b], data["actions"][g, b]
            latent = plain_mlp(agent.vae.encoder, np.concatenate([s, a]), g)
            mean, log_std = latent[:4], np.clip(latent[4:], -4, 15)
            z = mean + np.exp(log_std) * encoder_noise[g, b]
            decoded = np.tanh(plain_mlp(agent.vae.decoder, np.concatenate([s, z]), g))
            vae.append(np.mean((decoded - a) ** 2))
            kl.append(np.mean(-0.5 * (1 + 2 * log_std - mean**2 - np.exp(2 * log_std))))

            best, s2 = -np.inf, data["next_obs"][g, b]
            for c in range(3):
                z = np.clip(target_noise[g, 3 * b + c], -0.5, 0.5)
                a2 = np.tanh(plain_mlp(agent.vae.decoder, np.concatenate([s2, z]), g))
                shift = np.tanh(plain_mlp(agent.target_actor.network, np.concatenate([s2, a2]), g))
                a2 = np.clip(a2 + 0.05 * shift, -1, 1)
                values = [
                    plain_mlp(qf.network, np.concatenate([s2, a2]), g)[0]
                    for qf in twins(agent, "target_qf")
                ]
                best = max(best, 0.75 * min(values) + 0.25 * max(values))
            y = data["rewards"][g, b] + 0.99 * (1 - data["terminations"][g, b]) * best
            pair = np.concatenate([s, a])
            q1_loss.append((plain_mlp(twins(agent)[0].network, pair, g)[0] - y) ** 2)
            q2_loss.append((plain_mlp(twins(agent)[1].network, pair, g)[0] - y) ** 2)

            z = np.clip(actor_noise[g, b], -0.5, 0.5)
            a = np.tanh(plain_mlp(agent.vae.decoder, np.concatenate([s, z]), g))
            shift = np.tanh(plain_mlp(agent.actor.network, np.concatenate([s, a]), g))
            pair = np.concatenate([s, np.clip(a + 0.05 * shift, -1, 1)])
            actor_loss.append(-plain_mlp(twins(agent)[0].network, pair, g)[0])
        expected = {
            "losses/vae_reconstruction": vae,
            "losses/vae_kl": kl,
            "losses/qf1_loss": q1_loss,
            "losses/qf2_loss": q2_loss,
            "losses/actor_loss": actor_loss,
        }
        for name, values in expected.items():
            assert losses[name][g].item() == pytest.approx(np.mean(values), rel=1e-4), name


def test_a_bandit_is_solved_and_each_group_solves_its_own():
    """Reward -(a - 0.3 g)^2 on uniform actions: the best action is known, +0.3 and -0.3."""
    torch.manual_seed(0)
    agent = BCQ(2, OBS_DIM, 1, Args(learning_rate=1e-3))
    best = torch.tensor([0.3, -0.3]).view(2, 1, 1)
    for _ in range(600):
        obs, actions = torch.randn(2, 128, OBS_DIM), torch.rand(2, 128, 1) * 2 - 1
        rewards = -(actions - best).square().squeeze(2)
        ones = torch.ones(2, 128)
        batch = {"obs": obs, "actions": actions, "rewards": rewards, "terminations": ones}
        agent.update(batch | {"next_obs": obs})
    chosen = agent.act(torch.randn(2, 200, OBS_DIM))
    assert ((chosen - best).abs().mean((1, 2)) < 0.1).all()
