"""benchmarks.correction: the simulator's next states, whose actions are compared, and a world in
which everything is known."""

import csv

import numpy as np
import pytest
import torch

from benchmarks import bcq_parts, correction, oracle
from common import sampler, strategies
from common.datasets import TeamDataset, load
from common.envs import make_vec
from common.replay import Replay
from otc_bcq import BCQ, OTC, Args
from tests.helpers import (
    ACTION_DIM,
    OBS_DIM,
    add_deployment,
    random_batch,
    random_team,
    run,
    tiny,
)
from tests.tiny_task import ENV


@pytest.mark.parametrize(
    ("env", "split"),
    [
        ("halfcheetah-medium", None),
        ("hopper-medium", None),
        ("walker2d-random", "6x1"),
        ("halfcheetah-local-random", None),
        ("ant-random", None),
        ("ant-local-random", None),
        ("predator-prey-random", None),
        ("cooperative-navigation-3-random", None),
    ],
)
def test_logged_actions_lead_to_the_logged_next_states(tmp_path, monkeypatch, env, split):
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path))
    data = load(env, "built-in", 300, split, False)
    task = correction.datasets.parse_env(env)[0]
    N = data.actions.shape[1]
    obs = np.broadcast_to(data.obs, (300, N, data.obs.shape[2]))
    actions = make_vec(task, 1, 0, split).to_box(data.actions)
    found = correction.simulator(task, split)(obs, actions)
    error = np.abs(found - data.next_obs) / data.next_obs.std(0).clip(1e-3)
    # Velocities beyond 10 are clipped in what hopper and walker observe
    clips = "hopper" in env or "walker" in env
    seen = (np.abs(data.obs) < 9.999).all((1, 2)) | (not clips)
    assert seen.sum() > 50 and error[seen].max() < 1e-3
    assert np.abs(found[0] - data.obs[0]).max() > 1e-3


def test_the_winds_simulator_has_its_policy():
    at, actions = np.array([[[0.3, -0.2]]], np.float32), np.zeros((1, 1, 2), np.float32)
    found = correction.simulator("wind", None)(at, actions)[0, 0]
    np.testing.assert_allclose(
        found - at[0, 0], 0.15 * np.array([np.cos(-0.6), np.sin(1.9)]), atol=1e-6
    )


def test_tasks_with_a_hidden_state_have_no_simulator():
    assert correction.simulator("navigation", None) is None  # its force is not observed
    assert correction.simulator("reacher-full", None) is None  # angles are seen as cosines
    assert correction.simulator(ENV, None) is None


def test_everybody_acts_on_what_he_sees_himself():
    """Three agents that see different things: each action says whose it is, and what it saw."""
    n, N, S = 40, 3, 2
    values = np.arange(n * N).reshape(n, N, 1).astype(np.float32)
    dataset = TeamDataset(
        obs=values, next_obs=values, actions=np.zeros((n, N, 1), np.float32),
        rewards=np.zeros(n, np.float32), terminations=np.zeros(n, bool),
        truncations=np.zeros(n, bool), source="",
    )  # fmt: skip
    replay = Replay(dataset, S, 1, 5)

    class Agent:
        def act(self, obs):
            return obs + 1000 * torch.arange(S * N).view(-1, 1, 1)

    index = torch.stack([torch.randperm(n) for _ in range(S * N)])
    found = correction.present_actions(Agent(), replay, index, size=7)
    for g in range(S * N):
        for j in range(N):
            other = (g + j) % N
            expected = values[index[g], other, 0] + 1000 * (g // N * N + other)
            assert (found[g, :, j, 0].numpy() == expected).all()
    ordered = correction.in_order(found, N)
    assert ((ordered[..., 0] // 1000).long() % N == torch.arange(N)).all()
    assert torch.equal(correction.own_first(ordered, N), found)


# --- A world of four states, two actions and a partner with two ---


NEXT = np.array([[[1, 2], [3, 0]], [[2, 3], [0, 2]], [[3, 0], [1, 0]], [[0, 1], [2, 1]]])
PARTNER = np.array([0.9, 0.8, 0.1, 0.2])  # online: of its second action, per state; in the data .5


def world(n, partner, random, k=None):
    s, a = random.integers(0, 4, n), random.integers(0, 2, n)
    b = (random.random(n) < partner[s]).astype(int)
    obs, next_obs = np.eye(4, dtype=np.float32)[[s, NEXT[s, a, b]]]
    actions = np.stack([2 * a - 1, 2 * b - 1], 1)[..., None].astype(np.float32)
    return obs[:, None], actions, np.zeros(n, np.float32), next_obs[:, None], np.zeros(n, bool)


def kl_of_drawn(weights, replay, index):
    """The paper's objective for agent 0: KL of today's transitions from those that are drawn, a
    mean over (s, a_i)."""
    batch = replay.gather(index)
    s, s_next = (batch[name][0].argmax(1).numpy() for name in ("obs", "next_obs"))
    a = (batch["actions"][0, :, 0] > 0).long().numpy()
    drawn = np.zeros((4, 2, 4))
    np.add.at(drawn, (s, a, s_next), weights[0].numpy())
    drawn /= drawn.sum(2, keepdims=True)
    total = 0.0
    for s, a in np.ndindex(4, 2):
        for b, p in ((0, 1 - PARTNER[s]), (1, PARTNER[s])):
            total += p * np.log(p / drawn[s, a, NEXT[s, a, b]]) / 8
    return total


def divergences() -> dict[str, float]:
    """{draw: KL at alpha 1}, and "exact", that of a distance that sees with endless minibatches.

    Matches have the same (s, a_i), and the match's next state is one of today's: a candidate's
    distance is 0 with the probability that its s' has today. The rest is arithmetic."""
    torch.manual_seed(0)
    random, B = np.random.default_rng(0), 40_000
    obs, actions, rewards, next_obs, ends = world(B, np.full(4, 0.5), random)
    dataset = TeamDataset(obs, actions, rewards, next_obs, ends, ends, "")
    replay = Replay(dataset, 1, 1, 4000)
    each = [x[None] for x in world(4000, PARTNER, random)]
    each[0], each[3] = (np.repeat(x, 2, axis=2) for x in (each[0], each[3]))
    replay.add(*each)
    index, latest = replay.draw_offline(512 * 60), replay.latest()
    kls, alpha = {}, torch.ones(2)
    for name, options in correction.DISTANCES.items():
        args = Args(distance_candidates=500, embedding_learning_rate=3e-3, **options)
        strategy, agent = strategies.make(replay, args, OTC), BCQ(2, 4, 1, args)
        if strategy.embedding is not None and strategy.embedding.optimizer is not None:
            for _ in range(400):
                strategy.embedding.update(replay.gather(replay.draw_offline(128)))
        strategy.start_deployment(agent, 1)
        parts = index.split(512, dim=1)
        orders = [torch.randperm(4000)[:2000].expand(2, -1) for _ in parts]
        weights = [
            correction.weights_of(
                strategy.transition_distance(agent, part, latest.gather(1, order))
                + 1e-4 * torch.rand(part.shape),  # ties in random order
                part, 1.0,
            )
            for part, order in zip(parts, orders, strict=True)
        ]  # fmt: skip
        kls[name] = kl_of_drawn(torch.cat(weights, 1), replay, index)
    uniform = kl_of_drawn(correction.weights_of(None, index, 1.0), replay, index)

    p = np.stack([1 - PARTNER, PARTNER], 1)  # (4, 2): today's, of what follows each partner action
    law = sampler.rank_probabilities(alpha[:1], 512)[0].numpy()
    hits = round(512 * (p * 0.5).sum(1).mean())
    near, far = law[:hits].mean(), law[hits:].mean()
    drawn = p * near + (1 - p) * far
    drawn /= drawn.sum(1, keepdims=True)
    return {"uniform": uniform, **kls, "exact": (p * np.log(p / drawn)).sum(1).mean()}


def test_who_sees_the_next_state_corrects_the_dynamics_as_far_as_ranks_can():
    kls, p = divergences(), np.stack([1 - PARTNER, PARTNER], 1)
    uniform, exact = kls["uniform"], kls["exact"]
    assert uniform == pytest.approx((p * np.log(p / 0.5)).sum(1).mean(), abs=0.01)
    assert exact < 0.2 * uniform
    assert kls["raw"] == pytest.approx(exact, abs=0.015)
    assert kls["two-stage"] < 0.5 * uniform and kls["residual"] < 0.2 * uniform
    # One mean for both hardly looks at s', and untrained values know nothing
    assert kls["embedding"] > 0.8 * uniform and kls["value"] > 3 * exact


# --- The tool ---


def test_a_run_is_measured(tmp_path, monkeypatch, data, capsys):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--distance", "embedding"]
    argv += ["--run-dir", tmp_path / "runs", "--num-seeds", 2, "--save-policies"]
    run(monkeypatch, "otc_bcq", *argv)
    first = sorted((tmp_path / "runs").iterdir())[0]
    path = tmp_path / "found.csv"
    args = correction.Args([str(first)], at=(1, 2), draws=2, embedding_updates=5, csv=str(path))
    with pytest.raises(correction.InputError, match="do not fit"):
        monkeypatch.setattr(correction, "simulator", lambda task, split: lambda obs, _: obs)
        correction.main(args)
    monkeypatch.setattr(correction, "simulator", lambda task, split: None)
    correction.main(args)
    assert f"| otc_bcq | {ENV} | otc-embedding | 1 | oracle |" in capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert {row["run"] for row in rows} == {str(first)}
    draws = ["uniform", *correction.DISTANCES, "nearest (s, a)", "oracle"]
    assert len(rows) == 2 * 2 * 2 * len(draws) and {row["draw"] for row in rows} == set(draws)
    for row in rows:
        measured = ("dev", "own_dev", "value", "td_error", "reward")
        assert np.isfinite([float(row[k]) for k in measured]).all() and float(row["td_error"]) > 0
        assert row["auc"] == row["disc"] == "nan" and 0 <= float(row["online"]) <= 1
    for name in ("k", "seed", "agent"):
        assert len({row[name] for row in rows}) == 2
    dev = {d: np.mean([float(r["dev"]) for r in rows if r["draw"] == d]) for d in draws}
    assert min(dev, key=dev.get) == "oracle"


def test_a_figure_divides_by_the_uniform_draw_of_the_same_run(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    names = {"env": ENV, "strategy": "uniform", "k": 1, "seed": 1, "agent": 0}
    rows = [
        names | {"run": run, "draw": draw, "dev": level * share, "disc": np.nan, "auc": np.nan}
        for run, level in (("one", 1.0), ("ten", 10.0))
        for draw, share in (("uniform", 1.0), ("oracle", 0.5))
    ]
    lines = []
    monkeypatch.setattr(Figure, "savefig", lambda its, *_, **__: lines.extend(its.axes[0].lines))
    correction.draw_figure(rows, str(tmp_path / "figure.png"))
    found = [line.get_xdata() for line in lines if line.get_marker() == "."]
    np.testing.assert_allclose(found, [[1.0, 1.0], [0.5, 0.5]])


def test_todays_transitions_are_each_agents_own():
    """Written beside the data, with the same (s, a_i) and other next states; the data stays."""
    torch.manual_seed(0)
    moment = object.__new__(correction.Moment)
    replay = moment.replay = Replay(random_team(), 2, 3, 100)
    moment.steps = 100
    for k in (1, 2):
        add_deployment(replay, k)
    before = replay.state_dict()
    index = replay.draw_merged(30)
    next_obs = torch.randn(4, 30, 2, OBS_DIM)
    rows = moment.write_down(index, next_obs)
    logged, now = replay.gather(index), replay.gather(rows)
    for name in ("obs", "actions", "rewards"):
        assert torch.equal(logged[name], now[name])
    assert torch.equal(now["next_obs"], next_obs[:, :, 0]) and now["actions"].shape[2] == ACTION_DIM
    for name, value in replay.state_dict().items():
        assert torch.equal(value, before[name])


# --- Fine-tuning by the oracle ---


@pytest.mark.parametrize("only_offline", [False, True])
def test_the_oracle_ranks_by_what_the_deployed_others_do_now(only_offline):
    torch.manual_seed(0)
    data, S, N = random_team(400, num_agents=3), 2, 3
    replay = Replay(data, S, 2, 100)
    add_deployment(replay)
    G = S * N
    agent, args = BCQ(G, OBS_DIM, ACTION_DIM, Args(references=20)), Args(references=20)
    draw = oracle.oracle(OTC, only_offline)(replay, args)
    draw.start_deployment(agent, 1)
    deployed = draw.deployed[0]
    assert deployed.args.num_act_actions == oracle.ACT_ACTIONS
    # As if its actions hung on nothing but whose they are
    own = 0.1 * torch.arange(G).view(G, 1, 1)
    deployed.act = lambda obs: own.expand(G, obs.shape[1], ACTION_DIM)
    agent.act = None  # the policies that are tuned now are not asked
    index = replay.draw_merged(300)
    found = draw.transition_distance(agent, index, None)
    expected = torch.zeros_like(found)
    for g in range(G):
        others = [other for other in range(g // N * N, g // N * N + N) if other != g]
        for other in others:
            actions = replay.gather(index[g].expand(G, -1))["actions"][other]
            # The same rows, of this seed's online data
            expected[g] += (actions - own[other]).square().mean(1) / len(others)
    online = replay.is_online(index)
    kept = ~online if only_offline else torch.ones_like(online)
    torch.testing.assert_close(found[kept], expected[kept])
    if only_offline:  # as likely to be drawn as by chance
        picked = sampler.draw_by_rank(found, torch.ones(G), 20_000)
        share = online.gather(1, picked).float().mean()
        assert online.float().mean() == pytest.approx(0.2, abs=0.03)
        assert share == pytest.approx(0.2, abs=0.06)


def test_a_run_is_tuned_by_the_oracle(tmp_path, monkeypatch, data, capsys):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    for more, name in (([], "otc-oracle"), (["offline"], "otc-oracle-offline")):
        monkeypatch.setattr("sys.argv", ["oracle", "otc_bcq", *more, *map(str, argv)])
        oracle.main()
        (folder,) = (x for x in (tmp_path / "runs").iterdir() if f"__{name}__" in x.name)
        assert len((folder / "returns.csv").read_text().splitlines()) == 4
    for wrong in (["otc"], [], ["otc_bcq", "--resume", str(folder)]):
        monkeypatch.setattr("sys.argv", ["oracle", *wrong])
        with pytest.raises((correction.InputError, SystemExit)):
            oracle.main()


def test_a_part_of_bcq_learns_from_its_own_batch():
    def after(cloned, learned):
        torch.manual_seed(0)
        agent = bcq_parts.Parts(2, OBS_DIM, ACTION_DIM, Args())
        before = {name: x.clone() for name, x in agent.state_dict().items() if "." in name}
        torch.manual_seed(1)
        if cloned is None:
            agent.update(learned)
        else:
            agent.apart(cloned, learned)
        return before, agent.state_dict()

    a, b, c = (random_batch(2, seed=seed) for seed in range(3))
    before, one = after(a, b)
    _, other = after(a, c)
    _, plain = after(None, a)
    for name in before:
        is_changed = not torch.equal(before[name], one[name])
        if name.startswith("vae."):
            assert is_changed and torch.equal(one[name], other[name])
            assert torch.equal(one[name], plain[name])
        elif name.startswith("qf."):
            assert is_changed and not torch.equal(one[name], other[name])


@pytest.mark.parametrize("part", bcq_parts.PARTS)
def test_a_run_is_tuned_in_parts(tmp_path, monkeypatch, data, part):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    argv += ["--distance", "embedding"]
    monkeypatch.setattr("sys.argv", ["bcq_parts", part, *map(str, argv)])
    bcq_parts.main()
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"__otc-embedding-for-{part}__" in folder.name
    monkeypatch.setattr("sys.argv", ["bcq_parts", part, *map(str, argv), "--sampling", "mixed"])
    with pytest.raises(SystemExit):
        bcq_parts.main()
