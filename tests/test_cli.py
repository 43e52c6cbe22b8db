"""The command line: what --help shows, and in which order."""

import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import typing

import pytest

from common import InputError, cli, strategies
from tests.helpers import WITH_OTC, every_script


@every_script
def test_help_shows_every_argument_once_in_groups_day_one_first(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        cli.cli(module.main, module.Args)
    assert exit.value.code == 0
    text = capsys.readouterr().out
    names = re.findall(r"^. (?:-h, )?--([a-z0-9-]+)", text, re.MULTILINE)
    fields = [cli.flag(field.name)[2:] for field in dataclasses.fields(module.Args)]
    assert sorted(names) == sorted([*fields, "help"])
    first = [name for name in (cli.flag(name)[2:] for name in cli.DAY_ONE) if name in fields]
    assert names[1 : 1 + len(first)] == first
    groups = re.findall(r"([\w-]+) options ", text)
    expected = ["day-one", "data", "training"]
    expected += ["deployment", "otc"] if script in WITH_OTC else []
    of_script = groups[len(expected) : -1]  # one, or two where there are two methods
    assert groups == [*expected, *of_script, "run"] and of_script
    assert not {*of_script} & {"day-one", "data", "training", "deployment", "otc", "run"}


@every_script
def test_every_argument_is_explained_where_it_stands(script):
    args_type = importlib.import_module(script).Args
    for name, (_, text) in cli.described(args_type).items():
        sources = [inspect.getsource(each) for each in args_type.__mro__[:-1]]
        assert text and text.split()[0] in "".join(sources), name
    if script not in WITH_OTC:
        return
    exploration = cli.described(args_type)["exploration"]
    assert exploration[0] == "deployment" and exploration[1].startswith("deployed agents")


@every_script
def test_every_choice_of_a_resumed_run_is_one(script):
    """Also of `Literal[...] | None`."""
    Args = importlib.import_module(script).Args
    for name, hint in typing.get_type_hints(Args).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                for choice in typing.get_args(part):
                    cli.check_types(dataclasses.replace(Args(), **{name: choice}), "args.json")
                with pytest.raises(InputError, match=f"{name} is 'none of these', which it cannot"):
                    args = dataclasses.replace(Args(), **{name: "none of these"})
                    cli.check_types(args, "args.json")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:118] err == 0",
        "numel: integer multiplication overflow",
        "Storage size calculation overflowed with sizes=[1000000000, 1000000000]",
        "unable to mmap 4096 bytes from file: Cannot allocate memory (12)",
    ],
)
def test_a_lack_of_memory_is_said_in_a_line(text, capsys, monkeypatch):
    def main(args):
        raise RuntimeError(text)

    monkeypatch.setattr(main, "__module__", __name__)
    with pytest.raises(SystemExit) as exit:
        cli.cli(main, int, lambda *_, **__: 0)
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: MemoryError: {text.splitlines()[0]}\n"
    # a fault of ours, or of a task's, keeps its traceback
    for text in (  # noqa: B007, main reads it
        "mat1 and mat2 shapes cannot be multiplied",
        "mat1 is not in the task allocation table",
    ):
        with pytest.raises(RuntimeError, match="mat1"):
            cli.cli(main, int, lambda *_, **__: 0)


def test_words_that_are_not_utf8_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["otc_bcq.py", "--run-dir", os.fsdecode(b"r\xff")])
    with pytest.raises(SystemExit) as found:
        cli.cli(lambda args: None, int, lambda *_, **__: 0)
    assert found.value.code == 2
    assert capsys.readouterr().err == "error: 'r\\udcff' is not UTF-8\n"


@pytest.mark.parametrize("columns, then", [("5", "20"), ("0", "0"), ("19", "20"), ("100", "100")])
def test_a_narrow_terminal_gets_columns_enough_for_the_help(columns, then, monkeypatch):
    def main(args):
        assert os.environ["COLUMNS"] == then

    monkeypatch.setattr(main, "__module__", __name__)
    monkeypatch.setenv("COLUMNS", columns)
    cli.cli(main, int, lambda *_, **__: 0)


def test_another_versions_run_is_called_so(tmp_path):
    Args = importlib.import_module("otc_bcq").Args
    record = {"args": {"seed": 1, "of_old": 3}, "script": "otc_bcq"}
    (tmp_path / "args.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="is a run of another version of its script"):
        cli.parse(Args, ["--resume", str(tmp_path)])
    (tmp_path / "args.json").write_text(json.dumps(record | {"script": "otc_awac"}))
    with pytest.raises(InputError, match="is a run of otc_awac, not of this script"):
        cli.parse(Args, ["--resume", str(tmp_path)])


@pytest.mark.parametrize("flags", ["--alpha-max 0.5", "--alpha-max 2 --no-adaptive-alpha"])
def test_a_cap_that_caps_nothing_is_refused(flags):
    with pytest.raises(InputError, match="--alpha-max .* caps an adaptive alpha"):
        cli.parse(importlib.import_module("otc_bcq").Args, flags.split())


def test_a_float_that_is_given_as_an_int_has_a_floats_range():
    """As a notebook may: such a run can be resumed."""
    Args = importlib.import_module("otc_bcq").Args
    cli.check_ranges(Args(alpha=0))
    with pytest.raises(InputError, match="--candidates is 0; it must be at least 1"):
        cli.check_ranges(Args(candidates=0))


@dataclasses.dataclass
class Changed(cli.OnlineArgs):
    """Of a copied script whose OTC has kept none of its own arguments."""


def test_a_changed_script_may_lack_arguments_of_otc():
    args = cli.parse(Changed, [])
    assert cli.deployment_steps(args, 2000) == 20
    assert strategies.strategy_name(dataclasses.asdict(args)) == "otc"
