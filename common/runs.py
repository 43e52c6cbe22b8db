"""A run's folder: TensorBoard, returns.csv, checkpoints; its progress and closing table."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

import filelock
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from common import InputError, Stopped, code_version, expanded, release
from common.checkpoints import FORMAT, read_record, seeds_folders, stamp_of, write_beside
from common.datasets import is_omar, parse_env
from common.envs.tasks import normalized_score, win_rate
from common.strategies import strategy_name

# What a finished run can be followed by
NEXT = {
    "benchmarks": "python -m benchmarks.plot_run {} --figure run.png",
    "tools": "python -m tools.render --run {} --out policy.gif",
}

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

# --- Run ---


def spread(returns: list[list[float]]) -> str:
    """The standard deviation over seeds of their mean returns, or over a single seed's episodes."""
    if len(returns) > 1:
        return f" +- {np.std([np.mean(r) for r in returns]):.1f} over seeds"
    return f" +- {np.std(returns[0]):.1f}"


@np.errstate(divide="ignore", invalid="ignore")  # no improvement in % of 0
def closing_table(seeds: list[int], rows: list[list[dict]]) -> str:
    """Return of pi^0 and pi^K, the improvement and pi^K's score, and of tasks that can be won how
    often both win: a line per seed, then over seeds. Without deployments pi^0 alone."""
    first, last = ({n: np.array([its[i][n] for its in rows]) for n in rows[0][i]} for i in (0, -1))
    ends = {f"pi^{end['deployment'][0]}": end for end in (first, last)}
    columns = [(name, end["mean_return"], 12, "") for name, end in ends.items()]
    if len(ends) > 1:
        before, after = (end["mean_return"] for end in ends.values())
        columns.append(("improvement", 100 * (after - before) / np.abs(before), 12, " %"))
    columns.append(("score", last["normalized_score"], 9, ""))
    if "win_rate" in first:
        wins = ((f"won by {name}", 100 * end["win_rate"]) for name, end in ends.items())
        columns += [(*each, 12, " %") for each in wins]
    names = list(map(str, seeds))
    if len(seeds) > 1:
        names += ["mean", "std"]
        columns = [(n, np.append(x, [x.mean(), x.std()]), w, unit) for n, x, w, unit in columns]
    lines = [f"{'seed':>12}" + "".join(f"{n:>{w + len(unit)}}" for n, _, w, unit in columns)]
    for i, name in enumerate(names):
        cells = (f"{x[i]:{width}.1f}{unit}" for _, x, width, unit in columns)
        lines.append(f"{name:>12}" + "".join(cells))
    return "\n".join(lines)


EVENTS = "events.out.tfevents."


def given_name(path: Path) -> str:
    """The end of the name by which TensorBoard's file was opened, whatever it is called now."""
    return re.sub("^0{4}[0-9]{6}[.]", "", path.name.removeprefix(EVENTS))


class Run:
    """One folder per seed: `{run_dir}/{env}__{script}__{strategy}__{seed}__{time}/`.

    Args:
        args: the script's arguments.
        script: its name.
        checkpoint: what `read_resumed` returned for --resume, else None.
        data_return: mean return of the data's episodes, for the record.
        num_agents: of a team, in the groups of what is logged.
        references: an own task's returns of score 0 and 100.

    Raises:
        InputError: the folder cannot be made, a resumed run's is missing, or another process writes
            it or went on with it since the checkpoint was read.
    """

    unfinished: "Run | None" = None
    """this process's latest run, until it is finished"""

    def __init__(
        self,
        args,
        script: str,
        checkpoint: dict | None = None,
        data_return: float | None = None,
        num_agents: int = 1,
        references: tuple[float, float] | None = None,
    ):
        self.num_agents, self.references = num_agents, references
        self.args, self.script = args, script
        self.seeds = [args.seed + s for s in range(args.num_seeds)]
        self.rows: list[list[dict]] = [[] for _ in self.seeds]
        self.stop_signal, self.at_stop, self.writers, self.handlers = None, None, [], {}
        if checkpoint is not None:
            self.folders = seeds_folders(args.resume)
            for folder in self.folders:
                if not folder.is_dir():
                    raise InputError(f"--resume {args.resume}: {folder}, of its seeds, is missing")
            self.rows = checkpoint["rows"]
            was, now = read_record(args.resume).get("code"), code_version()
            if was != now:
                print(f"note: begun with code {was}, going on with {now}", file=sys.stderr)
        else:
            self.folders = self._make_folders(data_return)
        self._lock()
        path = self.folders[0] / "checkpoint.pt"
        if checkpoint is not None and stamp_of(path) != checkpoint["stamp"]:
            release(self.lock)  # that was another's while the data was loaded here
            raise InputError(
                f"another process went on with {self.folders[0]} meanwhile: the same command goes "
                "on from there"
            )
        Run.unfinished = self
        if args.track:
            self._track()
        if checkpoint is not None:
            self._forget_events_after(checkpoint["events"])
        self.writers = [SummaryWriter(str(folder)) for folder in self.folders]
        if checkpoint is None:
            self._log_arguments()
        if threading.current_thread() is threading.main_thread():  # no other may set them
            for number in filter(None, (getattr(signal, name, None) for name in SIGNALS)):
                is_ignored = signal.getsignal(number) == signal.SIG_IGN
                if not is_ignored or number in (signal.SIGINT, signal.SIGTERM):  # as nohup asks
                    self.handlers[number] = signal.signal(number, self._on_signal)

    def _lock(self) -> None:
        """One process at a time; the lock ends with the process, whatever ends it."""
        self.lock = filelock.FileLock(self.folders[0] / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            text = f"{self.folders[0]} is being written by another process"
            raise InputError(text) from None
        except (OSError, NotImplementedError):
            pass  # a file system without locks

    def _make_folders(self, data_return: float | None) -> list[Path]:
        env = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.args.env)
        base, args = expanded(self.args.run_dir), dataclasses.asdict(self.args)
        what = f"{env}__{self.script}__{strategy_name(args)}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            stamp = int(time.time())  # another run may have begun in the same second
            while True:
                names = [f"{what}__{seed}__{stamp}" for seed in self.seeds]
                folders = [base / name for name in names]
                try:
                    for folder in folders:
                        folder.mkdir()
                    break
                except FileExistsError:
                    for made in folders[: folders.index(folder)]:
                        made.rmdir()
                    stamp += 1
            content = {"args": args, "script": self.script, "code": code_version()}
            content["data_return"] = data_return
            for seed, folder in zip(self.seeds, folders, strict=True):
                text = json.dumps({**content, "folders": names, "seed": seed}, indent=2)
                write_beside(folder / "args.json", text.encode())
        except OSError as error:
            raise InputError(f"--run-dir {base}: cannot write there ({error.strerror})") from None
        return folders

    def _events(self) -> list[dict[str, int]]:
        """TensorBoard's files of every seed and how long they are."""
        for writer in self.writers:
            writer.flush()
        files = [folder.glob(f"{EVENTS}*") for folder in self.folders]
        return [{given_name(path): path.stat().st_size for path in paths} for paths in files]

    def _forget_events_after(self, events: list[dict[str, int]]) -> None:
        """What was logged after the checkpoint is logged again, in a file that TensorBoard reads
        after the others: by their names, which begin with the second of the clock."""
        for folder, sizes in zip(self.folders, events, strict=True):
            kept = []
            for path in sorted(folder.glob(f"{EVENTS}*")):
                size = sizes.get(given_name(path))
                if size is None:
                    path.unlink()
                    continue
                if path.stat().st_size > size:
                    os.truncate(path, size)
                kept.append(path)
            if kept and kept[-1].name >= f"{EVENTS}{int(time.time()):010d}":  # it was set back
                for number, path in enumerate(kept):
                    path.rename(folder / f"{EVENTS}{number:010d}.{given_name(path)}")

    def _log_arguments(self) -> None:
        """As a table, and as the hyperparameters that TensorBoard filters and sorts runs by."""
        args = dataclasses.asdict(self.args)
        table = "\n".join(f"|{k}|{v}|" for k, v in args.items())
        args |= {"script": self.script, "strategy": strategy_name(args)}
        for writer, seed in zip(self.writers, self.seeds, strict=True):
            writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{table}")
            values = {k: v for k, v in (args | {"seed": seed}).items() if v is not None}
            _, *session = hparams(values, {})  # of all runs together TensorBoard makes the table
            for summary in session:
                writer.file_writer.add_summary(summary)

    def _track(self) -> None:
        """Everything that TensorBoard gets, to Weights & Biases as well."""
        import wandb

        project, entity = self.args.wandb_project_name, self.args.wandb_entity
        config, name = dataclasses.asdict(self.args), self.folders[0].name
        wandb.init(
            project=project, entity=entity, config=config, name=name, id=name, resume="allow",
            sync_tensorboard=True, dir=str(self.folders[0]),
        )  # fmt: skip

    def _on_signal(self, number, frame) -> None:
        if self.stop_signal is not None:  # asked twice: do not wait for the next update
            raise KeyboardInterrupt
        self.stop_signal = number
        if self.at_stop is not None:
            self.stop_if_asked(self.at_stop)

    @contextlib.contextmanager
    def stops_at_once(self, save: Callable = lambda: None) -> Iterator[None]:
        """What is inside is made again by the resumed run, which goes on from what `save` saves.
        Nothing inside may log: a signal's handler closes the writers, which have locks."""
        self.stop_if_asked(save)
        self.at_stop = save
        yield
        self.at_stop = None

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Whoever catches what is raised inside finds signals and the folder free again."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    # Logging

    def log(self, scalars: dict, step: int) -> None:
        """Write {tag: values (S,), or (S, N) for one tag per agent} to every seed's TensorBoard."""
        for tag, values in scalars.items():
            values = values.tolist()
            for writer, value in zip(self.writers, values, strict=True):
                if isinstance(value, list):
                    for agent, each in enumerate(value):
                        writer.add_scalar(f"{tag}_agent_{agent}", each, step)
                else:
                    writer.add_scalar(tag, value, step)

    def log_losses(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """Write {tag: (G,)}, averaged over the agents of each seed; one transfer for all."""
        stacked = torch.stack([value.float() for value in losses.values()]).cpu()  # (tags, G)
        per_seed = stacked.view(len(losses), len(self.seeds), -1).mean(dim=2)
        self.log(dict(zip(losses, per_seed, strict=True)), step)
        self.refuse_divergence(dict(zip(losses, stacked, strict=True)), step)

    def refuse_divergence(self, losses: dict[str, torch.Tensor], step: int) -> None:
        """Raises InputError where a loss (G,) is not finite: before it is in a checkpoint."""
        for tag, values in losses.items():
            if not tag.startswith("losses/"):
                continue
            is_finite = values.isfinite().tolist()
            if not all(is_finite):
                seed, agent = divmod(is_finite.index(False), self.num_agents)
                raise InputError(
                    f"{tag} of seed {self.seeds[seed]}, agent {agent} is not finite after "
                    f"{step:,} updates: the training diverged (learning rate, scale of the data?)"
                )

    def log_rate(self, update: int, step: int) -> None:
        """Updates per second of a phase since the last time."""
        (before, then), self.counted = self.counted, (update, time.perf_counter())
        rate = (update - before) / (self.counted[1] - then)
        self.log({"time/updates_per_second": torch.full((len(self.seeds),), rate)}, step)

    def record_offline(self, update: int, returns: list[list[float]]) -> None:
        """The offline policy's return after so many updates: `offline/episodic_return`, and a
        line."""
        means = np.array([np.mean(r) for r in returns])
        self.log({"offline/episodic_return": means}, update)
        tqdm.write(f"offline, {update} updates: return {means.mean():.1f}{spread(returns)}")

    def record_return(
        self,
        deployment: int,
        env_steps: int,
        returns: list[list[float]],
        alpha: torch.Tensor,
        exploring: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """A row of returns.csv per seed: the return of pi^k, k = `deployment`, from its episodes.

        Args:
            env_steps: online environment steps that pi^k has learned from.
            returns: the episodes' returns of each seed, S lists.
            alpha: (S, N), the alpha^k that pi^k was fine-tuned with; nan without OTC.
            exploring: the sum of rewards of its deployment, which explored, and the episodes that
                ended in it, (S,) each; with --exploration only, and never of pi^K.
        """
        means = np.array([np.mean(r) for r in returns])
        omar_data = is_omar(self.args.dataset)
        task = parse_env(self.args.env)[0]
        scores = normalized_score(task, means, omar_data, self.references)
        wins = [win_rate(task, each) for each in returns]
        for s, rows in enumerate(self.rows):
            row = {
                "deployment": deployment,
                "env_steps": env_steps,
                "episodes": len(returns[s]),
                "mean_return": float(means[s]),
                "std_return": float(np.std(returns[s])),
                "normalized_score": float(scores[s]),
            }
            if wins[s] is not None:
                row["win_rate"] = wins[s]
            if self.args.exploration != "none":
                total, count = (np.nan, 0) if exploring is None else (x[s] for x in exploring)
                row["exploring_episodes"] = int(count)
                row["exploring_return"] = float(total / count) if count else np.nan
            rows.append(
                row | {f"alpha_agent_{i}": float(a) for i, a in enumerate(alpha[s].tolist())}
            )
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_beside(self.folders[s] / "returns.csv", text.getvalue().encode())
        self.log({"charts/episodic_return": means, "charts/normalized_score": scores}, deployment)
        if exploring is not None and exploring[1].all():
            self.log({"charts/exploring_return": exploring[0] / exploring[1]}, deployment)
        score = "" if np.isnan(scores).all() else f", normalised score {scores.mean():.1f}"
        if None not in wins:
            self.log({"charts/win_rate": np.array(wins)}, deployment)
            score += f", {100 * np.mean(wins):.0f} % won"
        score += "" if alpha.isnan().any() else f", alpha {alpha.mean():.2f}"
        tqdm.write(
            f"pi^{deployment}: return {means.mean():.1f}{spread(returns)} "
            f"({sum(map(len, returns))} episodes){score}"
        )

    # Progress and checkpoints

    def updates(self, phase: str, start: int, stop: int) -> Iterator[int]:
        """Count the updates start+1 ... stop of a phase behind a progress bar."""
        self.counted = start, time.perf_counter()
        every = {"unit": "update", "mininterval": 0.3 if sys.stderr.isatty() else 60}
        with tqdm(total=stop, initial=start, desc=phase, leave=False, **every) as bar:
            for update in range(start + 1, stop + 1):
                yield update
                bar.update()

    def save(self, state: dict, name: str = "checkpoint.pt") -> None:
        """Write a checkpoint into the first seed's folder, beside the old one and renamed."""
        content = io.BytesIO()
        state = {**state, "rows": self.rows, "script": self.script, "events": self._events()}
        state |= {"args": dataclasses.asdict(self.args), "format": FORMAT}
        torch.save(state, content)
        write_beside(self.folders[0] / name, content.getvalue())

    def stop_if_asked(self, save: Callable = lambda: None) -> None:
        """After SIGINT or SIGTERM: `save`, say how to go on, exit with status 128 + signal."""
        if self.stop_signal is None:
            return
        self.at_stop = None
        save()
        self.close()
        print(f"stopped; continue with --resume {quote(str(self.folders[0]))}", file=sys.stderr)
        raise Stopped(128 + self.stop_signal)

    def close(self) -> None:
        """Flush TensorBoard, end what is tracked, and put the signals' handlers back."""
        writers, self.writers = self.writers, []
        for writer in writers:
            with contextlib.suppress(OSError):  # a full disk's, said where it was met
                writer.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
        release(self.lock)
        if self.args.track:
            import wandb

            wandb.finish()

    def finish(self) -> None:
        """Print the closing table, and what a finished run can be followed by."""
        with self.closed_on_error():
            for writer in self.writers:
                writer.flush()  # raises what `close` would hide
        self.close()
        Run.unfinished = None
        print("\n" + closing_table(self.seeds, self.rows))
        more = f" and {len(self.seeds) - 1} more" if len(self.seeds) > 1 else ""
        base, folder = (quote(str(x)) for x in (expanded(self.args.run_dir), self.folders[0]))
        print(f"\n{self.folders[0]}{more}\nnext: tensorboard --logdir {base}")
        for package, command in NEXT.items():
            if find_spec(package):  # a script copied with common/ has neither
                print(f"      {command.format(folder)}")
