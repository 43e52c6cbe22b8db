"""benchmarks.tabular_team: the exact values, and what its draws see."""

import numpy as np
import pytest
import torch

from benchmarks import tabular_team as team
from common import InputError


def test_a_step_and_its_reward_by_hand():
    def cell(x, y):
        return torch.tensor(13 * x + y)

    up, left, stay = (torch.tensor(i) for i in (2, 4, 0))
    assert team.follow(cell(5, 5), up, left, 2) == cell(3, 3)
    assert team.follow(cell(5, 5), up, up, 2) == cell(1, 5)
    assert team.follow(cell(1, 0), up, left, 2) == cell(0, 0)  # clipped
    assert team.follow(cell(5, 5), stay, left, 1) == cell(5, 4)
    paid = [(x, y) for x in range(13) for y in range(13) if team.reward(cell(x, y)) > 0]
    assert sorted(paid) == [(9, 10), (10, 9), (10, 10), (10, 11), (11, 10)]


@pytest.mark.parametrize("kind", ["arbitrary", "smooth"])
def test_exact_values_solve_bellmans_equations(kind):
    partner = team.partner_of(kind)
    q = team.exact_q(torch.eye(5).double()[partner], 2)
    cells = torch.arange(169)
    for a in range(5):
        s_next = team.follow(cells, torch.full_like(cells, a), partner, 2)
        right = team.reward(s_next) + 0.9 * q[s_next].amax(1)
        torch.testing.assert_close(q[:, a], right, rtol=0, atol=1e-9)
    assert team.exact_return(q, partner, 2).item() == pytest.approx(q.amax(1).mean().item())
    wrong = team.exact_q(torch.full((169, 5), 0.2).double(), 2)
    assert team.exact_return(wrong, partner, 2) < team.exact_return(q, partner, 2)


def test_learning_moves_a_pair_as_many_updates_would():
    q = torch.zeros(1, 169, 5).double()
    s_next = 13 * 10 + 10  # pays 1, and is worth nothing yet
    batch = torch.tensor([[[3, 3, 3, 7]], [[1, 1, 1, 2]], [[s_next] * 4], [[0] * 4]])
    team.learn(q, batch, 0.2)
    assert q[0, 3, 1].item() == pytest.approx(1 - 0.8**3)
    assert q[0, 7, 2].item() == pytest.approx(0.2) and (q != 0).sum() == 2


def test_residuals_are_the_partners_share_of_the_step():
    """Away from the walls: twice its move less the mean of all, which is none."""
    args = team.Args(num_seeds=2, offline=200_000)
    data = team.Data(args, torch.Generator().manual_seed(0))
    some = data.all[:, :, :4000]
    xy = team.CELLS[some[0]]
    inside = ((xy >= 4) & (xy <= 8)).all(2)
    found, expected = data.residual(some)[inside], 2 * team.MOVES[some[3]][inside]
    assert (found - expected).abs().max() < 0.6 and (found - expected).abs().mean() < 0.15


@pytest.mark.parametrize("name", [*team.DISTANCES, "uniform", "online", "offline", "mixed0.5"])
def test_every_strategy_trains(name):
    args = team.Args(num_seeds=2, offline=2000, deployments=2, deployment_steps=60,
                     finetune_updates=3, references=50)  # fmt: skip
    found = team.train(f"{name}@1" if name in team.DISTANCES else name, args)
    assert all(x.shape == (2,) and np.isfinite(x).all() for x in found.values())
    shares = {"online": 1.0, "offline": 0.0, "mixed0.5": 0.5}
    if name in shares:
        assert found["online"] == pytest.approx(shares[name], abs=0.15)
    if name == "oracle":  # a fifth of the data is as today
        assert (found["as_today"] > 0.6).all()


def test_unknown_strategies_are_refused():
    with pytest.raises(InputError, match="unknown strategy 'orcale@1': did you mean oracle@1"):
        team.main(team.Args(("orcale@1",)))
    for name in ("oracle", "oracle@x", "oracle@-1", "mixedfoo", "mixed1.5", "mixed"):
        with pytest.raises(InputError, match=f"unknown strategy '{name}'"):
            team.main(team.Args((name,)))
    with pytest.raises(InputError, match="--references 500: more than --deployment-steps 400"):
        team.main(team.Args(deployment_steps=400))
