"""Hooks of mkdocs: what the site takes from outside of docs/.

Pages link to files of the repository by relative paths, as GitHub reads them. Here every linked
file becomes a file of the site, and every link is rewritten to it; a link to nothing is an error
that names page and link.
"""

import posixpath
import re
import tempfile
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Pages of the site that are written where a reader of the repository looks for them.
OUTER_PAGES = ("benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PACKAGES = tempfile.TemporaryDirectory(prefix="uno_ds_site_")
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")
LOADED_FROM_OUTSIDE = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"https?://[^>]*>"
)


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config):
    """Puts uno_ds and its subpackage kernels, which is a folder of its own in the repository, into
    one tree, where the reader of docstrings looks for them."""
    tree = Path(PACKAGES.name) / "uno_ds"
    tree.mkdir(exist_ok=True)
    for path in [*(ROOT / "uno_ds").iterdir(), ROOT / "kernels"]:
        if not (tree / path.name).exists():
            (tree / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [PACKAGES.name]
    return config


def on_files(files, config):
    names = set(OUTER_PAGES)
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in OUTER_PAGES)]:
        names.update(name for name in _linked_files(page) if not name.startswith("docs/"))
    for name in sorted(names):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between docs/ and the rest of the repository, as the site arranges them."""
    source = page.file.src_uri
    folder = posixpath.dirname(source)

    def rewritten(match):
        link = match[0]
        if _is_external(link):
            return link
        name = _name_in_repository(_repository_name(source), link)
        return posixpath.relpath(name.removeprefix("docs/"), folder or ".")

    return LINK.sub(rewritten, markdown)


def on_post_page(output, page, config):
    if found := LOADED_FROM_OUTSIDE.search(output):
        if 'rel="canonical"' not in found[0]:
            raise PluginError(f"{page.file.src_uri} loads a file from the network: {found[0]}")
    return output


def _linked_files(page: Path) -> list[str]:
    source = page.relative_to(ROOT).as_posix()
    links = [link for link in LINK.findall(page.read_text("utf-8")) if not _is_external(link)]
    return [_name_in_repository(source, link) for link in links]


def _is_external(link: str) -> bool:
    return "://" in link or link.startswith("mailto:")


def _repository_name(source: str) -> str:
    return source if source in OUTER_PAGES else f"docs/{source}"


def _name_in_repository(source: str, link: str) -> str:
    """Path from the root of the repository of what a page links to. Raises PluginError if there is
    no such file."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if not (ROOT / name).is_file():
        raise PluginError(f"{source} links to {link}, but there is no file {name}.")
    return name
