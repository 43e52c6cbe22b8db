"""The blocks that several scripts hold are exact copies, and nothing else is copied."""

import ast
import copy
import difflib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = "otc_bcq"  # what the others are compared with

# Module-level blocks that are the same in every script, besides `Args` and `main`, of which a part
# is compared.
EVERYWHERE = (
    "Linear mlp EmbeddingVAE kl_divergence DensityRatio adam restore step TransitionSampler act "
    "deploy evaluate"
).split()
# What only some scripts need, and the scripts that have it
SOMEWHERE = {
    "Critic": {"otc_bcq", "otc_awac", "otc_cql", "otc_td3bc", "icq"},
    "follow": {
        *("otc_bcq", "otc_awac", "otc_cql", "otc_cql_discrete"),
        *("otc_td3bc", "otc_bremen", "omar", "icq"),
    },
    "GaussianActor": {"otc_awac", "icq"},
    "DeterministicActor": {"otc_td3bc", "omar"},
}
EXPECTED = ["icq", "omar", "otc_awac", "otc_bcq", "otc_bremen", "otc_cql", "otc_cql_discrete"]
EXPECTED += ["otc_td3bc"]
PRESENT = sorted(path.stem for path in ROOT.glob("*.py"))
# What these scripts' own task needs another default of, among the shared arguments
OTHER_DEFAULTS = {"omar": {"env", "deployments", "batch_size"}}
OTHER_DEFAULTS["icq"] = OTHER_DEFAULTS["omar"]
OTHER_DEFAULTS["otc_cql_discrete"] = {"env"}
OTHERS = sorted({*EXPECTED, *PRESENT} - {MODEL})


def tree_of(script):
    return ast.parse((ROOT / f"{script}.py").read_text())


def block(body, name, where):
    """The class or function called `name` among the statements of `body`."""
    kinds = ast.ClassDef | ast.FunctionDef
    found = [node for node in body if isinstance(node, kinds) and node.name == name]
    assert len(found) == 1, f"{where} defines {name} {len(found)} times, expected once"
    return found[0]


def assert_equal_blocks(name, script, expected, found):
    """Compare two blocks as syntax trees; each a node or a list of nodes."""

    def nodes(block):
        return block if isinstance(block, list) else [block]

    def dumped(block):
        return [ast.dump(node) for node in nodes(block)]

    if dumped(expected) != dumped(found):
        texts = [
            "\n".join(ast.unparse(node) for node in nodes(block)).splitlines()
            for block in (expected, found)
        ]
        diff = difflib.unified_diff(*texts, f"{MODEL}.py", f"{script}.py", lineterm="", n=2)
        text = "\n".join(diff)
        pytest.fail(
            f"`{name}` of {script}.py is not the copy of {MODEL}.py's that it should be:\n{text}",
            pytrace=False,
        )


def shared_arguments(script):
    """The statements of `Args` up to the last argument of the OTC block, with its docstring."""
    args = block(tree_of(script).body, "Args", script)
    names = [getattr(getattr(node, "target", None), "id", None) for node in args.body]
    last = "embedding_learning_rate"
    assert last in names, f"Args of {script}.py has no {last}, the last of the OTC arguments"
    shared = args.body[: names.index(last) + 2]
    for name, node in zip(names, shared, strict=False):
        if name in OTHER_DEFAULTS["omar"]:
            node.value = ast.Constant(None)
    return shared


def learner_of(script):
    """Name of the class that `main` makes the agent of."""
    for node in ast.walk(block(tree_of(script).body, "main", script)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "agent":
            return node.value.func.id
    raise AssertionError(f"main of {script}.py makes no agent")


class Neutral(ast.NodeTransformer):
    """`main` without what may differ between scripts: the learner's name, its scales, the nested
    functions of one update, helpers of their own, and the kinds of updates and of actions."""

    UPDATES = ("offline_update", "finetune_update")

    def __init__(self, learner, nested):
        self.learner, self.nested = learner, nested

    def visit_Name(self, node):
        node.id = "Learner" if node.id == self.learner else node.id
        return node

    def visit_Expr(self, node):
        if ast.unparse(node) == "agent.measure_scales(replay)":
            return None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node):
        if node.name in self.UPDATES:
            return ast.parse(f"def {node.name}(): ...").body[0]
        if node.name != "main" and node.name not in self.nested:
            return None
        return self.generic_visit(node)

    def visit_Call(self, node):
        if ast.unparse(node.func) == "runs.Graphed":
            node.args, node.keywords = node.args[:2], []
        if ast.unparse(node.func) == "datasets.load":  # which kind of actions the learner is for
            node.keywords = []
        return self.generic_visit(node)


def neutral_main(script):
    functions = [
        node.name
        for node in ast.walk(block(tree_of(MODEL).body, "main", MODEL))
        if isinstance(node, ast.FunctionDef)
    ]
    main = block(tree_of(script).body, "main", script)
    return Neutral(learner_of(script), functions).visit(main)


def test_the_expected_scripts_are_there():
    assert not set(EXPECTED) - set(PRESENT)


@pytest.mark.parametrize("script", OTHERS)
def test_general_and_otc_arguments_are_copies(script):
    assert_equal_blocks("Args", script, shared_arguments(MODEL), shared_arguments(script))


@pytest.mark.parametrize("script", OTHERS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_blocks_of_every_script_are_copies(script, name):
    found = block(tree_of(script).body, name, script)
    assert_equal_blocks(name, script, block(tree_of(MODEL).body, name, MODEL), found)


@pytest.mark.parametrize(
    ("script", "name"),
    [(s, name) for name, scripts in SOMEWHERE.items() for s in sorted(scripts)],
)
def test_blocks_of_some_scripts_are_copies(script, name):
    model = MODEL if MODEL in SOMEWHERE[name] else min(SOMEWHERE[name])
    found = block(tree_of(script).body, name, script)
    assert_equal_blocks(name, script, block(tree_of(model).body, name, model), found)


@pytest.mark.parametrize("script", sorted(set(EXPECTED) - {MODEL}))
def test_shared_defaults_differ_only_where_they_are_meant_to(script):
    def defaults(script):
        args = block(tree_of(script).body, "Args", script)
        nodes = args.body[: len(shared_arguments(script))]
        return {n.target.id: ast.unparse(n.value) for n in nodes if isinstance(n, ast.AnnAssign)}

    expected, found = defaults(MODEL), defaults(script)
    differing = {name for name in expected if expected[name] != found[name]}
    assert differing == OTHER_DEFAULTS.get(script, set())


@pytest.mark.parametrize("script", OTHERS)
@pytest.mark.parametrize("name", ["get_extra_state", "set_extra_state"])
def test_learners_keep_their_optimisers_alike(script, name):
    expected, found = (
        block(block(tree_of(s).body, learner_of(s), s).body, name, f"{learner_of(s)} of {s}")
        for s in (MODEL, script)
    )
    assert_equal_blocks(f"{learner_of(script)}.{name}", script, expected, found)


@pytest.mark.parametrize(
    ("name", "scripts"),
    [
        ("measure_scales", ("otc_awac", "otc_cql", "otc_cql_discrete", "otc_td3bc")),
        ("scaled", ("otc_awac", "otc_cql", "otc_cql_discrete", "otc_td3bc", "omar", "icq")),
    ],
)
def test_learners_scale_alike(name, scripts):
    """Not all: BREMEN's models have scales of their own, BCQ has none."""
    found = {
        ast.dump(block(block(tree_of(s).body, learner_of(s), s).body, name, s)) for s in scripts
    }
    assert len(found) == 1, f"{name} differs between {', '.join(scripts)}"


@pytest.mark.parametrize("script", OTHERS)
def test_main_is_a_copy_but_for_the_learner_and_its_updates(script):
    assert_equal_blocks("main", script, neutral_main(MODEL), neutral_main(script))


@pytest.mark.parametrize("script", OTHERS)
def test_sections_come_in_the_same_order(script):
    """A script may have further sections between them."""
    expected, found = (
        re.findall(r"^# --- (.+) ---$", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
        for name in (MODEL, script)
    )
    assert [header for header in found if header in expected] == expected
    assert {"Networks", "Agents", "Main: Algorithm 1"} <= set(expected)


def without_name_and_docstrings(node):
    """The dump of a class or function with a neutral name and without what only explains it."""
    node = copy.deepcopy(node)
    node.name = "_"
    for each in ast.walk(node):
        if isinstance(each, ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(each) is not None:
                each.body = each.body[1:]
    return ast.dump(node)


@pytest.mark.parametrize("pair", list(itertools.combinations(PRESENT, 2)), ids=" and ".join)
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
    intended = {*EVERYWHERE, *(n for n, where in SOMEWHERE.items() if set(pair) <= where), "main"}
    assert copied <= intended, f"{' and '.join(pair)} both hold {copied - intended}"


def files_of_common():
    return sorted((ROOT / "common").rglob("*.py"))


@pytest.mark.parametrize("path", files_of_common(), ids=lambda p: str(p.relative_to(ROOT)))
def test_common_holds_no_network(path):
    if path.name in ("train_teams.py", "train_battles.py"):
        return  # trains the policies behind the data; no script imports it
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            assert not any(base.split(".")[-1] == "Module" for base in bases), node.name
        if isinstance(node, ast.Call):  # of torch.nn's layers; a mention in an annotation is none
            assert not re.match(r"(torch\.)?nn\.", ast.unparse(node.func)), ast.unparse(node)
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("torch.nn") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("torch.nn")
            assert not (node.module == "torch" and "nn" in {a.name for a in node.names})


@pytest.mark.parametrize(
    "path",
    [*files_of_common(), *(ROOT / f"{script}.py" for script in PRESENT)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_nothing_imports_a_script(path):
    scripts = {p.stem for p in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(alias.name for alias in node.names)]
        assert not scripts & {name.split(".")[0] for name in modules}
