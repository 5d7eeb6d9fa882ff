"""Answers that follow a JSON schema: always valid, the same however they are computed, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from time import process_time

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, normalizers

import elmoe
from elmoe import bitslice
from elmoe.bitslice import SamplingParameters
from elmoe.cli.main import cli
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.passes import Row
from elmoe.engine.request import Request
from elmoe.engine.sequence import Proposal
from elmoe.errors import MissingExtraError, RequestError
from elmoe.grammar import LIMITS, MAX_SCHEMA_BYTES, Grammars, GrammarState
from tests.tiny import TinyReader, tiny_spec

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["whale", "sea"]}, "size": {"type": "integer", "minimum": 10, "maximum": 99},
                   "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2}},
    "required": ["name", "size", "tags"], "additionalProperties": False,
}  # fmt: skip


def sentencepiece() -> Tokenizer:
    """As ``convert.sentencepiece`` makes them: pieces with a mark for spaces, and bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", '{"', "a", '":', "\u2581{", "\u00e9"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TINY = tiny_spec(vocabulary=270, eos_tokens=(1,))  # six ids more than the tokenizer has


def requests(model, temperature: float) -> list[Request]:
    penalized = SamplingParameters(temperature, seed=3, presence_penalty=0.6, repetition_penalty=1.1)
    asked = [
        Request(model.encode("The whale"), 60, SamplingParameters(temperature, seed=2), grammar=model.grammars.json(SCHEMA)),
        Request(model.encode("The sea"), 90, penalized, grammar=model.grammars.json(SCHEMA), copies=3, ignore_eos=True),
        Request(model.encode("A ship"), 40, SamplingParameters(temperature, seed=4), grammar=model.grammars.json()),
        Request(model.encode("A ship"), 10, SamplingParameters(temperature, seed=4)),
    ]
    return [replace(request, alternatives=index % 2) for index, request in enumerate(asked)]


def test_answers_are_of_the_schema_and_drafts_change_nothing(model):
    temperature = 1.0
    asked = requests(model, temperature)
    reference, _ = model.new_engine(EngineOptions(mode="plain", keep_kv_digest=True)).generate(asked)
    for result, copy in zip(reference[:4], (0, 1, 1, 1), strict=True):
        assert result.finish in ("stop", "eos", "length")
        if result.finish != "length":
            told = json.loads(model.text_of(asked[copy], result))
            assert list(told) == ["name", "size", "tags"] and told["name"] in ("whale", "sea") and 10 <= told["size"] <= 99
    assert sum(result.finish != "length" for result in reference[:4]) >= 2
    assert len({result.tokens for result in reference[1:4]}) == 3
    for options in (
        EngineOptions(mode="plain", batch=4),
        EngineOptions(fast_memory=0.5, draft_length=4, batch=3),
    ):
        results, statistics = model.new_engine(replace(options, keep_kv_digest=True)).generate(asked)
        assert results == reference, options
        if options.mode != "plain":
            assert statistics.accepted > 0 and statistics.rejected > 0


def test_drafts_propose_what_the_grammar_allows(model):
    """Every drafted token is allowed behind the tokens before it, so no draft is wasted on others."""
    engine = model.new_engine(EngineOptions(fast_memory=0.5, draft_length=5))
    request = requests(model, 1.0)[0]
    engine.add(request)
    drafts, draft = [], engine._drafter.draft

    def watched(batch, plan):
        proposals = draft(batch, plan)
        drafts.extend((list(one.output), proposal.tokens) for one, proposal in proposals.items())
        return proposals

    engine._drafter.draft = watched
    while engine.has_work:
        engine.step()
    assert len(drafts) > 3
    for output, tokens in drafts:
        state = request.grammar.start()
        for token in output:
            assert state.push(token) is None
        for index, token in enumerate(tokens):
            excluded = state.excluded(tokens[:index])
            if excluded is None:
                break  # the grammar ended within the draft
            assert not excluded[token]


def test_branches_of_a_tree_have_their_own_state():
    tokenizer, reader = sentencepiece(), TinyReader(TINY)
    engine = Engine(reader, bitslice, EngineOptions(mode="plain"))
    numbers = Grammars(tokenizer, TINY.vocabulary, TINY.eos_tokens).json({"enum": [10, 250, 2511]})
    engine.add(Request((5,), 20, SamplingParameters(0.9), grammar=numbers))
    (one,) = engine.scheduler.schedule().decoding
    digit = {text: tokenizer.token_to_id(f"<0x{ord(text):02X}>") for text in "0125"}
    last = Row(one, 0, 5)
    branches, parents = ["2", "25", "5", "20", "251"], (0, 1, 0, 1, 2)
    tree = [last]
    for index, (branch, parent) in enumerate(zip(branches, parents, strict=True), 1):
        tree.append(Row(one, len(branch), digit[branch[-1]], cell=index, parent=parent))
    samples = engine._passes.run("verify", tree, {}).samples
    for branch, sample in zip(["", *branches], samples, strict=True):
        tokens = [digit[text] for text in branch]
        rows = [last, *(Row(one, i, token) for i, token in enumerate(tokens, 1))]
        assert sample == engine._passes.run("verify", rows, {one: Proposal(tokens)}).samples[-1]
    drawn = {branch: sample.token for branch, sample in zip(["", *branches], samples, strict=True)}
    assert drawn[""] in (digit["1"], digit["2"]) and drawn["2"] == digit["5"] and drawn["251"] == digit["1"]
    assert drawn["25"] in (digit["0"], digit["1"])


def test_an_end_is_allowed_where_the_grammar_accepts(model):
    state = model.grammars.json({"type": "integer"}).start()
    eos, (five,) = model.spec.eos_tokens[0], model.encode("5", special_tokens=False)
    assert state.excluded()[eos] and not state.excluded([five])[eos] and not state.complete
    assert state.excluded([five, eos]) is None and state.excluded([eos]) is None, "such rows are not kept"
    assert state.push(five) is None and not state.excluded()[eos]
    assert state.push(eos) is None and state.complete
    assert isinstance(state.push(five), RequestError)


def test_an_end_that_is_drawn_ends_a_grammar_whether_ends_are_ignored_or_not(model):
    for ignore in (False, True):
        answer = model.generate("The", json_schema={"type": "integer"}, logit_bias={0: 100}, ignore_eos=ignore)
        assert answer.finish_reason == "eos" and answer.token_ids[-1] == 0 and int(answer.text) is not None


def test_a_grammar_that_fails_ends_its_request_alone(model, monkeypatch):
    def failing(self, behind=()):
        raise RequestError("the grammar cannot be followed: too complex")

    asked = requests(model, 0.0)
    expected = model.new_engine(EngineOptions(mode="plain")).generate(asked[3:])[0]
    monkeypatch.setattr(GrammarState, "excluded", failing)
    engine = model.new_engine(EngineOptions(fast_memory=0.5, draft_length=3, batch=4))
    first, second = engine.add(asked[0]), engine.add(asked[3])
    results = {}
    while engine.has_work:
        results |= {output.request: output.result for output in engine.step() if output.result is not None}
    assert results[first].finish == "failed" and "too complex" in str(results[first].error)
    assert results[second] == expected[0] and engine.cache.free_pages == engine.cache.pages


LETTERS = {"type": "string", "pattern": "^(a|b|c)*a(a|b|c){9}$"}
"""A lexer of it has a state for every sequence of the last ten letters that came."""


def test_answers_and_drafts_use_up_no_states_of_a_grammar_for_others(model, monkeypatch):
    """The states of a lexer are limited, and llguidance shares a lexer among the copies of a matcher."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 150)

    def answers(options: EngineOptions, shared: bool) -> list[tuple[int, ...]]:
        kept = Grammars(model.tokenizer, model.spec.vocabulary, (0,)) if shared else None
        asked = [
            Request(
                model.encode("A"), 80, SamplingParameters(2.0, seed=seed),
                grammar=(kept or Grammars(model.tokenizer, model.spec.vocabulary, (0,))).json(LETTERS),
            )
            for seed in range(6)
        ]  # fmt: skip
        return [result.tokens for result in model.new_engine(options).generate(asked)[0]]

    assert answers(EngineOptions(fast_memory=0.5, draft_length=5, batch=6), shared=True) == answers(
        EngineOptions(mode="plain"), shared=False
    )


def test_what_a_draft_takes_too_many_steps_for_ends_no_answer(model, monkeypatch):
    monkeypatch.setitem(LIMITS, "step_lexer_fuel", 5_000)
    heavy = {"type": "string", "pattern": "^(" + "|".join(f"[ab]{{{i},{i + 40}}}c{i}" for i in range(40)) + ")$"}
    state = model.grammars.json({"anyOf": [{"const": "a"}, {"type": "array", "items": heavy, "minItems": 1}]}).start()
    quote, bracket, letter = (model.encode(text, special_tokens=False)[0] for text in '"[a')
    before = state.excluded()
    for _ in range(2):
        with pytest.raises(RequestError, match="the grammar cannot be followed: lexer error"):
            state.excluded([bracket, quote])
        with pytest.raises(RequestError, match="the grammar cannot be followed: lexer error"):
            state.excluded([bracket, quote, letter])
        assert (state.excluded() == before).all()
        assert state.excluded([quote, bracket]) is None, "which is not allowed"
    for token in (quote, letter, quote):
        assert state.push(token) is None
    assert state.complete


def test_the_command_line_says_that_the_json_ended(tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": ["a", "b"]}')
    words = ["generate", "demo", "--prompt", "The", "--json-schema", str(tmp_path / "schema.json")]
    for further, ended in ((), "the end of the JSON"), (("--stop", "b", "--stop", "a"), "a stop string"):
        done = CliRunner().invoke(cli, [*words, *further], catch_exceptions=False)
        assert done.stderr.rstrip().endswith(f"ended by: {ended}")


@pytest.mark.parametrize(
    "schema,named",
    [
        ({"type": "objekt"}, r"at \$: Invalid type: objekt"),
        ({"properties": {"a": {"items": {"anyOf": [{"type": "integer"}, {"pattern": "(", "type": "string"}]}}}},
         r"at \$\.properties\.a\.items\.anyOf\[1\]: regex parse error"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "uniqueItems": True}}}, r"at \$\.\$defs\.a: Unimplemented"),
        ({"$ref": "https://example.org/schema"}, "not present"),
        ({"items": {"x-guidance": {"lenient": True}}}, r"at \$\.items: 'x-guidance'"),
        ({"$ref": "#"}, r"at \$: nothing satisfies it"),
        ('{"type": ', "is not JSON"),
        ('{"type": "object", "type": "array"}', "twice"),
        ("[]", "no object"),
        (json.dumps({"enum": ["x" * MAX_SCHEMA_BYTES]}), f"more than {MAX_SCHEMA_BYTES} bytes"),
        ("[" * 30_000, "nested deeper"),
        ({"const": {str(i): i for i in range(3)} | {"k": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}},
         "nested deeper than 32"),
        ({"allOf": [{"type": "string", "pattern": f".*[a-m]{{{i}}}.*"} for i in range(1, 12)]}, "cannot be used"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_used_name_the_place(model, schema, named):
    began = process_time()
    with pytest.raises(RequestError, match=named) as caught:
        model.generate("The", json_schema=schema)
    assert len(str(caught.value)) < 400 and process_time() - began < 20


def test_one_schema_is_taken_where_its_grammars_are(model):
    with pytest.raises(RequestError, match="both given"):
        elmoe.SamplingParams(json_schema={}, json_object=True)
    with pytest.raises(RequestError, match="the sampling parameter json_schema"):
        elmoe.SamplingParams(json_schema=5)
    with pytest.raises(RequestError, match=r"Model\.grammars"):
        elmoe.SamplingParams(json_object=True).request((1,), model.tokenizer)


def test_a_schema_that_takes_too_many_steps_is_refused(model, monkeypatch):
    monkeypatch.setitem(LIMITS, "max_grammar_size", 20)
    with pytest.raises(RequestError, match=r"at \$.*(size|big|large)"):
        Grammars(model.tokenizer, model.spec.vocabulary, (0,)).json(SCHEMA)


def test_without_llguidance_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match="llguidance") as caught:
        Grammars(model.tokenizer, model.spec.vocabulary, (0,)).json()
    assert "elmoe[server]" in caught.value.hint
    assert model.generate("The", max_tokens=2).text


def test_compiled_schemas_are_kept(model):
    assert model.grammars.json(SCHEMA) is model.grammars.json(json.dumps(SCHEMA))
    for index in range(40):
        model.grammars.json({"const": index})
    assert len(model.grammars._kept) == 32


def test_tokens_of_sentencepiece_are_their_bytes():
    tokenizer = sentencepiece()
    ids = {tokenizer.id_to_token(index): index for index in range(tokenizer.get_vocab_size())}
    grammars = Grammars(tokenizer, TINY.vocabulary, TINY.eos_tokens)
    state = grammars.json({"type": "object", "properties": {"a": {"const": "\u00e9"}}, "required": ["a"]}).start()
    allowed = np.flatnonzero(~state.excluded()).tolist()
    assert allowed == sorted([ids["<0x7B>"], ids['{"']])
    for piece in ('{"', "a", '":', "\u2581", "<0x22>"):
        assert not state.excluded()[ids[piece]] and state.push(ids[piece]) is None
    assert not state.excluded()[ids["\u00e9"]] and state.excluded()[ids["a"]]
    for piece in ("<0xC3>", "<0xA9>", "<0x22>", "<0x7D>"):
        assert state.push(ids[piece]) is None
    assert state.complete


def test_the_bytes_of_every_token_are_those_that_are_decoded(model):
    grammars = Grammars(model.tokenizer, model.spec.vocabulary, model.spec.eos_tokens)
    no_utf8, *_ = (token for token in range(model.spec.vocabulary) if model.tokenizer.id_to_token(token) == "\u00ff")
    for token in set(range(1, model.spec.vocabulary)) - {no_utf8}:
        assert grammars._tokens().decode_bytes([token]).decode(errors="replace") == model.decode([token])
