"""What several scripts hold is an exact copy, few things are, and nothing else is copied."""

import ast
import copy
import difflib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
MODEL = "otc_bcq"  # what the others are compared with
WITH_OTC = [s for s in SCRIPTS if "class OTC(" in (ROOT / f"{s}.py").read_text()]
# Networks that two scripts may share; with a third they move to common/nets.py
NETWORKS = {"Critic", "GaussianActor"}


def tree_of(script):
    return ast.parse((ROOT / f"{script}.py").read_text())


def block(body, name):
    (found,) = (node for node in body if getattr(node, "name", None) == name)
    return found


def shared_arguments(script):
    """The OTC block of `Args`, without the script's own defaults before it."""
    body = block(tree_of(script).body, "Args").body
    names = [getattr(getattr(node, "target", None), "id", None) for node in body]
    return body[names.index("sampling") : names.index("embedding_learning_rate") + 2]


class Neutral(ast.NodeTransformer):
    """`main` without what may differ: the learner, its scales, its gathering, its updates."""

    def visit_FunctionDef(self, node):
        if node.name in ("offline_update", "finetune_update"):
            return ast.parse(f"def {node.name}(): ...").body[0]
        return self.generic_visit(node)

    def visit_Assign(self, node):
        name = ast.unparse(node.targets[0])
        if name == "gather":
            return None
        if name in ("agent", "run"):
            node.value = ast.Constant(None)
        return node

    def visit_Expr(self, node):
        return None if ast.unparse(node) == "agent.measure_scales(replay)" else node


COPIES = {
    "OTC arguments": shared_arguments,
    "OTC": lambda script: [block(tree_of(script).body, "OTC")],
    "main": lambda script: [Neutral().visit(block(tree_of(script).body, "main"))],
}


@pytest.mark.parametrize("script", [s for s in WITH_OTC if s != MODEL])
@pytest.mark.parametrize("name", COPIES)
def test_what_every_otc_script_holds_is_a_copy(script, name):
    expected, found = (
        "\n".join(ast.unparse(node) for node in COPIES[name](s)).splitlines()
        for s in (MODEL, script)
    )
    diff = difflib.unified_diff(expected, found, f"{MODEL}.py", f"{script}.py", "", "", 2, "")
    text = "\n".join(diff)
    assert not text, f"`{name}` of {script}.py is not the copy it should be:\n{text}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_come_in_the_same_order(script):
    headers = re.findall(r"^# --- (.+) ---$", (ROOT / f"{script}.py").read_text(), re.MULTILINE)
    order = ["Networks", "Learner", "Online transition correction", "Main: Algorithm 1"]
    if script not in WITH_OTC:
        order = ["Networks", "Learner", "Main"]
    assert [header for header in headers if header in order] == order


def without_name_and_docstrings(node):
    node = copy.deepcopy(node)
    node.name = "_"
    for each in ast.walk(node):
        if isinstance(each, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(each) is not None:
            each.body = each.body[1:]
    return ast.dump(node)


@pytest.mark.parametrize("pair", list(itertools.combinations(SCRIPTS, 2)), ids=" and ".join)
def test_nothing_else_is_copied(pair):
    """Neither under the same name nor under another, with other docstrings or none."""
    first, second = (
        {
            without_name_and_docstrings(node): node.name
            for node in tree_of(script).body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        for script in pair
    )
    copied = {first[key] for key in set(first) & set(second)}
    assert copied <= {"OTC", "main", *NETWORKS}, f"{' and '.join(pair)} both hold {copied}"


def imported(path, folder):
    """A file's module, and those of `folder` that it imports, also inside functions."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            beneath = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in beneath if file_of(name)}
            found |= modules or {node.module}
            if len(modules) < len(beneath):
                found.add(node.module)
    return package, {name for name in found if name.split(".")[0] == folder and file_of(name)}


def file_of(module):
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


def test_common_imports_itself_in_no_circle_and_nothing_else_of_ours():
    graph = {}
    for path in sorted((ROOT / "common").rglob("*.py")):
        package, modules = imported(path, "common")
        graph[package] = modules
        for folder in ("behaviours", "tools", "benchmarks", "tests"):
            assert not imported(path, folder)[1], path
    assert graph["common.loop"] >= {"common.cli", "common.datasets", "common.runs"}

    def circle(module, above):
        if module in above:
            return [*above[above.index(module) :], module]
        for each in sorted(graph.get(module, ())):
            if found := circle(each, [*above, module]):
                return found
        return None

    for module in graph:
        found = circle(module, [])
        assert not found, " imports ".join(found)


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "common").rglob("*.py")), *ROOT.glob("*.py")], ids=str
)
def test_nothing_imports_a_script(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(alias.name for alias in node.names)]
        assert not set(SCRIPTS) & {name.split(".")[0] for name in modules}
