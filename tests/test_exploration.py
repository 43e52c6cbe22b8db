"""Sequential exploration: one agent at a time, for exactly M steps, and never when evaluated."""

import csv

import numpy as np
import pytest
import torch

from tests.helpers import ACTION_DIM, OBS_DIM, every_otc_script, make, only, run, scalars, tiny
from tests.tiny_task import ENV


@every_otc_script
def test_exploring_is_random_in_the_box_and_leaves_the_learner_as_it_is(script):
    torch.manual_seed(1)
    options = {"epsilon": 0.5} if script == "otc_cql_discrete" else {}
    agent, _ = make(script, G=3, **options)
    before = {k: v.clone() for k, v in agent.named_parameters()}
    obs = torch.randn(3, 400, OBS_DIM)
    first, second, exploited = agent.explore(obs), agent.explore(obs), agent.act(obs)
    assert first.shape == exploited.shape == (3, 400, ACTION_DIM)
    assert first.min() >= -1 and first.max() <= 1
    assert (first - second).abs().mean(dim=(1, 2)).min() > 0.01
    assert all(torch.equal(v, before[k]) for k, v in agent.named_parameters())


@pytest.mark.parametrize("script", ["otc_td3bc", "omar"])
def test_gaussian_exploration_has_its_standard_deviation(script):
    torch.manual_seed(1)
    agent, _ = make(script, G=2, exploration_noise=0.05)
    obs = torch.randn(2, 5000, OBS_DIM)
    noise = agent.explore(obs) - agent.act(obs)  # fresh policies are far from the box's bounds
    assert noise.mean().item() == pytest.approx(0, abs=0.002)
    assert noise.std().item() == pytest.approx(0.05, rel=0.03)


@every_otc_script
def test_a_run_that_explores_judges_its_policies_without(
    tmp_path,
    monkeypatch,
    data,  # noqa: F811
    script,
):
    common = ["--env", ENV, "--dataset", data, *tiny(script), "--sampling", "uniform"]
    run(monkeypatch, script, *common, "--run-dir", tmp_path / "none")
    run(monkeypatch, script, *common, "--run-dir", tmp_path / "some", "--exploration", "sequential")
    tables = []
    for where in ("none", "some"):
        with (only(tmp_path / where) / "returns.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    plain, explored = tables
    assert "exploring_return" not in plain[0]
    assert [row["env_steps"] for row in explored] == ["0", "60", "120"]
    assert [row["episodes"] for row in explored] == ["10"] * 3  # evaluations
    assert [row["exploring_episodes"] for row in explored] == ["3", "3", "0"]
    returns = [float(row["exploring_return"]) for row in explored]
    assert returns[0] < 0 and returns[1] < 0 and np.isnan(returns[2])
    assert returns[0] != float(explored[0]["mean_return"])
    tag = scalars(only(tmp_path / "some"))["charts/exploring_return"]
    assert list(tag.values()) == pytest.approx(returns[:2])
    for where, expected in (("none", [-1] * 120), ("some", ([0] * 30 + [1] * 30) * 2)):
        checkpoint = torch.load(only(tmp_path / where) / "checkpoint.pt", weights_only=True)
        assert checkpoint["replay"]["explorer"].tolist() == [expected]
