"""The command line: what --help shows, and in which order."""

import dataclasses
import importlib
import inspect
import re
import sys

import pytest

from common import cli
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
