"""What the lines of Algorithm 1 in a script's `main` call: train, deploy, evaluate, go on after an
interruption."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from common import InputError, checkpoints, cli, datasets, runs
from common.device import Graphed, get_rng_state, kept_rng_state, pick_device, set_rng_state
from common.embedding import Space
from common.envs import make_vec
from common.replay import Replay
from common.strategies import Strategy


class Training:
    """A run of G learners: its data, environments and folder, and how far it has come.

    Args:
        args: the script's.
        script: its `__file__`.
        discrete: the kind of actions that its learner is for; None: both.

    `replay` holds B^0, each agent with its own actions only; `sizes` are G, obs_dim and action_dim;
    `discrete` says which kind of actions the task has.
    """

    def __init__(self, args, script: str, discrete: bool | None = False):
        self.args, self.script = args, Path(script).stem
        self.device, self.checkpoint = pick_device(args), None
        if args.resume is not None:
            self.checkpoint = checkpoints.read_resumed(args, self.script)
        elif args.offline_checkpoint is not None:
            self.checkpoint = checkpoints.read_offline_checkpoint(args, self.script)
        dataset = datasets.load(args.env, args.dataset, args.dataset_size, args.split, discrete)
        print(dataset.source)
        self.data, self.data_return = dataset.fingerprint(), dataset.mean_return()
        if self.checkpoint is not None:
            what = "--offline-checkpoint" if args.resume is None else "--resume"
            checkpoints.check_unchanged(self.checkpoint, "data", self.data, what)
        self.discrete = dataset.discrete
        S, task = args.num_seeds, datasets.parse_env(args.env)[0]
        self.num_steps = cli.deployment_steps(args, len(dataset.rewards))  # M
        self.envs, self.eval_envs = (
            make_vec(task, num_envs, args.seed, args.split, args.env_workers)
            for num_envs in (S, args.eval_episodes * S)
        )
        names, longest = self.envs.agents, self.envs.max_episode_steps
        self.task = "" if names is None else f"agents {names}, at most {longest} steps"
        if self.checkpoint is not None:
            checkpoints.check_unchanged(self.checkpoint, "task", self.task, what)
        self.shape = S, self.envs.num_agents
        self.sizes = S * self.envs.num_agents, self.envs.obs_dim, self.envs.action_dim
        torch.manual_seed(args.seed)
        self.replay = Replay(dataset, S, args.deployments, self.num_steps, self.device)
        if len(self.replay.obs) < self.envs.num_agents:  # before anything is trained on it
            self.replay.check_views(self.envs.reset(args.seed))
        self.phase, self.done = 0, 0  # deployment k, 0 for the offline phase; its updates so far
        self.evaluated = 0  # offline updates at the latest evaluation
        self.graph, self.captured = args.cuda_graph and self.device.type == "cuda", None
        self.last_losses = None  # and their update's number

    def begin(self, agent: nn.Module, strategy: Strategy | None = None) -> None:
        """Where the checkpoint says, or afresh; makes the run's folder."""
        strategy = strategy or Strategy(self.replay, self.args)
        self.agent, self.strategy, checkpoint = agent, strategy, self.checkpoint
        agent.take_own(self.replay)
        resumed = checkpoint if self.args.resume else None
        if checkpoint is not None:
            try:
                agent.load_state_dict(checkpoint["agent"])
                if resumed is not None:
                    strategy.load_state_dict(checkpoint["strategy"])
                    self.replay.load_state_dict(checkpoint["replay"])
                self.phase, self.done = checkpoint["progress"]
                self.evaluated = checkpoint["evaluated"]
                set_rng_state(checkpoint["rng"], self.device)
            except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:200]
                folder = self.args.resume or self.args.offline_checkpoint
                raise InputError(f"the checkpoint in {folder} does not fit: {reason}") from error
        of_team = self.data_return, self.envs.num_agents, self.envs.reference_returns
        self.run = runs.Run(self.args, self.script, resumed, *of_team)
        self.checkpoint = None

    def save(self, name: str = "checkpoint.pt") -> None:
        """All that a resumed run goes on with; InputError where the training has diverged."""
        if self.last_losses is not None:
            self.run.refuse_divergence(*self.last_losses)
        state = {
            "agent": self.agent.state_dict(),
            "strategy": self.strategy.state_dict(),
            "replay": self.replay.state_dict(),
            "progress": (self.phase, self.done),
            "evaluated": self.evaluated,
            "data": self.data,
            "task": self.task,
            "rng": get_rng_state(self.device),
        }
        self.run.save(state, name)

    # Training

    def train_offline(self, update: Callable) -> None:
        """The offline phase, or what is left of it: pi^0, then what OTC compares transitions in."""
        if self.phase > 0:
            return
        args, embedding = self.args, self.strategy.embedding
        with self.run.closed_on_error():
            if self.done <= args.offline_updates and args.offline_checkpoint is None:
                self._train(update, "offline", args.offline_updates)
                self.save("offline.pt")
            if args.deployments and embedding is not None and embedding.optimizer is not None:
                self._train_embedding(embedding)

    def _train_embedding(self, embedding: Space) -> None:
        """In the run's progress its updates come after those of pi^0, in its log they are its
        own."""
        args, run, replay, before = self.args, self.run, self.replay, self.args.offline_updates
        stop = before if args.embedding_updates is None else args.embedding_updates

        def update() -> dict[str, torch.Tensor]:
            return embedding.update(replay.gather(replay.draw_offline(args.batch_size)))

        graphed = Graphed(update, self.graph)
        for number in run.updates("embedding", self.done - before, stop):
            losses, self.done = graphed(number), before + number
            self.last_losses = losses, number
            if number % args.log_every == 0 or number == stop:
                run.log_losses(losses, number)
            if number % args.checkpoint_every == 0:
                self.save()
            run.stop_if_asked(self.save)

    def finetune(self, update: Callable) -> None:
        """The updates after deployment k, or what is left of them."""
        with self.run.closed_on_error():
            self._train(update, f"fine-tuning {self.phase}", self.args.finetune_updates)

    def _train(self, update: Callable, name: str, stop: int) -> None:
        """Logged, checkpointed and open to interruption; on CUDA an update is a captured graph."""
        args, run, agent, replay = self.args, self.run, self.agent, self.replay
        offline = self.phase == 0
        if self.captured is None or self.captured.function is not update:
            kind = getattr(agent, "kind", None)
            kind_of = None if kind is None else lambda number: kind(number, offline)
            self.captured = Graphed(update, self.graph, kind_of)
        before = 0
        if offline:  # a resumed run's, stopped amid it
            self._evaluate_offline()
        else:
            before = args.offline_updates + (self.phase - 1) * args.finetune_updates
        for number in run.updates(name, self.done, stop):
            losses, self.done = self.captured(number), number
            self.last_losses = losses, before + number
            if number % args.log_every == 0 or number == stop:
                run.log_losses(losses, before + number)
                run.log_rate(number, before + number)
                if hasattr(agent, "value"):
                    with kept_rng_state(self.device):  # what is logged changes no run
                        obs = replay.gather(replay.draw_offline(args.batch_size))["obs"]
                        value = agent.value(obs).mean(1).view(self.shape)
                    run.log({"otc/value_mean": value}, before + number)
            if offline:
                self._evaluate_offline()
            if number % args.checkpoint_every == 0:
                self.save()
            run.stop_if_asked(self.save)

    def _evaluate_offline(self) -> None:
        """Where it is time; a stop amid it is heard at once, and the resumed run makes it again."""
        if self.done % self.args.eval_every or self.evaluated == self.done:
            return
        before = get_rng_state(self.device)

        def save() -> None:  # amid the evaluation
            set_rng_state(before, self.device)
            self.save()

        with self.run.stops_at_once(save):
            returns = self.evaluate(0)
        self.evaluated = self.done
        self.run.record_offline(self.done, returns)

    def evaluate(self, k: int) -> list[list[float]]:
        """Returns of --eval-episodes episodes per seed, whose starts depend on --seed and k alone;
        the first of these are those in which D^k starts."""
        envs, S, seed = self.eval_envs, self.args.num_seeds, (self.args.seed, k)
        with kept_rng_state(self.device):  # how often it is evaluated changes no run
            return episode_returns(envs, self.agent, S, seed, self.device, self.graph)

    # Deployments

    def deployments(self) -> Iterator[int]:
        """1 ... K; of a resumed run, those not finished yet."""
        yield from range(max(1, self.phase), self.args.deployments + 1)

    def is_new(self, k: int) -> bool:
        """Not a deployment that a resumed run had made already."""
        return k > self.phase

    def deploy(self, k: int) -> dict[str, np.ndarray]:
        """Run pi^{k-1} for M steps: D^k, for `Replay.add`. Records its return, by whole episodes of
        an evaluation: of those within M steps, whose number depends on their lengths, the mean is
        biased."""
        args, S = self.args, self.args.num_seeds
        with self.run.closed_on_error():
            with self.resumable():
                self.set_deployment(k)
                start, seed = time.perf_counter(), (args.seed, k)
                how = seed, self.device, args.exploration, self.graph
                data, ended = collect(self.envs, self.agent, self.num_steps, *how)
                self.replay.check_views(data["obs"])
                self.steps_per_second = S * self.num_steps / (time.perf_counter() - start)
                returns = self.evaluate(k)
            exploring = None
            if args.exploration != "none":
                exploring = data["rewards"].sum(1), ended
            self.record_return(k - 1, returns, exploring)
        return data

    def enter(self, k: int, measured: dict[str, torch.Tensor]) -> None:
        """From here a resumed run goes on; logs what the strategy measured, (G,) each."""
        speed = torch.full((self.args.num_seeds,), self.steps_per_second)
        with self.run.closed_on_error():
            self.run.log({"time/env_steps_per_second": speed}, k)
            self.run.log({tag: value.view(self.shape) for tag, value in measured.items()}, k)
            if self.args.save_policies:  # first: a run that goes on from phase k does not
                agent = {n: v for n, v in self.agent.state_dict().items() if n != "_extra_state"}
                state = {"agent": agent, "strategy": self.strategy.state_dict(), "deployment": k}
                self.run.save(state, f"policy_{k - 1}.pt")
            self.phase, self.done = k, 0
            self.save()

    def finish(self) -> None:
        """The return of pi^K, and the closing table."""
        K = self.args.deployments
        with self.run.closed_on_error():
            with self.resumable():
                self.set_deployment(K + 1)
                returns = self.evaluate(K + 1)
            self.record_return(K, returns)
        self.run.finish()

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """What is inside is made again by a run that is stopped there; see `Run.stops_at_once`."""
        self.save()
        with self.run.stops_at_once():
            yield

    def set_deployment(self, k: int) -> None:
        """Say to the tasks that change between deployments which it is."""
        for envs in (self.envs, self.eval_envs):
            envs.set_deployment(k, self.args.deployments)

    def record_return(self, k: int, returns, exploring=None) -> None:
        """The return of pi^k."""
        alpha = self.strategy.alpha.view(self.shape)
        self.run.record_return(k, k * self.num_steps, returns, alpha, exploring)


def team_policy(
    agent: nn.Module, obs: np.ndarray, num_seeds: int, device: torch.device, graph: bool = False
) -> Callable:
    """The function from observations of every seed's team, E environments per seed, to actions:
    (S * E, N, obs_dim) -> (S * E, N, action_dim) arrays. Agent number `explorer`, its second
    argument, explores; -1: none does. An agent with a memory, `begin_episodes`, is told where an
    episode begins: everywhere at first, later where the third argument (S * E,) says so. `obs`
    gives the shape; `graph`: as a CUDA graph."""
    N = obs.shape[1]

    def grouped(obs: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(obs).unflatten(0, (num_seeds, -1)).transpose(1, 2).flatten(0, 1)

    by_group = grouped(obs).to(device, copy=True)  # stays where the graph reads it

    def act(explorer: int) -> torch.Tensor:
        actions = agent.act(by_group)  # (G, E, action_dim)
        if explorer >= 0:
            actions[explorer::N] = agent.explore(by_group)[explorer::N]
        return actions.unflatten(0, (num_seeds, -1)).transpose(1, 2).flatten(0, 1)

    graphed = Graphed(act, graph, lambda explorer: explorer)

    def begin(begins: np.ndarray) -> None:
        if hasattr(agent, "begin_episodes"):
            by_seed = torch.as_tensor(begins).view(num_seeds, -1)
            agent.begin_episodes(by_seed.repeat_interleave(N, dim=0).to(device))

    begin(np.ones(len(obs), bool))

    def policy(obs: np.ndarray, explorer: int = -1, begins: np.ndarray | None = None) -> np.ndarray:
        if begins is not None and begins.any():
            begin(begins)
        by_group.copy_(grouped(obs))
        return graphed(explorer).cpu().numpy()

    return policy


def collect(
    envs,
    agent: nn.Module,
    steps: int,
    seed,
    device: torch.device,
    exploration: str = "none",
    graph: bool = False,
):
    """Run pi^{k-1} for M steps, one environment per seed; with sequential exploration agent i
    explores during the i-th of N equal shares of them, section 4.6.

    Returns the arguments of `Replay.add`, and the number of episodes that ended, (S,).
    """
    S, N = envs.num_envs, envs.num_agents
    obs = envs.reset(seed=seed)
    check_finite(0, obs)
    data = {
        "obs": np.empty((S, steps, N, envs.obs_dim), np.float32),
        "actions": np.empty((S, steps, N, envs.action_dim), np.float32),
        "rewards": np.empty((S, steps), np.float32),
        "next_obs": np.empty((S, steps, N, envs.obs_dim), np.float32),
        "terminations": np.empty((S, steps), bool),
        "truncations": np.empty((S, steps), bool),
        "explorer": np.empty((S, steps), np.int8),
    }
    ended = np.zeros(S, int)
    policy, begins = team_policy(agent, obs, S, device, graph), None
    for t in range(steps):
        explorer = t * N // steps if exploration == "sequential" else -1
        actions = finite_actions(policy(obs, explorer, begins))
        next_obs, rewards, terminations, truncations, final_obs = envs.step(envs.to_box(actions))
        ends = terminations, truncations
        step_data = (obs, actions, rewards, final_obs, *ends, explorer)
        for array, value in zip(data.values(), step_data, strict=True):
            array[:, t] = value
        check_finite(t, final_obs, rewards, next_obs)
        begins = terminations | truncations
        ended += begins
        obs = next_obs
    return data, ended


def episode_returns(
    envs, agent: nn.Module, num_seeds: int, seed, device: torch.device, graph: bool = False
) -> list[list[float]]:
    """Returns of the first episode in every environment, per seed."""
    obs = envs.reset(seed=seed)
    check_finite(0, obs)
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    policy, begins = team_policy(agent, obs, num_seeds, device, graph), None
    for t in itertools.count():
        if not running.any():
            return returns.reshape(num_seeds, -1).tolist()
        actions = envs.to_box(finite_actions(policy(obs, begins=begins)))
        obs, rewards, terminations, truncations, final_obs = envs.step(actions)
        check_finite(t, final_obs, rewards, obs)
        returns += rewards * running
        begins = terminations | truncations
        running &= ~begins


def finite_actions(actions: np.ndarray) -> np.ndarray:
    """Raises InputError where the policy gave a number that is none."""
    if not np.isfinite(actions).all():
        raise InputError("the policy gave an action that is not finite: the training diverged")
    return actions


def check_finite(step: int, obs: np.ndarray, rewards=None, next_start=None) -> None:
    """Raises InputError where the environment gave a number that is none; a reset gives obs
    alone."""
    named = (("observation", obs), ("reward", rewards), ("observation", next_start))
    for name, values in named:
        if values is not None and not np.isfinite(values).all():
            where = np.argwhere(~np.isfinite(values))[0].tolist()
            agent = f", agent {where[1]}" if len(where) > 1 else ""
            raise InputError(
                f"the environment gave a {name} that is not finite ({values[tuple(where)]}): step "
                f"{step + 1}, environment {where[0]}{agent}"
            )
