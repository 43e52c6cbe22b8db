"""Are the pages true? Their commands parse, or run, and their tables are those of the raw files.

    python -m tools.check_docs                       # every command's flags, every table; a minute
    python -m tools.check_docs --run docs/omar.md    # runs a page's commands, made short

Commands are the indented and fenced lines that begin with `python`, and such code in a sentence if
it has flags. They run in a copy of the repository: the scripts with the tests' few updates, sweeps
as plans, and of the benchmarks those that `SHORT` makes short. What needs a file that is not here
is skipped.

Compared with the raw files that their section links: tables with a column for every pi^k, and those
whose columns are a raw file's.
"""

import argparse
import ast
import csv
import importlib
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import tyro

from common import InputError, cli

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
# Those whose docstrings have commands too; the worker is started by benchmarks.peers
MODULES = sorted(
    path
    for folder in (".", "benchmarks", "tools", "behaviours", "examples")
    for path in ROOT.glob(f"{folder}/*.py")
    if path.stem not in ("d3rlpy_worker", "torchrl_worker")
)
# Flags that make a benchmark short; one without a row is parsed, not run
SHORT = {
    "benchmarks.aggregate": "--resamples 100",
    "benchmarks.correction": "--at 1 --draws 1 --embedding-updates 5",
    "benchmarks.embedding_kl": "--updates 5 --envs halfcheetah-medium --csv kl.csv",
    "benchmarks.env_workers": "--steps 5 --repetitions 1 --tasks hopper",
    "benchmarks.maze": "--episodes 2",
    "benchmarks.omar_sampler": "--states 10",
    "benchmarks.plot_run": "",
    "benchmarks.scalars": "",
    "benchmarks.sweep": "",
    "benchmarks.tabular_team": "--num-seeds 1 --offline 2000 --deployments 1",
    "benchmarks.value_actions": "--counts 1 3",
    "examples.own_task": "",
    "tools.check_data": "",
    "tools.render": "--steps 3",
}
# What stands for something of the reader's own
OWN = re.compile(r"\b[A-Z]{3,}\b|^(datasets|snapshots)/")


# --- Commands ---


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, or of a module's docstring, each once, without the
    variables set before it."""
    text = page.read_text()
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    inline = re.findall(r"`((?:\w+=\S+ )?python [^`]+ -[^`]+|python \w+\.py [^`]+)`", text)
    blocks = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in blocks.splitlines() if re.match(r"\s{4}|(\w+=\S+ )?python ", line)]
    found = []
    for line in [*lines, *inline]:
        for name, values in re.findall(r"for (\w+) in ([^;]+);", blocks):
            line = line.replace(f"${name}", values.split()[0])
        for part in re.split(r"&&|;|\|", line):
            found_one = re.match(r"\s*(?:\w+=\S+ )*((?:python|pip|mkdocs) .+)", part, re.DOTALL)
            if found_one:
                words = shlex.split(found_one[1], comments=True)
                if words not in found:
                    found.append(words)
    return found


def split(words: list[str]) -> tuple[str, list[str]]:
    """The module and the arguments of `python -m MODULE ...` or `python SCRIPT.py ...`."""
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py"), words[2:]


class Parsed(Exception):
    """The arguments are fine."""


def parse(words: list[str]) -> None:
    """Refuse a command that its script would refuse.

    Raises:
        InputError, SystemExit: as the script would end.
    """
    if words[0] != "python":
        if "-r" in words and not (ROOT / words[words.index("-r") + 1]).exists():
            raise InputError(f"no {words[words.index('-r') + 1]}")
        return
    name, argv = split(words)
    if name == "pytest":
        return
    module = importlib.import_module(name)
    if "--help" in argv or not hasattr(module, "main"):
        return
    if hasattr(module, "choose"):  # a script with its flags
        args_type, _, argv = module.choose(argv)
        cli.parse(args_type, argv)
    elif not hasattr(module, "Args"):  # argparse, in main
        original = argparse.ArgumentParser.parse_args

        def stop(parser, argv=None):
            original(parser, argv)
            raise Parsed

        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
            try:
                module.main(argv) if argv else None
            except Parsed:
                pass
    elif issubclass(module.Args, cli.OfflineArgs):
        args = cli.parse_flags(module.Args, argv)
        cli.check_ranges(args)
        args.check()
    else:
        tyro.cli(module.Args, args=argv)


def short(words: list[str], folder: Path) -> list[str] | str:
    """The command as it is run in `folder`, or why it is not."""
    from tests.helpers import SCRIPTS, tiny

    if words[0] != "python":
        return "installs"
    name, argv = split(words)
    runs = sorted(folder.glob("runs/*"), key=os.path.getmtime)
    if "--help" in argv:
        return words
    if name in SCRIPTS:
        runs = [run for run in runs if f"__{name}__" in run.name]
        if "5m_vs_6m" in " ".join(argv) and find_spec("jax") is None:
            return "needs JAX"
        extra = (
            []
            if "--resume" in argv
            else [*tiny(name), "--eval-episodes", "1", "--env-workers", "0"]
        )
        if "--candidates" in extra:  # of which a deployment has to hold each agent's, later
            extra += ["--candidates", "20"]
        if extra and "--dataset" not in argv:
            extra += ["--dataset-size", "3000"]
        asked = importlib.import_module(name).Args().__dict__.get("deployments")
        if "--deployments" in argv:
            asked = int(argv[argv.index("--deployments") + 1])
        if asked == 0:
            extra += ["--deployments", "0"]
        if "--refit" in argv:  # of which some are the elite
            extra += ["--sampler-samples", "20"]
        if "--finetune" in argv:
            extra += ["--model-updates", "8"]
    elif name in SHORT:
        extra = SHORT[name].split()
        if name == "benchmarks.sweep" and "quick" not in words[-1]:
            argv = ["plan" if word == "run" else word for word in argv]
    else:
        return "takes long"
    argv = [str(runs[-1].relative_to(folder)) if w == "runs/RUN" and runs else w for w in argv]
    for word in argv:
        is_missing = re.match(r"(runs|sweeps)/", word) and not (folder / word).exists()
        if OWN.search(word) or (is_missing and not word.endswith((".csv", ".png"))):
            return f"needs {word}"
    return [*words[: 3 if words[1] == "-m" else 2], *argv, *extra]


def run(page: Path, timeout: float = 600) -> list[str]:
    """Run a page's commands one after another; what failed, a text each. Where one names a run,
    there is one."""
    from tests.helpers import SCRIPTS

    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
        for file in filter(lambda file: (ROOT / file).is_file(), files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        found = commands(page)
        for name in {split(words)[0] for words in found if "runs/RUN" in words}:
            found.insert(0, ["python", f"{name if name in SCRIPTS else 'otc_bcq'}.py"])
        for words in found:
            line = short(words, folder)
            if isinstance(line, str):
                print(f"not run, {line}: {shlex.join(words)}", flush=True)
                continue
            start = time.monotonic()
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
            with subprocess.Popen(
                [sys.executable, *line[1:]],
                cwd=folder,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            ) as process:
                try:
                    said, _ = process.communicate(timeout=timeout)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGTERM)  # a sweep's jobs too
                    said = f"took more than {timeout:.0f} s"
            state = "ok" if process.returncode == 0 else f"status {process.returncode}"
            print(f"{state}, {time.monotonic() - start:.0f} s: {shlex.join(line)}", flush=True)
            if process.returncode:
                failures.append(f"{page.name}: {shlex.join(line)}\n{said[-1000:]}")
    return failures


# --- Tables ---


def sections(page: Path):
    """The tables of each section, as lists of rows of cells, and the raw files that it links."""
    for section in re.split(r"(?m)^#+ ", page.read_text()):
        raw = [page.parent / link for link in re.findall(r"\]\(([^)#\s]+\.csv)\)", section)]
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            rows = [
                [cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")
            ]
            yield [row for i, row in enumerate(rows) if i != 1 and row != [""]], raw


def rounded(cell: str, value: float) -> bool:
    """Whether a cell shows a number, at the digits that it has."""
    text = cell.replace(",", "").rstrip(" %")
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


def differences(page: Path) -> tuple[list[str], int]:
    """The rows that no raw file has, and how many rows were compared."""
    wrong, compared = [], 0
    for (header, *rows), raw in sections(page):
        missing = [path for path in raw if not path.is_file()]
        if missing:
            wrong.append(f"{page.name}: no file {missing[0]}")
            continue
        records = {path: list(csv.DictReader(path.open())) for path in raw}
        policies = [i for i, name in enumerate(header) if re.fullmatch(r"pi\^\d+", name)]
        if policies:
            for row in rows:
                label = re.sub(r" *\(\[raw\].*?\)\)| *,? *\*[^*]*\*", "", row[policies[0] - 1])
                found = [ours(r, label) for r in records.values() if ours(r, label)]
                if not all(" +- " in row[i] for i in policies):
                    continue
                compared += bool(found)
                if found and not any(shows(row, header, policies, numbers) for numbers in found):
                    wrong.append(f"{page.name}: {' | '.join(row)}")
            continue
        for table in records.values():
            if not table or not set(header) <= set(table[0]):
                continue
            for row in rows:
                compared += 1
                if not any(equal(row, [record[name] for name in header]) for record in table):
                    wrong.append(f"{page.name}: {' | '.join(row)}")
    return wrong, compared


def ours(records: list[dict], label: str) -> dict[str, dict[str, list[float]]]:
    """The numbers of a strategy by column and deployment, one per seed."""
    numbers = {}
    for record in records:
        if record.get("strategy") == label and "deployment" in record:
            for name in ("mean_return", "win_rate"):
                if record.get(name):
                    per_deployment = numbers.setdefault(name, {})
                    per_deployment.setdefault(record["deployment"], []).append(float(record[name]))
    return numbers


def shows(row, header, policies, numbers) -> bool:
    for by_deployment in numbers.values():
        cells = [(row[i].split(" +- "), by_deployment.get(header[i][3:], [])) for i in policies]
        if all(
            len(values) > 1
            and rounded(mean, statistics.mean(values))
            and rounded(std, statistics.pstdev(values))
            for (mean, std), values in cells
        ):
            return True
    return False


def equal(row: list[str], record: list[str]) -> bool:
    for cell, value in zip(row, record, strict=True):
        try:
            if not rounded(cell, float(value)):
                return False
        except ValueError:
            if cell.strip("`") != value:
                return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.check_docs")
    parser.add_argument("--run", action="store_true", help="run the commands, made short")
    parser.add_argument("pages", nargs="*", type=Path, help="default: all")
    args = parser.parse_args(argv)
    pages = [page.resolve() for page in args.pages] or [*PAGES, *MODULES]
    for page in pages:
        if not page.is_file():
            parser.error(f"no page {page}")
    failures = []
    for page in pages:
        wrong, compared = differences(page) if page.suffix == ".md" else ([], 0)
        failures += wrong
        print(f"{page.name}: {len(commands(page))} commands, {compared} rows compared", flush=True)
        if args.run:
            failures += run(page)
            continue
        for words in commands(page):
            try:
                parse(words)
            except (InputError, SystemExit, ImportError) as error:
                failures.append(f"{page.name}: {shlex.join(words)}: {error}")
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
