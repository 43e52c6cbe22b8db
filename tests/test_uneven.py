"""Agents that differ in what they see and do: nothing counts the padding, and no agent learns from
another's scale."""

import importlib

import numpy as np
import pytest
import torch

from common import InputError, datasets, strategies
from common.loop import collect
from common.nets import Actor, Linear
from common.replay import Replay
from tests.helpers import (
    ACTION_DIM,
    CENTRAL,
    OBS_DIM,
    SCRIPTS,
    WITH_OTC,
    WITH_SCALES,
    by_group,
    make,
    random_team,
    update_number,
)

CONTINUOUS = [script for script in WITH_OTC if script != "otc_cql_discrete"]


def uneven_team(n=600):
    """Agent 0 sees 3 of 5 numbers and has 1 of 2 joints; agent 1 has all."""
    random, team = np.random.default_rng(0), random_team(n)
    team.obs, team.next_obs = (random.normal(size=(n, 2, OBS_DIM)).astype("f4") for _ in range(2))
    team.own_obs = np.array([[1, 1, 1, 0, 0], [1] * OBS_DIM], bool)
    team.own_actions = np.array([[1, 0], [1, 1]], bool)
    team.obs, team.next_obs = (x * team.own_obs for x in (team.obs, team.next_obs))
    team.actions *= team.own_actions
    return team


def shake_padding(agent, G):
    """Move the weights that lead into or out of the padding, and those alone; whether each entry of
    each parameter is one, by its address."""
    own = agent.own[:, 0] > 0  # (G, action_dim)
    moved = {}

    def shake(parameter, is_padding):
        is_padding = is_padding.expand(parameter.shape)
        parameter += is_padding * torch.randn_like(parameter)
        moved[parameter.data_ptr()] = is_padding

    for module in agent.modules():
        networks = [x for x in module.children() if isinstance(x, torch.nn.Sequential)]
        for network in networks:
            layers = [layer for layer in network if isinstance(layer, Linear)]
            rows = layers[0].weight.shape[1] - OBS_DIM
            if rows and rows % ACTION_DIM == 0 and len(layers[0].weight) == G:
                is_padding = torch.zeros(G, OBS_DIM + rows, dtype=torch.bool)
                is_padding[:, OBS_DIM:] = (~own).repeat(1, rows // ACTION_DIM)
                shake(layers[0].weight, is_padding.unsqueeze(2))
            if isinstance(module, Actor):
                columns = (~own).repeat(1, layers[-1].weight.shape[2] // ACTION_DIM).unsqueeze(1)
                shake(layers[-1].weight, columns)
                shake(layers[-1].bias, columns)
        if isinstance(module, Actor) and hasattr(module, "raw_log_std"):
            shake(module.raw_log_std, ~own.unsqueeze(1))
    return moved


@pytest.mark.parametrize(
    ("script", "flags"),
    [(script, {}) for script in CONTINUOUS]
    + [("omar", {"penalise_policy": True, "refit": "elite", "omar_coefficient": 0.5})],
    ids=str,
)
def test_weights_of_the_padding_do_not_matter(script, flags):
    """Bit for bit: neither losses, actions nor values, nor any weight that a joint depends on."""
    replay, results, moved = Replay(uneven_team(), 2, 0, 1), [], {}
    for shaken in (False, True):
        torch.manual_seed(0)
        agent, kind_of = make(script, 4, **flags)
        agent.take_own(replay)
        if script in [*WITH_SCALES, "otc_bremen"]:
            agent.measure_scales(replay)
        for target, live in (("target", "live"), ("target_vf", "vf")):
            if hasattr(agent, target):
                getattr(agent, target).load_state_dict(getattr(agent, live).state_dict())
        start = torch.get_rng_state()
        if shaken:
            with torch.no_grad():
                moved = shake_padding(agent, 4)
        torch.set_rng_state(start)
        found = []
        for number in range(1, 14):
            batch = replay.gather(replay.draw_offline(16))
            found += update_number(agent, batch, number, kind_of).values()
        obs, actions = batch["obs"], batch["actions"]
        acted = agent.act(obs), agent.explore(obs)
        for each in acted:
            assert (each[::2, :, 1] == 0).all() and (each[1::2, :, 1] != 0).any()
        found += [*acted, agent.q_value(obs, actions), agent.value(obs)]
        places = [moved.get(p.data_ptr()) for p in agent.parameters()]
        results.append((found, [p.detach() for p in agent.parameters()]))
    assert any(place is not None and place.any() for place in places)
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    for one, other, place in zip(results[0][1], results[1][1], places, strict=True):
        assert torch.equal(*(x if place is None else x * ~place for x in (one, other)))


OFFLINE = [
    ("bc", {}),
    ("iql", {}),
    ("maiql", {}),
    ("matd3bc", {}),
    ("moma_ppo", {}),
    ("omar", {"critic": "centralised", "penalise_policy": True, "num_seeds": 2}),
    ("omsd", {}),
    ("omsd", {"score": "joint"}),
    ("omsd", {"score": "none"}),
    ("omsd", {"score": "independent", "prefix": "after", "normalize_q": True}),
]


@pytest.mark.parametrize(("script", "flags"), OFFLINE, ids=str)
def test_what_an_actor_makes_of_the_padding_does_not_matter(script, flags):
    """Bit for bit, in the scripts without deployments and of teams; of denoisers likewise."""
    replay, results = Replay(uneven_team(), 2, 0, 1), []
    for shaken in (False, True):
        torch.manual_seed(0)
        agent, kind_of = make(script, 4, **flags)
        agent.take_own(replay)
        agent.measure_scales(replay)
        actor = agent.actor.network if isinstance(agent.actor, Actor) else agent.actor
        last = [actor[-1]]
        if script == "omsd" and flags.get("score") not in ("joint", "none"):
            last.append(agent.denoiser.head)
        with torch.no_grad():
            for layer in last if shaken else []:
                columns = (agent.own == 0).repeat(1, 1, layer.weight.shape[2] // ACTION_DIM)
                assert columns.any()
                layer.weight += columns * torch.randn_like(layer.weight)
                layer.bias += columns * torch.randn_like(layer.bias)
        torch.manual_seed(1)
        found = []
        for number in range(1, 17):
            if script == "omar":
                batch = replay.gather_team(replay.draw_offline(24))
            else:
                batch = replay.gather_teams(replay.draw_teams(24))
            losses = update_number(agent, batch, number, kind_of)
            found += [value.clone() for value in losses.values()]
        obs = batch["obs"][:, :, 0] if script == "omar" else batch["obs"]
        results.append([*found, agent.act(obs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in CENTRAL])
def test_another_agents_observations_do_not_matter_bit_for_bit(script):
    """Nor their scale: agent 1's are a thousand times as large in one of two runs."""
    trained = []
    for factor in (1, 1000):
        team = uneven_team()
        team.obs[:, 1] *= factor
        team.next_obs[:, 1] *= factor
        torch.manual_seed(0)
        replay = Replay(team, 1, 0, 1)
        agent, kind_of = make(script, 2)
        agent.take_own(replay)
        if script in [*WITH_SCALES, "otc_bremen"]:
            agent.measure_scales(replay)
        for number in range(1, 21):
            update_number(agent, replay.gather(replay.draw_offline(16)), number, kind_of)
        trained.append([by_group(name, p.detach(), 2) for name, p in agent.named_parameters()])
    for one, other in zip(*trained, strict=True):
        assert torch.equal(one[0], other[0])
    assert any(not torch.equal(one[1], other[1]) for one, other in zip(*trained, strict=True))


@pytest.mark.parametrize("distance", ["embedding", "two-stage", "raw", "residual"])
def test_distances_count_no_padding_and_no_other_agents_scale(distance):
    found = []
    for factor in (1, 1000):
        team = uneven_team()
        team.obs[:, 1] *= factor
        team.next_obs[:, 1] *= factor
        torch.manual_seed(0)
        replay = Replay(team, 1, 0, 1)
        module = importlib.import_module("otc_bcq")
        args = module.Args(distance=distance, hidden_size=16)
        space = strategies.make(replay, args, module.OTC).embedding
        losses = {}
        if space.optimizer is not None:
            for _ in range(5):
                losses = space.update(replay.gather(replay.draw_offline(32)))
        placed = space.place_rows(replay.draw_offline(32))
        if distance == "residual":  # what a network says of an entry that is nobody's is nothing
            own = torch.cat([replay.own_obs, replay.own_obs], dim=2)
            assert (own < 1).any() and (placed * (1 - own) == 0).all()
        found.append((placed[0], {tag: value[0] for tag, value in losses.items()}))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    if losses:  # its first errors are those of what it sees, about 1 for every entry of its own
        error = found[0][1]["losses/embedding_reconstruction"].item()
        assert error > {"embedding": 0.2, "two-stage": 1.6, "residual": 0.8}[distance]


def test_clonings_error_is_that_of_the_own_joints():
    """A policy that plays 0: the mean square of the data's actions."""
    team = uneven_team()
    replay = Replay(team, 1, 0, 1)
    agent, _ = make("otc_td3bc", 2)
    agent.take_own(replay)
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.zero_()
    losses = agent.update(replay.gather(torch.arange(len(team)).expand(2, -1)), True)
    expected = [np.square(team.actions[:, 0, 0]).mean(), np.square(team.actions[:, 1]).mean()]
    np.testing.assert_allclose(losses["losses/bc_loss"], expected, rtol=1e-4)


@pytest.mark.parametrize(("entropy", "grows"), [(-0.9, False), (-1.1, True)])
def test_the_entropys_target_is_that_of_the_own_joints(monkeypatch, entropy, grows):
    """Of one joint -1, of two -2: a temperature grows where the entropy is below."""
    replay = Replay(uneven_team(), 1, 0, 1)
    agent, _ = make("otc_cql", 2)
    agent.take_own(replay)

    def sample(mean, log_std, num=1):
        actions = torch.tanh(mean).unsqueeze(2).expand(-1, -1, num, -1)
        of_each = torch.tensor([entropy, 2 * entropy]).view(2, 1, 1)
        return actions, -of_each.expand(actions.shape[:3])

    monkeypatch.setattr(agent.actor, "sample", sample)
    agent.update(replay.gather(replay.draw_offline(16)))
    assert ((agent.log_temperature > 0) == grows).all()


def test_the_penalty_integrates_over_the_own_joints():
    """Of critics that are 0 OMAR's is the log of the box's volume, and of the number of actions."""
    replay = Replay(uneven_team(), 1, 0, 1)
    agent, _ = make("omar", 2)
    agent.take_own(replay)
    with torch.no_grad():
        for parameter in agent.qf.parameters():
            parameter.zero_()
    gap = agent.update(replay.gather(replay.draw_offline(16)))["losses/conservative_gap"]
    number = agent.args.num_penalty_actions
    np.testing.assert_allclose(gap, np.log([2 * number, 4 * number]), rtol=1e-5)


def test_bcqs_latent_has_two_numbers_for_each_joint_of_an_agents_own():
    """A broad latent: KL of each is 0.5 (e^2 - 3), whatever the number of joints."""
    replay = Replay(uneven_team(), 1, 0, 1)
    agent, _ = make("otc_bcq", 2)
    agent.take_own(replay)
    last = agent.vae.encoder[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0] * 4 + [1.0] * 4))
        last.bias[0, 0, [1, 3, 5, 7]] = 7.0  # the padding's
    losses = agent.update(replay.gather(replay.draw_offline(16)))
    expected = 0.5 * (np.exp(2) - 3)
    np.testing.assert_allclose(losses["losses/vae_kl"], [expected] * 2, rtol=1e-4)


UNEVEN = "tests.uneven_task:make"


def test_files_hold_the_agents_own_numbers_with_or_without_padding(tmp_path):
    import h5py

    random, n = np.random.default_rng(0), 30
    obs, actions = random.normal(size=(n, 5)), random.uniform(-1, 1, (n, 4))
    padded_obs = np.insert(obs, [2], 9.0, axis=1)  # sizes 2 and 3
    padded_actions = np.insert(actions, [1, 1], 0.5, axis=1)  # sizes 1 and 3
    teams = []
    for name, (o, a) in {"own": (obs, actions), "padded": (padded_obs, padded_actions)}.items():
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["observations"], file["next_observations"], file["actions"] = o, o, a
            file["rewards"], file["terminals"] = np.zeros(n), np.zeros(n)
            file["timeouts"] = np.arange(n) % 10 == 9
        teams.append(datasets.load(UNEVEN, str(tmp_path / f"{name}.hdf5")))
    for team in teams:
        np.testing.assert_array_equal(team.own_obs, [[1, 1, 0], [1, 1, 1]])
        np.testing.assert_array_equal(team.own_actions, [[1, 0, 0], [1, 1, 1]])
        np.testing.assert_array_equal(team.obs[:, 0], np.insert(obs[:, :2], [2], 0, 1).astype("f4"))
        np.testing.assert_array_equal(team.obs[:, 1], obs[:, 2:].astype("f4"))
        np.testing.assert_allclose(team.actions[:, 0, 0], actions[:, 0], atol=1e-6)
        assert (team.actions[:, 0, 1:] == 0).all()
    for key in ("obs", "actions", "next_obs"):
        np.testing.assert_array_equal(getattr(teams[0], key), getattr(teams[1], key))
    with h5py.File(tmp_path / "own.hdf5", "a") as file:
        del file["actions"]
        file["actions"] = np.zeros((n, 5))
    with pytest.raises(InputError, match="width 5, expected 6"):
        datasets.load(UNEVEN, str(tmp_path / "own.hdf5"))
    with h5py.File(tmp_path / "padded.hdf5", "a") as file:  # as if all saw the same three
        for name in ("observations", "next_observations"):
            del file[name]
            file[name] = obs[:, :3]
    with pytest.raises(InputError, match="observations has width 3, expected 5 or 6"):
        datasets.load(UNEVEN, str(tmp_path / "padded.hdf5"))


def test_a_deployments_padding_is_zero():
    from common.envs import make_vec

    envs = make_vec(UNEVEN, 1, 0)
    module = importlib.import_module("otc_td3bc")
    agent = module.TD3BC(2, 3, 3, module.Args(hidden_size=16))
    team = uneven_team()
    team.own_actions = np.array([[1, 0, 0], [1, 1, 1]], bool)
    agent.take_own(Replay(team, 1, 0, 1))
    data, _ = collect(envs, agent, 25, 0, torch.device("cpu"), "sequential")
    assert (data["actions"][:, :, 0, 1:] == 0).all() and (data["obs"][:, :, 0, 2] == 0).all()
    assert (data["actions"][:, :, 0, 0] != 0).any()
