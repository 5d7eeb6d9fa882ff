"""Hook of mkdocs: links to files outside docs/ become text with the path, since the site has no copy of them."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")
"""A link from a page of docs/ to another file of the repository."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with such links replaced: mkdocs calls this for every page."""
    return OUTSIDE.sub(lambda link: f"`{link[2]}`" if link[1] in link[2] else f"{link[1]} (`{link[2]}`)", markdown)
