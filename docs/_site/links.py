"""A hook of mkdocs. The pages link to files of the checkout, which the site does not hold: such a link becomes the file's name."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(_named, markdown)


def _named(link: re.Match[str]) -> str:
    text, path = " ".join(link[1].split()), link[2]
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"
