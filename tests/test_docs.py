"""What the pages point to is there, and what they say of commands and tables is so."""

import re
from pathlib import Path

import pytest

from common import InputError
from tools import check_docs

ROOT = Path(__file__).parent.parent
every_page = pytest.mark.parametrize(
    "page", check_docs.PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def anchors(page):
    """As GitHub names the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@every_page
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text()):
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@every_page
def test_pictures_say_what_they_show(page):
    assert not re.search(r"!\[\s*\]\(", page.read_text())


def test_every_raw_file_is_linked():
    """A raw file that no page names is one that nobody finds."""
    links = {
        (page.parent / link).resolve()
        for page in check_docs.PAGES
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())
    }
    files = [path for path in ROOT.glob("docs/results/**/*") if path.suffix in (".csv", ".json")]
    assert len(files) > 90
    assert not [str(path.relative_to(ROOT)) for path in files if path.resolve() not in links]


@pytest.mark.parametrize(
    "page",
    [*check_docs.PAGES, *check_docs.MODULES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_command_parses(page):
    for words in check_docs.commands(page):
        check_docs.parse(words)


def test_commands_are_found_and_wrong_ones_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n    for n in 1 2; do\n        OMP_NUM_THREADS=1 python omar.py --seed $n \\\n"
        "            --num-seeds 3  # why\n    done\n\nSee `python otc_bcq.py --nope 1`.\n"
    )
    first, second = check_docs.commands(page)
    assert first == ["python", "omar.py", "--seed", "1", "--num-seeds", "3"]
    check_docs.parse(first)
    with pytest.raises(SystemExit):
        check_docs.parse(second)
    with pytest.raises(SystemExit):
        check_docs.parse("python -m tools.render --nope".split())
    with pytest.raises(SystemExit):
        check_docs.parse("python -m benchmarks.speed --nope".split())
    with pytest.raises(InputError):
        check_docs.parse("pip install -r nope.txt".split())


def test_commands_are_made_short(tmp_path):
    def short(line):
        return check_docs.short(line.split(), tmp_path)

    line = short("python omar.py --env simple-tag-medium --num-seeds 2")
    assert line[:4] == ["python", "omar.py", "--env", "simple-tag-medium"]
    assert {"--offline-updates", "--dataset-size"} < set(line)
    check_docs.parse(line)
    assert short("python omar.py --dataset FOLDER") == "needs FOLDER"
    assert short("python -m benchmarks.speed") == "takes long"
    grid = "benchmarks/grids/omar.toml"
    line = ["python", "-m", "benchmarks.sweep", "plan", grid]
    assert short(f"python -m benchmarks.sweep run {grid}") == line
    assert short("python -m benchmarks.value_actions runs/RUN") == "needs runs/RUN"
    (tmp_path / "runs/one").mkdir(parents=True)
    line = short("python -m benchmarks.value_actions runs/RUN")
    assert line[3] == "runs/one"


@every_page
def test_tables_are_those_of_their_raw_files(page):
    assert check_docs.differences(page)[0] == []


def test_a_wrong_number_in_a_table_is_found(tmp_path):
    (tmp_path / "raw.csv").write_text(
        "strategy,seed,deployment,mean_return\n" + "uniform,1,0,10\nuniform,2,0,11\n"
    )
    page, table = tmp_path / "page.md", "| strategy | pi^0 |\n|---|---|\n| uniform | {} |\n"
    for cell, wrong in (("10.5 +- 0.5", 0), ("10.6 +- 0.5", 1), ("10.5 +- 0.7", 1)):
        page.write_text("[raw](raw.csv)\n\n" + table.format(cell))
        differences, compared = check_docs.differences(page)
        assert (len(differences), compared) == (wrong, 1)


@pytest.mark.slow
@every_page
def test_every_command_runs(page):
    assert check_docs.run(page) == []
