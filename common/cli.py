"""The command line of every script: arguments that all have, what numbers may be, and how errors
end."""

import ast
import contextlib
import dataclasses
import inspect
import os
import re
import shlex
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import tyro

from common import InputError, checkpoints, flag, runs


@dataclass(frozen=True)
class Range:
    """What a number may be; beside its type, as in `gamma: Share = 0.99`. Without one integers are
    from 1 to a million (sizes, which take memory) and others at least 0."""

    least: float = 0
    most: float = 10**9
    open: bool = False
    """more than `least`"""


Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(open=True)]
Share = Annotated[float, Range(0, 1)]
Device = Literal["auto", "cpu", "cuda"]

# Of an algorithm's arguments, those that say how the policy is tuned and not what it is
OF_TUNING = ("finetune_updates", "distance", "value_mean")
# What --help shows first
DAY_ONE = (
    *("env", "dataset", "sampling", "distance", "seed", "num_seeds"),
    *("offline_updates", "deployments"),
)


@dataclass
class OfflineArgs:
    """Of a script that learns from the offline data alone. A comment as the next one begins a group
    of --help."""

    # Data arguments
    env: str = "halfcheetah-medium"
    """task and data quality; or package.module:factory of a PettingZoo ParallelEnv, together with
    --dataset FILE"""
    dataset: str = "built-in"
    """built-in, d4rl, minari, a D4RL-layout HDF5 file, OMAR's folder, or a Minari id"""
    dataset_size: Count | None = None
    """fewer offline transitions, for a quick look; default: the data's own size"""
    split: str | None = None
    """partition of the joints as AGENTSxJOINTS, such as 1x6 or 6x1; default: the task's own"""
    # Training arguments
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1
    """first seed"""
    num_seeds: int = 1
    """seeds `seed ... seed+num_seeds-1`, trained together and logged as separate runs"""
    offline_updates: Natural = 100_000
    """updates on the offline data, before any deployment"""
    batch_size: int = 128
    """transitions per update"""
    eval_every: Count = 10_000
    """offline updates between two evaluations"""
    eval_episodes: int = 10
    """episodes of every evaluation and seed"""
    # Run arguments
    checkpoint_every: Count = 10_000
    """updates between two checkpoints; deployments have their own"""
    env_workers: Natural | None = None
    """processes beside this one that step the environments, the numbers stay the same; default: one
    per further free core where there are enough environments, none for own tasks and those that
    step as one batch"""
    device: Device = "auto"
    """auto: CUDA where there is one"""
    threads: int | None = None
    """of the CPU; default: OMP_NUM_THREADS where it is set, else 1: a second one gains nothing here
    and stalls the first wherever it has to wait for its core"""
    cuda_graph: bool = True
    """on CUDA, capture the whole update in one graph"""
    log_every: Count = 500
    """updates between two rows of losses, besides that at the end of every phase"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "otc"
    """its project"""
    wandb_entity: str | None = None
    """its team; default: your own"""
    run_dir: str = "runs"
    """folder of the run folders"""
    resume: str | None = None
    """run folder to continue, with the arguments it was started with"""

    # In what --offline-checkpoint's run must agree; a script may have more
    SAME_POLICY: ClassVar = (
        *("env", "dataset_size", "split", "seed", "num_seeds", "hidden_size", "offline_updates"),
    )
    # None of these; `OnlineArgs` has them
    deployments: ClassVar[int] = 0
    exploration: ClassVar[str] = "none"
    offline_checkpoint: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Take NumPy's numbers and paths, as a notebook may give them, for what they hold."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                setattr(self, field.name, value.item())
            elif isinstance(value, os.PathLike):
                setattr(self, field.name, os.fspath(value))

    def check(self) -> None:
        """Refuse what several arguments forbid together; a script adds its own rules.

        Raises:
            InputError: names the flags and what they may be.
        """
        if self.track and find_spec("wandb") is None:
            raise InputError("--track needs Weights & Biases: pip install wandb")


@dataclass
class OnlineArgs(OfflineArgs):
    """Of a script whose policies are deployed and fine-tuned."""

    # Deployment arguments
    deployments: Natural = 10
    """K, the number of deployments"""
    deployment_steps: Count | None = None
    """M, environment steps per deployment and seed; default: 1 % of the offline data"""
    save_policies: bool = False
    """keep every deployed policy with OTC's state, policy_k.pt, for benchmarks.correction"""
    exploration: Literal["none", "sequential"] = "none"
    """deployed agents only exploit, or each in turn explores for an equal share of the M steps; the
    evaluations never explore"""
    offline_checkpoint: str | None = None
    """run folder whose offline policy to start the deployments from, instead of training one, with
    its arguments of data, training and algorithm where no others are given"""

    def check(self) -> None:
        super().check()
        its = vars(self).get  # the OTC block is the script's: one that was changed may lack some
        if not its("replacement", True) and self.batch_size > self.candidates:
            raise InputError(
                f"--no-replacement draws --batch-size {self.batch_size} different transitions out "
                f"of --candidates {self.candidates}: it needs at least as many candidates"
            )
        alpha_max = its("alpha_max")
        if alpha_max is not None and not (self.adaptive_alpha and alpha_max >= self.alpha):
            raise InputError(
                f"--alpha-max {alpha_max} caps an adaptive alpha: it goes without "
                f"--no-adaptive-alpha, and is at least --alpha {self.alpha}"
            )
        if its("exclude_self_matches") and self.references < 2:
            raise InputError(
                f"--exclude-self-matches needs --references 2 or more, not {self.references}"
            )


# In the RuntimeErrors of torch and CUDA; not every allocation is one of memory
NO_MEMORY = (
    *("alloc_", "allocate", "allocator", "memory allocation", "memoryallocation"),
    *("out of memory", "overflow"),
)


def cli(main: Callable, args_type: type, parser: Callable | None = None) -> None:
    """Parse the command line into `args_type` and call `main(args)`. InputError, and what the
    system refuses (files, memory), become a line or two and exit status 2, Ctrl-C status 130.
    `parser`: `tyro.cli` for other commands than the scripts."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    threading.excepthook = report_thread
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and 0 < int(columns) < 20:  # below 6 the help is never done
        os.environ["COLUMNS"] = "20"
    try:
        for word in sys.argv[1:]:
            if any("\ud800" <= c <= "\udfff" for c in word):  # TensorBoard's files cannot hold it
                raise InputError(f"{ascii(word)} is not UTF-8")
        args = (parser or parse)(args_type, description=sys.modules[main.__module__].__doc__)
        if parser is not None and dataclasses.is_dataclass(args):
            check_ranges(args)
        main(args)
    except KeyboardInterrupt:  # before training, which saves and says how to go on
        say("interrupted")
        sys.exit(130)
    except Exception as error:
        text = str(error)
        if isinstance(error, RuntimeError) and any(word in text.lower() for word in NO_MEMORY):
            error = MemoryError(text.splitlines()[0])
        if not isinstance(error, InputError | OSError | MemoryError):
            say_how_to_go_on()
            raise
        if isinstance(error, BrokenPipeError):  # nobody reads on: nor may the last flush fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        what = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        say(f"error: {what}{error}")
        say_how_to_go_on()
        sys.exit(2)
    finally:
        if runs.Run.unfinished is not None:
            runs.Run.unfinished.close()
            runs.Run.unfinished = None


def report_thread(failed) -> None:
    """What ended a thread; of TensorBoard's writers the next call raises the same."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


def say_how_to_go_on() -> None:
    """Where the run that broke off has a checkpoint."""
    run = runs.Run.unfinished
    if run is not None and (run.folders[0] / "checkpoint.pt").exists():
        say(f"continue with --resume {shlex.quote(str(run.folders[0]))}")


def say(text: str) -> None:
    """To stderr, where there is one, at most two lines' worth of text."""
    text = text if len(text) <= 500 else f"{text[:400]} ... {text[-80:]}"
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)


def parse(args_type: type, argv: list[str] | None = None, description: str | None = None):
    """The arguments of `argv`; with --resume, those of the resumed run, from which no other flag
    may differ.

    Raises:
        InputError: a count out of range, or a flag that differs from the resumed run's.
    """
    args = parse_flags(args_type, argv, description=description)
    if args.resume is None and args.offline_checkpoint is not None:
        args = parse_flags(args_type, argv, default=with_those_of(args, args.offline_checkpoint))
    if args.resume is not None:
        record = checkpoints.read_record(args.resume)
        if is_of_another(record, args_type):
            raise InputError(f"{args.resume} is a run of {record['script']}, not of this script")
        its = checkpoints.args_of(args.resume, args_type)
        stored = dataclasses.replace(its, resume=args.resume)
        check_types(stored, f"{args.resume}/args.json")
        asked = parse_flags(args_type, argv, default=stored)
        for field in dataclasses.fields(args_type):
            was, now = getattr(stored, field.name), getattr(asked, field.name)
            if was != now and field.name != "dataset":  # which may have moved; it is compared
                raise InputError(
                    f"--resume continues a run as it was: {flag(field.name)} is {was} there, not "
                    f"{now}"
                )
        args = dataclasses.replace(stored, dataset=asked.dataset)
    check_ranges(args)
    args.check()
    return args


def parse_flags(args_type: type, argv: list[str] | None, description=None, default=None):
    """The arguments of `argv`, those of `default` where it names none; --help in groups."""
    default, hints = default or args_type(), get_type_hints(args_type, include_extras=True)
    groups: dict[str, list] = {"day-one": []}
    for name, (group, text) in described(args_type).items():
        hint = Annotated[hints[name], tyro.conf.arg(help=text)]
        field = name, hint, dataclasses.field(default=getattr(default, name))
        groups.setdefault("day-one" if name in DAY_ONE else group, []).append(field)
    groups["day-one"].sort(key=lambda field: DAY_ONE.index(field[0]))
    groups["run"] = groups.pop("run", [])  # last
    grouped = [
        (group, tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass(group.upper(), fields)])
        for group, fields in ((re.sub(r"\W", "_", name), fields) for name, fields in groups.items())
    ]
    found = tyro.cli(
        dataclasses.make_dataclass("Flags", grouped), args=argv, description=description
    )
    return args_type(**{k: v for group in vars(found).values() for k, v in vars(group).items()})


def described(args_type: type) -> dict[str, tuple[str, str]]:
    """The group and the help of each argument, from the source: the comment `# ... arguments` above
    it and the string below."""
    found: dict[str, tuple[str, str]] = {}
    for each in filter(dataclasses.is_dataclass, reversed(args_type.__mro__)):
        source = textwrap.dedent(inspect.getsource(each))
        group, body = each.__name__.lower(), ast.parse(source).body[0].body
        names = {field.name for field in dataclasses.fields(each)}
        headings = re.compile(r"^    # (.+) arguments", re.MULTILINE)
        for node, below in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or node.target.id not in names:
                continue
            above = "\n".join(source.splitlines()[: node.lineno])
            group = [group, *(heading.lower() for heading in headings.findall(above))][-1]
            was = found.get(node.target.id, (group, ""))
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            text = " ".join(below.value.value.split()) if is_text else was[1]
            found[node.target.id] = was[0], text
    return {field.name: found[field.name] for field in dataclasses.fields(args_type)}


def is_of_another(record: dict, args_type: type) -> bool:
    """Whether a run's record is of another script than the one whose arguments these are."""
    return record["script"] != Path(inspect.getfile(args_type)).stem


def with_those_of(args, folder: str):
    """The arguments, of which those of data, training and algorithm are an earlier run's."""
    record, taken = checkpoints.read_record(folder), {}
    if is_of_another(record, type(args)):
        return args  # which is refused where its checkpoint is read
    its = record["args"]
    for name, (group, _) in described(type(args)).items():
        is_policys = group not in ("deployment", "otc", "run") and name not in OF_TUNING
        if name in its and (is_policys or name in args.SAME_POLICY):
            taken[name] = its[name]
    args = dataclasses.replace(args, **taken)
    check_types(args, f"{folder}/args.json")
    return args


def check_types(args, where: str) -> None:
    """Refuse a value that no flag could have given.

    Raises:
        InputError: names the argument and its value.
    """
    hints = get_type_hints(type(args))
    for field in dataclasses.fields(args):
        value, hint = getattr(args, field.name), hints[field.name]
        parts = get_args(hint) or (hint,)  # of a union, of a Literal, or the type itself
        choices = [x for y in parts for x in (get_args(y) if get_origin(y) is Literal else (y,))]
        is_valid = any(
            type(value) is x or value == x or (x is float and type(value) is int)
            for x in choices
            if isinstance(x, type) or isinstance(value, str)
        )
        if not is_valid:
            raise InputError(f"{where}: {field.name} is {value!r}, which it cannot be")


def range_of(hint) -> Range | None:
    """The range in a type, also of `Positive | None`."""
    for each in (hint, *get_args(hint)):
        for mark in getattr(each, "__metadata__", ()):
            if isinstance(mark, Range):
                return mark
    return None


def check_ranges(args) -> None:
    """Refuse a number, also one of several and those of arguments within, that is out of its range.

    Raises:
        InputError: names the flag, its value and what it may be.
    """
    hints = get_type_hints(type(args), include_extras=True)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    numbers = [(n, x) for n, v in given.items() for x in (v if isinstance(v, tuple) else (v,))]
    for name, value in numbers:
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        hint = hints[name]
        is_float = float in (hint, *get_args(hint))  # which may hold an int, from a notebook
        may_be = range_of(hint) or (Range() if is_float else Range(1, 10**6))
        expected = "more than 0" if may_be.open else f"at least {may_be.least}"
        limited = may_be.most <= 1 or value > may_be.most
        expected += f" and at most {may_be.most}" if limited else ""
        too_small = value < may_be.least or (value == may_be.least and may_be.open)
        if too_small or not value <= may_be.most:  # nan is not either
            raise InputError(f"{flag(name)} is {value}; it must be {expected}")


def deployment_steps(args, dataset_size: int) -> int:
    """M, the environment steps of one deployment: --deployment-steps or 1 % of the offline data.

    Raises:
        InputError: OTC needs more different references than one deployment collects.
    """
    if not args.deployments:
        return 1
    steps = args.deployment_steps or max(1, dataset_size // 100)
    references = getattr(args, "references", 0)
    if getattr(args, "sampling", "otc") == "otc" and references > steps:
        raise InputError(
            f"--references {references}: one deployment collects only {steps} transitions "
            f"(1 % of the offline data unless set); lower --references or raise --deployment-steps"
        )
    return steps
