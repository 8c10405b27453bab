"""The documentation: every page is in the site's navigation, links lead somewhere, generated pages are up to date."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfmoon.protocol import errors
from halfmoon.protocol.config import ClusterConfig
from halfmoon.protocol.errors import HalfmoonError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def loaded(name: str) -> Any:
    """A module of docs/_site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"halfmoon_docs_{name}", DOCS / "_site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation() -> list[str]:
    def pages(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for found in entry.values():
                yield from [found] if isinstance(found, str) else pages(found)

    return list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def anchors(path: Path) -> set[str]:
    """Of the headings, as mkdocs makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.encode("ascii", "ignore").decode()).strip().lower()) for title in titles}


def test_the_navigation_names_every_page_once() -> None:
    assert sorted(navigation()) == [page.name for page in PAGES]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in LINK.findall(re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_a_link_out_of_the_pages_becomes_the_name_of_its_file() -> None:
    links = loaded("links")
    page = "See [the rules](../deploy/prometheus), [`a/b.py`](../a/b.py) and [SLO](slo.md#x). ![P](p.png)"
    assert links.on_page_markdown(page, page=None) == "See the rules (`deploy/prometheus`), `a/b.py` and [SLO](slo.md#x). ![P](p.png)"


async def test_the_http_reference_is_that_of_the_proxys_own_schema() -> None:
    http_page = loaded("http_page")
    assert http_page.PAGE.read_text() == http_page.page(await http_page.schema()), "run python docs/_site/http_page.py"


def test_the_codes_of_errors_in_the_troubleshooting_are_there_with_their_status() -> None:
    def all_of(kind: type[HalfmoonError]) -> Iterator[type[HalfmoonError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from all_of(below)

    statuses = {errors.error_code(kind): kind.http_status for kind in all_of(HalfmoonError)}
    named = re.findall(r"^\| (\d{3}) `(\w+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(named) > 5
    assert {code: int(status) for status, code in named} == {code: statuses.get(code) for _, code in named}


def test_the_settings_that_the_pages_name_are_there() -> None:
    config = ClusterConfig()
    for page in PAGES:
        for section, key in re.findall(r"`(proxy|store|prefill|decode|both|model)\.([a-z_]+)[`:]", page.read_text()):
            assert hasattr(getattr(config, section), key), f"{page.name}: {section}.{key}"
