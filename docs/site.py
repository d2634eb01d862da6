"""What the documentation site holds beside docs/: the repository's own pages, and a page a package.

A hook of mkdocs (`hooks` in mkdocs.yml). Nothing is written twice: README.md is the first page, and the
reference follows the folders of the code.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files at the top of the repository, and their names on the site."""
PACKAGES = (
    "kvmerge",
    "kvmerge.kernels",
    "kvmerge.models",
    "baselines",
    "benchmarks",
    "harness",
    "harness.report",
)
"""Those with a page; a module stands on the page of the nearest."""

FETCHED = re.compile(r'<(?:script|img|iframe)\b[^>]*\ssrc="?https?:|<link\b[^>]*\shref="?https?:')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {target: _page(ROOT / source) for source, target in PAGES.items()}
    pages |= {f"reference/{package}.md": _reference(package) for package in PACKAGES}
    for target, content in pages.items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links of docs/ to the repository's pages at their place on the site."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown


def on_post_page(output: str, page: Page, **_: object) -> None:
    """Refuse a page that a browser would fetch parts of from another host."""
    if fetched := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from another host: {fetched[0]}")


def _page(path: Path) -> str:
    """Read a page of the repository, with links as they are on the site."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](")
    for source, target in PAGES.items():
        text = text.replace(f"]({source}", f"]({target}")
    return text


def _reference(package: str) -> str:
    """Write the page of a package: its own words first, then its modules by name."""
    names = [_module_name(path) for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py"))]
    own = [name for name in names if _home(name) == package and not name.endswith("__main__")]
    return "\n\n".join(_block(name, 1 if name == package else 2) for name in own)


def _block(name: str, level: int) -> str:
    """Write what mkdocstrings replaces by a module's documentation."""
    block = f"::: {name}\n    options:\n      heading_level: {level}\n"
    init = ROOT / name.replace(".", "/") / "__init__.py"
    if name != "kvmerge" and init.exists() and "__all__" in init.read_text(encoding="utf-8"):
        block += "      members: false\n"  # they stand under their modules
    return block


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _home(name: str) -> str:
    """Return the package on whose page a module stands."""
    return max((each for each in PACKAGES if f"{name}.".startswith(f"{each}.")), key=len)
