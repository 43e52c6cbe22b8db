"""Environments in several processes give the numbers of one."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from common import InputError
from common.envs import VecEnv, make_vec, num_cores
from common.envs.workers import WorkerVecEnv, free_cores
from tests.tiny_task import ENV, Point


def drifting():
    """A task that changes between deployments: the reward is the deployment's number."""
    return Drifting()


class Drifting(Point):
    deployment = 0

    def set_deployment(self, k, num_deployments):
        self.deployment = k

    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        return obs, {agent: self.deployment for agent in rewards}, *rest


def unordered():
    """As of a set of names: another order in every process."""
    env = Point()
    env.possible_agents = sorted(
        ["x", "y"], reverse=os.environ.get("OTC_TEST_PARENT") != str(os.getpid())
    )
    return env


def broken():
    return Broken()


class Broken(Point):
    def step(self, actions):
        if self.time == 3 and "OTC_TEST_PARENT" in os.environ:
            if int(os.environ["OTC_TEST_PARENT"]) != os.getpid():
                os._exit(7)
        return super().step(actions)


class Silent(Point):
    def step(self, actions):
        obs, rewards, *rest = super().step(actions)
        if os.environ["OTC_TEST_PARENT"] != str(os.getpid()):
            rewards = dict.fromkeys(rewards)
        return obs, rewards, *rest


def rollout(vec, steps, num_resets=2):
    """Everything that resets and steps return."""
    rng, found = np.random.default_rng(0), []
    shape = vec.num_envs, vec.num_agents, vec.action_dim
    for seed in (None, 5, None)[: num_resets + 1]:
        found.append(vec.reset(seed))
        for _ in range(steps):
            found += vec.step(vec.to_box(rng.uniform(-1, 1, shape)))
    return found


@pytest.mark.parametrize(
    ("task", "split", "num_envs", "num_workers", "steps"),
    [("hopper", None, 5, 2, 60), ("halfcheetah", "6x1", 3, 7, 5), (ENV, None, 4, 1, 25)],
)
def test_workers_give_the_numbers_of_one_process(task, split, num_envs, num_workers, steps):
    """Through falls, time limits, seeds given and generators that go on."""
    one = make_vec(task, num_envs, 3, split)
    several = make_vec(task, num_envs, 3, split, num_workers)
    assert type(several) is WorkerVecEnv and type(one) is not WorkerVecEnv
    for name in ("num_envs", "num_agents", "obs_dim", "action_dim", "max_episode_steps"):
        assert getattr(one, name) == getattr(several, name), name
    expected, found = rollout(one, steps), rollout(several, steps)
    assert len(several.processes) == min(num_workers, num_envs - 1)
    ended = any(x[0].dtype == bool and x.any() for x in expected)
    assert ended or task == "halfcheetah"
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    several.close()


def test_what_was_returned_is_not_overwritten():
    vec = make_vec(ENV, 2, 0, None, 1)
    obs = vec.reset()
    kept = obs.copy()
    for _ in range(5):
        vec.step(np.ones((2, 2, 1)))
    np.testing.assert_array_equal(obs, kept)
    vec.close()


@pytest.mark.parametrize("before", [True, False])
def test_deployments_reach_every_process(before):
    vec = make_vec("tests.test_workers:drifting", 3, 0, None, 2)
    if not before:
        vec.reset()
    vec.set_deployment(4, 10)
    vec.reset()
    assert vec.step(np.zeros((3, 2, 1)))[1].tolist() == [4, 4, 4]
    vec.close()


def test_a_process_that_dies_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setenv("OTC_TEST_PARENT", str(os.getpid()))
    vec = make_vec("tests.test_workers:broken", 2, 0, None, 1)
    vec.reset()
    with pytest.raises(InputError, match="an environment process ended"):
        for _ in range(10):
            vec.step(np.zeros((2, 2, 1)))
    assert vec.processes == []


def test_what_a_task_gave_there_is_said(monkeypatch, capfd):
    monkeypatch.setenv("OTC_TEST_PARENT", str(os.getpid()))
    vec = make_vec("tests.test_workers:Silent", 2, 0, None, 1)
    vec.reset()
    capfd.readouterr()
    with pytest.raises(InputError, match="ended with status 1 \\(it says why above\\)"):
        for _ in range(10):
            vec.step(np.zeros((2, 2, 1)))
    said = capfd.readouterr().err
    assert "None" in said and said.count("\n") == 1


def test_more_seeds_than_a_pipe_holds():
    vec, found = make_vec(ENV, 2, 0, None, 1), []
    seeds = [2 ** (8 * 100_000)] * 2  # the worker's alone is more than the 65,536 bytes of a pipe
    thread = threading.Thread(target=lambda: found.append(vec.restart(seeds)), daemon=True)
    thread.start()
    thread.join(60)
    assert found
    np.testing.assert_array_equal(*found[0])
    vec.close()


def test_agents_in_another_order_are_refused(monkeypatch, capfd):
    monkeypatch.setenv("OTC_TEST_PARENT", str(os.getpid()))
    vec = make_vec("tests.test_workers:unordered", 2, 0, None, 1)
    with pytest.raises(InputError, match="an environment process ended with status 1"):
        vec.reset()
    assert "the order of its agents differs between processes" in capfd.readouterr().err


def test_processes_end_with_the_environments():
    for end in ("close", "forget"):
        vec = make_vec(ENV, 4, 0, None, 3)
        vec.reset()
        processes = list(vec.processes)
        assert len(processes) == 3 and all(p.poll() is None for p in processes)
        if end == "close":
            vec.close()
        del vec
        deadline = time.monotonic() + 10
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(p.poll() is not None for p in processes), end


def test_processes_start_only_where_they_pay(monkeypatch):
    monkeypatch.setattr("common.envs.free_cores", lambda: 4)
    assert make_vec("hopper", 10, 0, None, None).num_workers == 3
    assert make_vec("hopper", 5, 0, None, None).num_workers == 1
    for task, num_envs in (("hopper", 3), ("hopper", 1), ("navigation", 100), (ENV, 10)):
        assert not isinstance(make_vec(task, num_envs, 0, None, None), WorkerVecEnv)
    assert not isinstance(make_vec("hopper", 1, 0, None, 3), WorkerVecEnv)
    assert isinstance(make_vec("hopper", 10, 0), VecEnv)


def test_a_busy_core_is_not_free():
    endless = "print(flush=True)\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-c", endless], stdout=subprocess.PIPE)
    try:
        busy.stdout.readline()
        assert 1 <= free_cores() <= max(1, num_cores() - 1)
    finally:
        busy.kill()
        busy.wait()
