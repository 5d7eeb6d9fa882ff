"""Hook of mkdocs: links to files outside docs/ become text with the path, since the site has no copy of them; roles of
docstrings, such as ``:class:``, are left out.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")
"""A link from a page of docs/ to another file of the repository."""
ROLE = re.compile(r":(?:class|func|meth|data):(?=<code>)")
"""The role before a name in a docstring, as rendered."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with such links replaced: mkdocs calls this for every page."""
    return OUTSIDE.sub(lambda link: f"`{link[2]}`" if link[1] in link[2] else f"{link[1]} (`{link[2]}`)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The rendered page without roles: mkdocs calls this for every page."""
    return ROLE.sub("", html)
