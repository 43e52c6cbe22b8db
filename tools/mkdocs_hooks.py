"""What `mkdocs build` needs to know of this repository; a hook of mkdocs.yml.

docs/ is written for GitHub, where a page may link to any file. On the site README.md is the first
page, the other pages of the root lie beside it, and a linked file that is no page, such as a script
or a grid, becomes a page that shows it.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)")
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": None, "CHANGELOG.md": None}


def target(link: str, source: str) -> str | None:
    """What a link in the file `source` leads to, from the repository's root; None: elsewhere."""
    if re.match(r"\w+:", link):
        return None
    return os.path.normpath(PurePosixPath(source).parent / link)


def uri(path: str) -> str:
    """Where a file of the repository lies on the site, as a source of mkdocs."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return (ROOT_PAGES[path] or path) if path in ROOT_PAGES else f"source/{path}.md"


def on_files(files, config):
    for path in ROOT_PAGES:
        files.append(File.generated(config, uri(path), content=(ROOT / path).read_text()))
        files.get_file_from_path(uri(path)).repository_path = path
    for page in list(files.documentation_pages()):
        source = source_of(page)
        for _, link in LINK.findall(page.content_string):
            path = target(link, source)
            if path and not path.startswith("docs/") and not files.get_file_from_path(uri(path)):
                text = (ROOT / path).read_text()
                shown = f"# {path}\n\n````{Path(path).suffix[1:]}\n{text}````\n"
                files.append(File.generated(config, uri(path), content=shown))
    return files


def source_of(file) -> str:
    return getattr(file, "repository_path", f"docs/{file.src_uri}")


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri.startswith("source/"):
        return markdown
    source = source_of(page.file)

    def moved(match):
        path = target(match[2], source)
        if path is None:
            return match[0]
        return match[1] + os.path.relpath(uri(path), PurePosixPath(page.file.src_uri).parent)

    keep_together = re.sub(
        r"(?m)^\|.*",
        lambda row: row[0].replace(" +- ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"),
        markdown,
    )
    return LINK.sub(moved, keep_together)
