"""The BCQ learner, its sampling strategies, and whole runs of the script."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import otc_bcq
from common import runs
from common.datasets import TeamDataset
from common.replay import Replay
from otc_bcq import BCQ, Args, TransitionSampler
from tests.tiny_task import ENV, write_data

ROOT = Path(__file__).parent.parent
OBS_DIM, ACTION_DIM = 5, 2


def random_batch(G, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "obs": torch.randn(G, size, OBS_DIM, generator=generator),
        "next_obs": torch.randn(G, size, OBS_DIM, generator=generator),
        "actions": torch.rand(G, size, ACTION_DIM, generator=generator) * 2 - 1,
        "rewards": torch.randn(G, size, generator=generator),
        "terminations": (torch.rand(G, size, generator=generator) < 0.2).float(),
    }


def random_team(n=600, num_agents=2, seed=0):
    random = np.random.default_rng(seed)
    return TeamDataset(
        obs=random.normal(size=(n, 1, OBS_DIM)).astype(np.float32),
        actions=random.uniform(-1, 1, (n, num_agents, ACTION_DIM)).astype(np.float32),
        rewards=random.normal(size=n).astype(np.float32),
        next_obs=random.normal(size=(n, 1, OBS_DIM)).astype(np.float32),
        terminations=random.random(n) < 0.05,
        truncations=np.zeros(n, bool),
        source="random numbers",
    )


def add_deployment(replay, seed=1):
    random = np.random.default_rng(seed)
    shape = (replay.num_seeds, replay.deployment_steps)
    replay.add(
        obs=random.normal(size=(*shape, replay.num_agents, OBS_DIM)).astype(np.float32),
        actions=random.uniform(-1, 1, (*shape, replay.num_agents, ACTION_DIM)).astype(np.float32),
        rewards=random.normal(size=shape).astype(np.float32),
        next_obs=random.normal(size=(*shape, replay.num_agents, OBS_DIM)).astype(np.float32),
        terminations=np.zeros(shape, bool),
    )


# --- The learner ---


def test_twin_critics_differ_and_targets_start_as_copies_without_gradient():
    torch.manual_seed(0)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, Args())
    for first, second in zip(agent.qf1.parameters(), agent.qf2.parameters(), strict=True):
        assert not torch.equal(first, second)
    for live, target in zip(agent.live.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(live, target) and live.data_ptr() != target.data_ptr()
    for _ in range(3):
        agent.update(random_batch(2))
    assert all(p.grad is None and not p.requires_grad for p in agent.target.parameters())
    assert not torch.equal(agent.qf1.network[0].weight, agent.qf2.network[0].weight)


def test_targets_follow_at_rate_tau():
    torch.manual_seed(0)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, Args(tau=0.25))
    before = [p.clone() for p in agent.target.parameters()]
    agent.update(random_batch(2))
    pairs = zip(before, agent.live.parameters(), agent.target.parameters(), strict=True)
    for old, live, target in pairs:
        torch.testing.assert_close(target, 0.75 * old + 0.25 * live)


def plain_mlp(network, x, g):
    """A group's network as plain float64 numpy, one row at a time."""
    x = np.asarray(x, np.float64)
    layers = [layer for layer in network if isinstance(layer, otc_bcq.Linear)]
    for i, layer in enumerate(layers):
        x = (
            x @ layer.weight[g].detach().double().numpy()
            + layer.bias[g, 0].detach().double().numpy()
        )
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


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
                twins = [
                    plain_mlp(qf.network, np.concatenate([s2, a2]), g)[0]
                    for qf in (agent.target_qf1, agent.target_qf2)
                ]
                best = max(best, 0.75 * min(twins) + 0.25 * max(twins))
            y = data["rewards"][g, b] + 0.99 * (1 - data["terminations"][g, b]) * best
            pair = np.concatenate([s, a])
            q1_loss.append((plain_mlp(agent.qf1.network, pair, g)[0] - y) ** 2)
            q2_loss.append((plain_mlp(agent.qf2.network, pair, g)[0] - y) ** 2)

            z = np.clip(actor_noise[g, b], -0.5, 0.5)
            a = np.tanh(plain_mlp(agent.vae.decoder, np.concatenate([s, z]), g))
            shift = np.tanh(plain_mlp(agent.actor.network, np.concatenate([s, a]), g))
            pair = np.concatenate([s, np.clip(a + 0.05 * shift, -1, 1)])
            actor_loss.append(-plain_mlp(agent.qf1.network, pair, g)[0])
        expected = {
            "losses/vae_reconstruction": vae,
            "losses/vae_kl": kl,
            "losses/qf1_loss": q1_loss,
            "losses/qf2_loss": q2_loss,
            "losses/actor_loss": actor_loss,
        }
        for name, values in expected.items():
            assert losses[name][g].item() == pytest.approx(np.mean(values), rel=1e-4), name


def test_a_group_trains_in_the_stack_as_it_does_alone(monkeypatch):
    """Same start, data and noise: group 2 of three, and the same learner by itself."""

    batches = [random_batch(3, seed=i) for i in range(30)]

    def shared_noise(*shape, device=None):  # every group gets the same noise
        return torch.from_numpy(noise.normal(size=shape[1:]).astype(np.float32)).expand(shape)

    monkeypatch.setattr(torch, "randn", shared_noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: shared_noise(*x.shape))
    torch.manual_seed(0)
    stack, alone = BCQ(3, OBS_DIM, ACTION_DIM, Args()), BCQ(1, OBS_DIM, ACTION_DIM, Args())
    with torch.no_grad():
        for one, many in zip(alone.parameters(), stack.parameters(), strict=True):
            one.copy_(many[2:])
    for agent, groups in ((stack, slice(None)), (alone, slice(2, 3))):
        noise = np.random.default_rng(0)
        for batch in batches:
            agent.update({k: v[groups] for k, v in batch.items()})
    for one, many in zip(alone.parameters(), stack.parameters(), strict=True):
        torch.testing.assert_close(one, many[2:], rtol=1e-4, atol=1e-5)


def test_other_agents_actions_do_not_matter_bit_for_bit():
    trained = []
    for spoil in (False, True):
        team = random_team(num_agents=3)
        if spoil:
            team.actions[:, [0, 2]] = np.random.default_rng(9).uniform(-1, 1, (len(team), 2, 2))
        torch.manual_seed(0)
        replay = Replay(team, 1, 0, 1)
        agent = BCQ(3, OBS_DIM, ACTION_DIM, Args())
        for _ in range(20):
            agent.update(replay.gather(replay.draw_offline(16)))
        trained.append(agent)
    for one, other in zip(*(agent.parameters() for agent in trained), strict=True):
        assert torch.equal(one[1], other[1])
    assert not torch.equal(*(agent.qf1.network[0].weight[0] for agent in trained))


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


# --- Online transition correction ---


@pytest.mark.parametrize("distance", ["embedding", "value"])
def test_transition_distance_equals_its_definition(distance):
    torch.manual_seed(0)
    args = Args(distance=distance, num_value_actions=1, references=30, candidates=20)
    replay = Replay(random_team(), 2, 2, 40)
    add_deployment(replay)
    agent = BCQ(4, OBS_DIM, ACTION_DIM, args)
    agent.value = lambda obs: obs.sum(2) + 2.0  # known, and without noise
    transitions = TransitionSampler(replay, args)
    b, d = replay.draw_merged(20), replay.draw_latest(30)
    found = transitions.transition_distance(agent, b, d)
    B, D = replay.gather(b), replay.gather(d)
    with torch.no_grad():
        for g in range(4):
            if distance == "embedding":
                e = transitions.embedding.encode(B["obs"], B["actions"], B["next_obs"])[0][g]
                e_star = transitions.embedding.encode(D["obs"], D["actions"], D["next_obs"])[0][g]
                expected = (e[:, None] - e_star[None]).abs().sum(2).min(1).values
            else:
                q = agent.q_value(B["obs"], B["actions"])[g]
                q_star = agent.q_value(D["obs"], D["actions"])[g]
                v, v_star = (agent.value(x["next_obs"])[g] for x in (B, D))
                match = (q[:, None] - q_star[None]).abs().argmin(1)
                expected = (v / v.mean() - (v_star / v_star.mean())[match]).abs()
            torch.testing.assert_close(found[g], expected, rtol=1e-4, atol=1e-5)


def test_self_matches_have_distance_zero_unless_excluded():
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 1, 40)
    add_deployment(replay)
    latest = replay.draw_latest(40)
    for exclude in (False, True):
        args = Args(distance="embedding", exclude_self_matches=exclude)
        transitions = TransitionSampler(replay, args)
        distance = transitions.transition_distance(None, latest, latest)
        assert (distance > 1e-4).all() if exclude else (distance < 1e-4).all()


def test_alpha_telescopes_over_deployments():
    """Equation (4): after K deployments alpha is the last mean distance over the first."""
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 4, 40)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, Args())
    transitions = TransitionSampler(replay, Args(distance_candidates=200))
    distances = []
    for k in range(1, 5):
        add_deployment(replay, seed=k)
        transitions.start_deployment(agent, k)
        distances.append(transitions.distance.clone())
    torch.testing.assert_close(transitions.alpha, distances[-1] / distances[0])


def test_the_mean_distance_is_exact_where_all_data_enters_it():
    torch.manual_seed(0)
    replay = Replay(random_team(), 1, 1, 40)
    add_deployment(replay)
    transitions = TransitionSampler(replay, Args(distance="embedding", distance_candidates=640))
    transitions.start_deployment(None, 1)
    data = replay.gather(torch.arange(640).expand(2, -1))
    with torch.no_grad():
        e, _ = transitions.embedding.encode(data["obs"], data["actions"], data["next_obs"])
    nearest = (e[:, :, None] - e[:, None, 600:]).abs().sum(3).min(2).values
    torch.testing.assert_close(transitions.distance, nearest.mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampling", ["otc", "uniform", "balanced", "online", "offline"])
def test_strategies_draw_what_they_say(sampling):
    torch.manual_seed(0)
    args = Args(sampling=sampling, batch_size=64, candidates=100, references=30)
    replay = Replay(random_team(), 1, 2, 40)
    agent = BCQ(2, OBS_DIM, ACTION_DIM, args)
    transitions = TransitionSampler(replay, args)
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
        assert share > 80 / 680


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
    transitions = TransitionSampler(replay, Args(sampling="balanced"))
    transitions.start_deployment(None, 1)
    for _ in range(200):
        index = transitions.draw(None)
    offline = index[index < 1000]
    assert (offline < 500).float().mean() > 0.75


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampling", ["otc", "uniform", "balanced", "online", "offline"])
@pytest.mark.parametrize("distance", ["embedding", "value"])
def test_graph_equals_eager_on_a_gpu(sampling, distance):
    trained = []
    for graphed in (False, True):
        device = torch.device("cuda")
        torch.manual_seed(0)
        args = Args(sampling=sampling, distance=distance, candidates=64, references=30)
        replay = Replay(random_team(), 2, 1, 40, device)
        with device:
            agent = BCQ(4, OBS_DIM, ACTION_DIM, args)
            transitions = TransitionSampler(replay, args)
        add_deployment(replay)
        transitions.start_deployment(agent, 1)

        def update(agent=agent, transitions=transitions, replay=replay):
            index = transitions.draw(agent)
            return agent.update(replay.gather(index)) | transitions.diagnostics(index)

        call = runs.Graphed(update, graphed)
        torch.manual_seed(1)
        torch.cuda.set_sync_debug_mode("error" if not graphed else "default")
        for _ in range(20):
            call(0)
        torch.cuda.set_sync_debug_mode("default")
        trained.append([p.detach().cpu() for p in agent.parameters()])
    for eager, graph in zip(*trained, strict=True):
        torch.testing.assert_close(eager, graph, rtol=1e-4, atol=1e-5)


# --- Runs ---


QUICK = "--offline-updates 60 --deployments 2 --deployment-steps 60 --finetune-updates 20".split()
QUICK += "--candidates 32 --references 40 --batch-size 16 --eval-every 30 --hidden-size 16".split()
QUICK += "--num-act-actions 5 --distance-candidates 100 --device cpu".split()


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "point.hdf5")


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["otc_bcq.py", *map(str, argv)])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        runs.cli(otc_bcq.main, Args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def only(folder, pattern="*"):
    (found,) = Path(folder).glob(pattern)
    return found


STRATEGIES = [
    ["--sampling", "otc", "--distance", "embedding"],
    ["--sampling", "otc", "--distance", "value", "--exclude-self-matches", "--no-replacement"],
    ["--sampling", "otc", "--no-adaptive-alpha", "--alpha", "0.5"],
    ["--sampling", "uniform"],
    ["--sampling", "balanced"],
    ["--sampling", "online"],
    ["--sampling", "offline"],
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=" ".join)
def test_a_run_of_two_seeds_writes_what_it_should(tmp_path, monkeypatch, capsys, data, strategy):
    where = tmp_path / "runs"
    common = ["--env", ENV, "--dataset", data, "--run-dir", where, *QUICK]
    run(monkeypatch, *common, "--num-seeds", 2, "--seed", 3, *strategy)
    folders = sorted(where.iterdir(), key=lambda f: f.name.split("__")[-2])
    assert [f.name.split("__")[1:3] for f in folders] == [["otc_bcq", "3"], ["otc_bcq", "4"]]
    for folder in folders:
        rows = list(csv.DictReader((folder / "returns.csv").open()))
        assert [row["deployment"] for row in rows] == ["0", "1", "2"]
        assert [row["env_steps"] for row in rows] == ["0", "60", "120"]
        assert [row["episodes"] for row in rows] == ["3", "3", "10"]
        assert all(float(row["mean_return"]) < 0 for row in rows)
        assert {"alpha_agent_0", "alpha_agent_1"} <= set(rows[0])
        if "--no-adaptive-alpha" in strategy:
            assert {row["alpha_agent_0"] for row in rows} == {"0.5"}
        assert list(folder.glob("events.out.tfevents.*"))
    text = capsys.readouterr().out
    assert text.startswith("file: 1,000 transitions") and "improvement" in text and "mean" in text
    assert sorted(f.name for f in folders[0].iterdir() if "events" not in f.name) == [
        "args.json",
        "checkpoint.pt",
        "offline.pt",
        "returns.csv",
    ]


def test_strategies_start_from_the_same_offline_policy(tmp_path, monkeypatch, data):
    common = ["--env", ENV, "--dataset", data, *QUICK]
    run(monkeypatch, *common, "--run-dir", tmp_path / "a", "--deployments", 0)
    start = only(tmp_path / "a")
    first_rows, first_data = [], []
    for sampling in ("otc", "uniform"):
        where = tmp_path / sampling
        options = ["--run-dir", where, "--offline-checkpoint", start, "--sampling", sampling]
        run(monkeypatch, *common, *options)
        row = next(csv.DictReader((only(where) / "returns.csv").open()))
        first_rows.append({k: v for k, v in row.items() if not k.startswith("alpha")})
        state = torch.load(only(where) / "checkpoint.pt", weights_only=True)
        first_data.append(state["replay"]["obs"][:, :, :60])
    assert first_rows[0] == first_rows[1] and torch.equal(*first_data)


def script(*argv):
    command = [sys.executable, str(ROOT / "otc_bcq.py"), *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def test_resume_after_kills_ends_where_the_unbroken_run_does(tmp_path, data):
    """SIGKILL at random moments, SIGTERM once; returns.csv and parameters are bit for bit the
    same."""
    # No tight loop of checkpoints: most kills land between two of them.
    argv = ["--env", ENV, "--dataset", data, *QUICK, "--offline-updates", 600]
    argv += ["--deployments", 3, "--finetune-updates", 300, "--checkpoint-every", 170]
    unbroken = script(*argv, "--run-dir", tmp_path / "unbroken")
    output, _ = unbroken.communicate(timeout=300)
    assert unbroken.returncode == 0, output

    random = np.random.default_rng()
    process = script(*argv, "--run-dir", tmp_path / "killed")
    while not list((tmp_path / "killed").glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    folder = only(tmp_path / "killed")
    started = time.time()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        written = (folder / "checkpoint.pt").stat().st_mtime_ns
        # Let it get past one more checkpoint, so that every life makes progress.
        while (folder / "checkpoint.pt").stat().st_mtime_ns == written and process.poll() is None:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.4))
        if process.poll() is None:
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        process = script("--resume", folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert time.time() - started < 300

    whole = only(tmp_path / "unbroken")
    assert (whole / "returns.csv").read_bytes() == (folder / "returns.csv").read_bytes()
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, folder)]
    assert states[0]["progress"] == states[1]["progress"] == (3, 300)
    for part in ("agent", "sampler", "replay"):
        for name, value in states[0][part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, states[1][part][name]), name


def test_an_interrupted_run_says_how_to_go_on(tmp_path, data):
    argv = ["--env", ENV, "--dataset", data, *QUICK, "--offline-updates", 100_000]
    process = script(*argv, "--run-dir", tmp_path / "runs")
    while not list((tmp_path / "runs").glob("*/args.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    folder = only(tmp_path / "runs")
    assert process.returncode == 130 and f"--resume {folder}" in output
    assert (folder / "checkpoint.pt").exists()


def test_one_script_and_common_copied_into_an_empty_folder_run(tmp_path, data):
    shutil.copy(ROOT / "otc_bcq.py", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignore)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "tiny_task.py", tmp_path / "tests")
    command = [sys.executable, "otc_bcq.py", "--env", ENV, "--dataset", str(data), *QUICK]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and "improvement" in result.stdout, result.stderr


# --- Bad input ---


BAD = {
    "unknown task": (["--env", "halfcheeta-medium"], "did you mean halfcheetah"),
    "unknown quality": (["--env", "hopper-mediun"], "did you mean medium"),
    "no quality": (["--env", "hopper"], "hopper-medium"),
    "unknown split": (["--env", "hopper-medium", "--split", "2x3"], "1x3, 3x1"),
    "no data for it": (["--env", "ant-medium"], "ant"),
    "no data for a factory": (["--env", ENV], "FILE.hdf5"),
    "no such file": (["--dataset", "missing.hdf5"], "missing.hdf5"),
    "zero": (["--batch-size", "0"], "--batch-size is 0"),
    "negative": (["--deployments", "-1"], "--deployments is -1"),
    "zero deployment": (["--deployment-steps", "0"], "--deployment-steps is 0"),
    "negative alpha": (["--alpha", "-1"], "--alpha is -1"),
    "empty size": (["--dataset-size", "0"], "--dataset-size is 0"),
    "more drawn than there is": (["--no-replacement", "--batch-size", "600"], "--candidates 512"),
    "no run": (["--resume", "nowhere"], "nowhere is not a run folder"),
    "no offline run": (["--offline-checkpoint", "nowhere"], "nowhere is not a run folder"),
    "too few references": (["DATA"], "--references 2000"),
    "folder is a file": (["DATA", "--references", "5", "--run-dir", "DATA/runs"], "cannot write"),
}
if not torch.cuda.is_available():
    BAD["no CUDA"] = (["--device", "cuda"], "no CUDA device")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_two_lines_status_2_and_nothing_written(
    tmp_path, monkeypatch, capsys, data, case
):
    argv, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTC_CACHE_DIR", str(tmp_path / "cache"))
    if argv[0] == "DATA":
        argv = ["--env", ENV, "--dataset", "point.hdf5", *argv[1:]]
    argv = [word.replace("DATA", "point.hdf5") for word in argv]
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and words in error, error
    assert len(error.strip().splitlines()) <= 2 and "Traceback" not in error
    assert [f.name for f in tmp_path.iterdir()] == ["point.hdf5"]


@pytest.mark.parametrize("argv", [["--sampling", "otcc"], ["--device", "gpu"], ["--no-such-flag"]])
def test_unknown_choices_and_flags_exit_with_2(monkeypatch, capsys, argv):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *argv)
    assert exit.value.code == 2


def test_unreadable_and_foreign_checkpoints(tmp_path, monkeypatch, capsys, data):
    common = ["--env", ENV, "--dataset", data, *QUICK]
    run(monkeypatch, *common, "--run-dir", tmp_path / "a", "--sampling", "uniform")
    common += ["--run-dir", tmp_path / "b"]
    folder = only(tmp_path / "a")
    before = {f: f.read_bytes() for f in folder.iterdir()}

    def fails(words, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(monkeypatch, *argv)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and words in error, error
        assert len(error.strip().splitlines()) <= 2 and not (tmp_path / "b").exists()

    fails("--seed is 1 there, not 2", "--resume", folder, "--seed", 2)
    fails("--alpha is 1.0 there, not 2.0", "--resume", folder, "--alpha", 2.0)
    start = ["--offline-checkpoint", folder]
    fails("trained no embedding", *common, *start, "--distance", "embedding")
    fails("--seed 1, not 7", *common, "--offline-checkpoint", folder, "--seed", 7)
    assert before == {f: f.read_bytes() for f in folder.iterdir()}
    content = (folder / "offline.pt").read_bytes()
    for spoiled in (content[: len(content) // 2], b"something else", b""):
        (folder / "offline.pt").write_bytes(spoiled)
        fails("not a readable checkpoint", *common, "--offline-checkpoint", folder)
    torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")
    fails("not a readable checkpoint", "--resume", folder)
