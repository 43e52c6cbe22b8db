"""What a run says of itself: its name, its hyperparameters, its losses, and what comes next."""

import importlib.util
import sys
from dataclasses import asdict

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import otc_bcq
from common import checkpoints, strategies
from tests.helpers import assert_same, only, run, scalars, state_of, tiny
from tests.tiny_task import ENV


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "otc-value"),
        ({"distance": "embedding", "alpha": 2.0}, "otc-embedding"),
        ({"adaptive_alpha": False, "alpha": 0.5}, "otc-value-alpha0.5"),
        ({"alpha_max": 4.0, "replacement": False}, "otc-value-max4-no-replacement"),
        ({"exclude_self_matches": True}, "otc-value-no-self-matches"),
        ({"sampling": "offline", "exploration": "sequential"}, "offline-exploring"),
        ({"sampling": "uniform", "alpha": 0.5}, "uniform"),
        ({"deployments": 0, "sampling": "balanced"}, "pi0"),
    ],
)
def test_a_strategys_name(options, name):
    assert strategies.strategy_name(asdict(otc_bcq.Args(**options))) == name


def test_hyperparameters_are_tensorboards(tmp_path, monkeypatch, data):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--num-seeds", 2, "--seed", 5]
    run(monkeypatch, "otc_bcq", *argv, "--run-dir", tmp_path / "runs", "--phi", 0.07)
    for folder, seed in zip(sorted((tmp_path / "runs").iterdir()), (5, 6), strict=True):
        events = EventAccumulator(str(folder))
        events.Reload()
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found = HParamsPluginData.FromString(content).session_start_info.hparams
        assert found["strategy"].string_value == "otc-value" and found["seed"].number_value == seed
        assert found["phi"].number_value == pytest.approx(0.07)
        assert found["script"].string_value == "otc_bcq" and "alpha_max" not in found


def test_how_often_losses_are_logged_does_not_matter_and_every_phase_logs_its_last(
    tmp_path, monkeypatch, data
):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir"]
    for every in (7, 1000):
        run(monkeypatch, "otc_bcq", *argv, tmp_path / str(every), "--log-every", every)
    often, seldom = (only(tmp_path / str(every)) for every in (7, 1000))
    assert (often / "returns.csv").read_bytes() == (seldom / "returns.csv").read_bytes()
    assert_same(*(state_of(f / "checkpoint.pt") for f in (often, seldom)))
    assert list(scalars(seldom)["losses/qf1_loss"]) == [60, 80, 100]
    for tag, values in scalars(seldom).items():
        if tag.startswith("losses/"):
            assert values[60] == scalars(often)[tag][60], tag


def test_an_offline_checkpoint_brings_its_arguments(tmp_path, monkeypatch, data):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--seed", 4, "--gamma", 0.9]
    run(monkeypatch, "otc_bcq", *argv, "--deployments", 0, "--run-dir", tmp_path / "a")
    start = only(tmp_path / "a")
    short = "--deployments 1 --deployment-steps 50 --finetune-updates 10 --candidates 32"
    argv = ["--offline-checkpoint", start, *short.split(), "--references", 40, "--tau", 0.1]
    run(monkeypatch, "otc_bcq", *argv, "--run-dir", tmp_path / "b", "--distance-candidates", 100)
    args = checkpoints.read_args(only(tmp_path / "b"))
    assert (args["env"], args["seed"], args["gamma"], args["hidden_size"]) == (ENV, 4, 0.9, 16)
    assert args["batch_size"] == 16 and args["num_act_actions"] == 5 and args["tau"] == 0.1
    assert args["deployments"] == 1 and args["run_dir"] == str(tmp_path / "b")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb, an option")
def test_tracking_writes_to_weights_and_biases_offline(tmp_path, monkeypatch, data):
    monkeypatch.setenv("WANDB_MODE", "offline")
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    run(monkeypatch, "otc_bcq", *argv, "--track", "--wandb-project-name", "tiny")
    files = list(only(tmp_path / "runs").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000


def test_tracking_without_the_package_says_what_to_install(tmp_path, monkeypatch, capsys, data):
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "otc_bcq", *argv, "--track")
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: --track needs Weights & Biases: pip install wandb\n"
    )


def test_every_deployed_policy_is_kept_on_demand(tmp_path, monkeypatch, data):
    argv = ["--env", ENV, "--dataset", data, *tiny("otc_bcq"), "--run-dir", tmp_path / "runs"]
    run(monkeypatch, "otc_bcq", *argv, "--save-policies", "--distance", "embedding")
    folder = only(tmp_path / "runs")
    first, second = (state_of(folder / f"policy_{k}.pt") for k in (0, 1))
    assert not (folder / "policy_2.pt").exists()  # never deployed: it is in checkpoint.pt
    for name, value in first["agent"].items():
        assert_same(value, state_of(folder / "offline.pt")["agent"][name])
    assert first["strategy"]["alpha"].tolist() == [1.0, 1.0]
    assert second["deployment"] == 2 and (second["strategy"]["alpha"] != 1).all()
    assert_same(second["strategy"], state_of(folder / "checkpoint.pt")["strategy"])
