"""What an answer may be: JSON of a schema, as the set of tokens that may come next (llguidance, of the extra ``server``).

Schemas come from strangers: their size and nesting are bounded, and so is the work of compiling one and of every mask. That
is counted in steps of llguidance, so that the same schema is taken or refused on every machine.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import RequestError
from elmoe.extras import naming_extra
from elmoe.tokenizer import reraise_foreign
from elmoe.untrusted import load_json, short

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_SCHEMA_BYTES = 64 << 10
"""Largest schema, bytes of JSON."""
MAX_SCHEMA_DEPTH = 32
"""Deepest nesting of lists and mappings in a schema."""
KEPT = 32
"""Compiled schemas that are kept."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_items_in_row": 2_000,
    "max_lexer_states": 10_000, "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip
"""Of llguidance, in its steps. The worst that was found (one busy core of a Xeon): 1.4 s to compile a schema, 0.15 s for a
mask, 6 MB for the states of a schema, which its answers share."""
WHITESPACE = r"\x20|\x0A[\x20\x09]{0,20}"
"""Between the tokens of JSON, as in llama.cpp: where there may be any, some models write nothing else."""
ANY_OBJECT = {"type": "object"}
SCHEMAS_WITHIN = (
    "items", "prefixItems", "additionalItems", "contains", "additionalProperties", "anyOf", "oneOf", "allOf", "not", "if",
    "then", "else",
)  # fmt: skip
"""Keys of a schema with a schema, or a list of them."""
PLACE_SECONDS = 1.0
"""How long the place of a problem is narrowed down; the schema is refused in any case."""


class GrammarState:
    """How far one answer has come in its grammar.

    All answers of a grammar share the states of its lexer, whose number is limited. Where the others, or drafts, have used
    them up, an answer goes on with states of its own: what fails is what the answer itself takes too many steps for.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar, self._vocabulary = grammar, grammar.vocabulary
        self._matcher = grammar.matcher.deep_copy()
        self._tokens: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether nothing may come any more, but an end of sequence at most."""
        return bool(self._matcher.is_stopped())

    def push(self, token: int) -> RequestError | None:
        """The answer goes on with a token; an error if that was not allowed."""
        if not self._matcher.consume_token(token):
            self._renew()
            if not self._matcher.consume_token(token):
                return _failed(self._matcher)
        self._tokens.append(token)
        return None

    def excluded(self, behind: Sequence[int] = ()) -> NDArray[np.bool_] | None:
        """(vocabulary,) ids that may not come next, after the answer and the tokens ``behind`` it.

        None where those are not all allowed, or the grammar ends within them: what is drawn there is not kept.

        :raises RequestError: the grammar turned out to take too many steps.
        """
        try:
            return self._excluded(behind)
        except RequestError:
            self._renew()
            if behind:  # of a draft: what the answer itself takes is seen without
                raise
            return self._excluded(())

    def _excluded(self, behind: Sequence[int]) -> NDArray[np.bool_] | None:
        matcher = self._matcher
        taken = matcher.try_consume_tokens(list(behind)) if behind else 0
        try:
            if behind and not matcher.is_error() and (taken < len(behind) or matcher.is_stopped()):
                return None
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            excluded = np.unpackbits(bits, bitorder="little", count=self._vocabulary) == 0
            if matcher.is_error() or excluded.all():
                raise _failed(matcher)
            return excluded
        finally:
            if taken:
                matcher.rollback(taken)

    def _renew(self) -> None:
        """Go on in a new lexer: a matcher that met a limit answers nothing any more, nor do those that share its states."""
        self._matcher = self._grammar.anew().deep_copy()
        self._matcher.consume_tokens(self._tokens)


def _failed(matcher: Any) -> RequestError:
    told = _error_of(matcher) or "no token continues it"
    return RequestError(f"the grammar cannot be followed: {short(told)}", "give a simpler schema")


def _error_of(matcher: Any) -> str:
    """Why a matcher goes on no more; empty if it does."""
    told = str(matcher.get_error()).removesuffix("<non-verbose/>").strip()
    return "nothing satisfies it" if told.startswith("NoExtension") else told


class Grammar:
    """A compiled schema. Made by :class:`Grammars`."""

    def __init__(self, matcher: Any, vocabulary: int, compile: Callable[[], Any]) -> None:
        self.matcher, self.vocabulary, self._compile = matcher, vocabulary, compile

    def start(self) -> GrammarState:
        """The beginning of an answer."""
        return GrammarState(self)

    def anew(self) -> Any:
        """Its matcher with no state used, which answers that begin from now on share."""
        self.matcher = self._compile()
        return self.matcher


class Grammars:
    """Compiles schemas for the tokens of a model; the latest are kept. May be called from several threads.

    :param eos: ids that end an answer, allowed where its grammar accepts.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        self._source, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._tokenizer: Any = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = Lock()

    def json(self, schema: str | Mapping[str, Any] | bool = True) -> Grammar:
        """JSON that a schema describes, as text or as data; True is any JSON object.

        :raises RequestError: it is too large, no schema, or says what is not supported; with the place.
        :raises MissingExtraError: llguidance is not installed.
        """
        text = checked_schema(ANY_OBJECT if schema is True else schema)
        with self._lock:
            grammar = self._kept.pop(text, None) or self._compile(text)
            self._kept[text] = grammar
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return grammar

    def _compile(self, text: str) -> Grammar:
        matcher = self._matcher(text)
        problem = _problem(matcher)
        if problem:
            place = self._place(json.loads(text), problem)
            raise RequestError(f"the JSON schema cannot be used, at {place}: {short(problem)}", "see json-schema.org")
        return Grammar(matcher, self._vocabulary, partial(self._matcher, text))

    def _matcher(self, text: str) -> Any:
        with naming_extra("JSON of a schema"):
            from llguidance import LLMatcher, LLParserLimits
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
        return LLMatcher(self._tokens(), grammar, log_level=0, limits=LLParserLimits(**LIMITS))

    def _tokens(self) -> Any:
        """The tokens as llguidance knows them, made once (0.1 s for 4,000 tokens)."""
        if self._tokenizer is None:
            from llguidance import LLTokenizer

            try:
                self._tokenizer = LLTokenizer(self._source.to_str(), n_vocab=self._vocabulary, eos_token=self._eos or None)
            except BaseException as error:
                reraise_foreign(error)
                raise RequestError(f"no grammar can be built on this model's tokenizer: {short(error)}") from None
        return self._tokenizer

    def _place(self, schema: dict[str, Any], problem: str) -> str:
        """The path of the innermost part of a schema that has the same problem alone."""
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        path, end = "$", perf_counter() + PLACE_SECONDS
        while True:
            for step, part in _parts(schema):
                if perf_counter() > end:
                    return path
                if _problem(self._matcher(json.dumps(shared | part))) == problem:
                    path, schema = path + step, part
                    break
            else:
                return path


def _problem(matcher: Any) -> str:
    """Why a matcher cannot begin; empty if it can."""
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _error_of(matcher)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly within one, each with its step of the path, but for True and False."""
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            steps = [(f".{key}.{short(name, 40)}", part) for name, part in value.items()]
        elif key in SCHEMAS_WITHIN and isinstance(value, list):
            steps = [(f".{key}[{index}]", part) for index, part in enumerate(value)]
        else:
            steps = [(f".{key}", value)] if key in SCHEMAS_WITHIN else []
        yield from ((step, part) for step, part in steps if isinstance(part, dict))


def checked_schema(schema: object) -> str:
    """A schema as JSON text of bounded size and nesting; RequestError otherwise."""
    if isinstance(schema, str):
        text, data = schema, None
    elif isinstance(schema, Mapping):
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is no JSON: {short(error)}") from None
    else:
        raise RequestError(f"the JSON schema is a {type(schema).__name__}", "give an object, or its text")
    if len(text.encode(errors="surrogatepass")) > MAX_SCHEMA_BYTES:
        raise RequestError(f"the JSON schema has more than {MAX_SCHEMA_BYTES} bytes", "give a smaller one")
    try:
        data = load_json(text, "the JSON schema", RequestError, non_finite=False)
    except RequestError as error:
        raise RequestError(str(error).replace("'the JSON schema'", "the JSON schema"), "see json-schema.org") from None
    if not isinstance(data, dict):
        raise RequestError(f"the JSON schema is {short(text, 40)}, no object", 'give one such as {"type": "object"}')
    _check_nodes(data)
    return json.dumps(data)


def _check_nodes(schema: dict[str, Any]) -> None:
    """RequestError where a schema is nested too deeply, or sets options of llguidance."""
    level: list[tuple[str, Any]] = [("$", schema)]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[tuple[str, Any]] = []
        for path, node in level:
            if isinstance(node, dict):
                if "x-guidance" in node:
                    raise RequestError(f"the JSON schema cannot be used, at {path}: 'x-guidance' is not supported")
                below += [(f"{path}.{short(key, 40)}", part) for key, part in node.items()]
            elif isinstance(node, list):
                below += [(f"{path}[{index}]", part) for index, part in enumerate(node)]
        if not below:
            return
        level = below
    raise RequestError(f"the JSON schema is nested deeper than {MAX_SCHEMA_DEPTH}, at {short(level[0][0])}")
