"""Stacks of networks: twins in one stack, and many rows on a CPU."""

import importlib

import numpy as np
import pytest
import torch

from common import strategies
from common.nets import Stack, TwinCritic, mlp
from common.replay import Replay
from tests.helpers import (
    WITH_OTC,
    WITH_SCALES,
    add_deployment,
    make,
    plain_mlp,
    random_team,
    set_scales,
    twins,
)


def at_once(stack, x):
    """A stack's output by the products of all groups at once."""
    return torch.nn.Sequential.forward(stack, x if x.dim() == 3 else x.flatten(0, 1))


@pytest.mark.parametrize("out_features", [1, 3])
def test_many_rows_give_what_few_give_and_the_same_gradients(out_features, monkeypatch):
    """A CPU's path for many rows, group by group, and the products of all groups at once."""
    torch.manual_seed(0)
    network, x = mlp(3, 4, 256, out_features).double(), torch.randn(3, 700, 4).double()
    with torch.no_grad():
        expected = at_once(network, x)
        of_one = at_once(network, x[:1].repeat(3, 1, 1))
        with monkeypatch.context() as context:  # the other path alone
            context.setattr(torch.nn.Sequential, "forward", None)
            found = network(x)
            torch.testing.assert_close(network(x[:1].expand(3, 1, -1, -1)), of_one)
    assert found.shape == (3, 700, out_features)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    x.requires_grad_()
    gradients = []
    for y in (network(x), at_once(network, x)):
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *network.parameters()]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for g in range(3):
        by_hand = plain_mlp(network, x[g, 5].detach().numpy(), g)
        np.testing.assert_allclose(found[g, 5].numpy(), by_hand, rtol=1e-10)


@pytest.mark.parametrize("rows", [8, 10_100])
def test_twins_are_two_critics_from_starts_of_their_own(rows):
    torch.manual_seed(0)
    critic = TwinCritic(3, 4, 2, 16)
    torch.manual_seed(0)  # the same starts as of two networks one after another
    starts = [mlp(3, 6, 16, 1) for _ in range(2)]
    obs, actions = torch.randn(3, rows, 4), torch.randn(3, rows, 2)
    both = critic(obs, actions)
    assert both.shape == (2, 3, rows)
    torch.testing.assert_close(critic.first(obs, actions), both[0])
    with torch.no_grad():  # many rows then take another path
        torch.testing.assert_close(critic(obs, actions), both)
        torch.testing.assert_close(critic.first(obs, actions), both[0])
    for q, network in zip(both, starts, strict=True):
        torch.testing.assert_close(q, network(torch.cat([obs, actions], dim=2)).squeeze(2))
    # one half's gradient stays its own
    both[0].sum().backward()
    first, second = (p.grad for half in twins(_Holder(critic)) for p in (half.network[0].weight,))
    assert first.abs().max() > 0 and (second == 0).all()


@pytest.mark.parametrize("rows", [5, 4000])
def test_a_stack_of_another_number_of_networks_is_refused(rows):
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        mlp(6, 4, 64, 2)(torch.randn(2, rows, 4))


class _Holder:
    def __init__(self, qf):
        self.qf = qf


@pytest.mark.parametrize("script", WITH_OTC)
def test_the_distance_is_that_of_the_products_of_all_groups_at_once(script, monkeypatch):
    """Values of 700 candidates and 800 references by the path for many rows, in float64, where no
    rounding decides between neighbours. Not their draw: a rounding decides which of the candidates
    that match themselves comes first."""
    replay = Replay(random_team(2000), 2, 1, 900)
    add_deployment(replay)
    for name in ("obs", "next_obs", "actions", "rewards", "terminations"):
        setattr(replay, name, getattr(replay, name).double())
    torch.manual_seed(0)
    agent, _ = make(script, 4, candidates=700, references=800, sampling="otc", distance="value")
    agent = agent.double()
    if script in WITH_SCALES:
        set_scales(agent)
    strategy = strategies.make(replay, agent.args, importlib.import_module(script).OTC)
    index = replay.draw_merged(700), replay.draw_latest(800)
    distances = []
    for forward in (Stack.forward, at_once):
        monkeypatch.setattr(Stack, "forward", forward)
        torch.manual_seed(1)
        distances.append(strategy.transition_distance(agent, *index))
    assert distances[0].std() > 1e-3
    torch.testing.assert_close(*distances, rtol=1e-11, atol=1e-12)
