"""Imports: step logs of others in all their shapes, published statistics, and what is wrong with them, by file and place."""

from __future__ import annotations

import json

import numpy as np
import pytest

from elmoe.errors import TraceError
from elmoe.trace import Locality, import_ndjson, import_popularity, load_popularity, save_popularity, synthesise
from elmoe.trace import ndjson as ndjson_module
from elmoe.trace import popularity as popularity_module

HEADER = {"n_layers": 3, "n_experts": 8, "top_k": 2, "model": "small"}
STEPS = [[[0, 5, 1], [1, 2, 3], [2, 7, 0]], [[0, 4, 1], [1, 3, 2], [2, 6, 5]], [[0, 1, 5], [1, 0, 7], [2, 2, 4]]]
RANKED = np.array([[layer[1:] for layer in step] for step in STEPS])


def write(path, *lines: object):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def flat(step: list[list[int]]) -> list[int]:
    return [number for layer, *experts in step for expert in experts for number in (layer, expert)]


SHAPES = {
    "a line per layer": [layer for step in STEPS for layer in step],
    "a line per step": STEPS,
    "without layer ids": [[layer[1:] for layer in step] for step in STEPS],
    "flat pairs": [flat(step) for step in STEPS],
    "objects, flat": [{"step": n, "phase": "decode", "pos": 9 + n, "e": flat(step)} for n, step in enumerate(STEPS)],
    "objects, nested": [
        {"kind": "step", "pos": n, "tok_id": 3, "layer_experts": [layer[1:] for layer in step]}
        for n, step in enumerate(STEPS)
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        {"format": "moearc-trace-v1", "n_layer": 3, "n_layers_routed": 3, "n_expert_used": 2, "n_expert": 8},
        {"arch": {"num_hidden_layers": 5, "num_experts": 8, "num_experts_per_tok": 2}},
    ],
)
def test_every_shape_of_step_log_gives_the_same_facts(tmp_path, header, shape):
    facts = import_ndjson(write(tmp_path / "log", header, *SHAPES[shape], "\n", {"summary": 1}))
    assert np.array_equal(facts.ranked[0], RANKED) and facts.ranked.shape == (1, 3, 3, 2)
    assert (facts.experts, facts.top_k, facts.prompts.tolist(), facts.lengths.tolist()) == (8, 2, [1], [3])
    assert facts.source == f"imported: {header.get('model', 'a model')}, 3 layers, top 2 of 8; log"


def test_prefill_steps_are_the_prompt_and_dense_layers_may_be_left_out(tmp_path):
    rows = [{"phase": "prefill" if n < 2 else "decode", "e": flat(step)} for n, step in enumerate(STEPS)]
    facts = import_ndjson(write(tmp_path / "log", HEADER, *rows))
    assert facts.prompts.tolist() == [3] and np.array_equal(facts.decoding().ranked[0, 0], RANKED[2])
    sparse = [[[1, 5, 1], [3, 2, 3]]] * 2
    assert import_ndjson(write(tmp_path / "log", HEADER | {"n_layers": 4}, *sparse)).ranked.shape == (1, 2, 2, 2)


BAD_LOGS = {
    "line 0: there is no header": [],
    "line 1: there is no header": [STEPS[0]],
    "line 1: the header lacks n_expert": [{"n_layers": 3, "top_k": 2}],
    "line 1: the header lacks n_layer": [{"n_experts": 3, "top_k": 2}],
    "line 1: top_k is 9": [HEADER | {"top_k": 9}],
    "line 1: n_experts is 70000": [HEADER | {"n_experts": 70000}],
    "line 1: there is no step": [HEADER],
    "line 2: not JSON": [HEADER, "[[0, 1"],
    "line 3: layer 1 names an expert twice": [HEADER, STEPS[0], [[0, 1, 2], [1, 3, 3], [2, 0, 1]]],
    "line 2: layer 0 names an expert outside": [HEADER, [[0, 1, 8], [1, 2, 3], [2, 0, 1]]],
    "line 2: a layer of a step is empty": [HEADER, [[], [1, 2, 3]]],
    "line 2: layer 0 has 3 experts": [HEADER, [[0, 1, 2, 3], [1, 2, 3], [2, 0, 1]]],
    "line 2: layer 3 is named, the header says 3": [HEADER, [[0, 1, 2], [1, 2, 3], [3, 0, 1]]],
    "line 2: layers do not ascend": [HEADER, [[1, 1, 2], [0, 2, 3], [2, 0, 1]]],
    "line 2: the first step has 2 layers": [HEADER | {"n_layers_routed": 3}, STEPS[0][:2]],
    "line 3: a step has layers 0, 1, the first one 0, 1, 2": [HEADER, STEPS[0], STEPS[1][:2]],
    "line 6: a step has layers 0, 2": [HEADER, *STEPS[0], STEPS[1][0], STEPS[1][2]],
    "line 3: a step begins before": [HEADER, STEPS[0][0], STEPS[1]],
    "line 2: a flat step has 5 numbers": [HEADER, [0, 1, 0, 2, 1]],
    "line 2: layer 0 does not have 2 experts": [HEADER, [0, 1, 1, 2, 1, 3, 2, 1]],
    "line 2: layers and experts must be whole": [HEADER, [[0, 1.5, 2], [1, 2, 3], [2, 0, 1]]],
    "line 2: a step is neither": [HEADER, "7\n"],
    "line 2: an object has lists": [HEADER, {"ids": [1, 2]}],
    "line 3: a prefill step follows": [
        HEADER,
        {"phase": "decode", "e": flat(STEPS[0])},
        {"phase": "prefill", "e": STEPS[1]},
    ],
}


@pytest.mark.parametrize("message", BAD_LOGS)
def test_bad_logs_are_refused_by_line(tmp_path, message):
    with pytest.raises(TraceError) as caught:
        import_ndjson(write(tmp_path / "log", *BAD_LOGS[message]))
    assert f"log', {message}" in str(caught.value)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ndjson_module, "LINE_LIMIT", 200)
    with pytest.raises(TraceError, match="line 2: the line has more than 200"):
        import_ndjson(write(tmp_path / "log", HEADER, "[" + "0," * 200))
    monkeypatch.setattr(ndjson_module, "MAX_IDS", 10)
    with pytest.raises(TraceError, match="more than 10 expert ids"):
        import_ndjson(write(tmp_path / "log", HEADER, *STEPS))
    with pytest.raises(TraceError, match="cannot read"):
        import_ndjson(tmp_path / "missing")


def esft(rows: list[list[float]]) -> dict:
    return {"token_scores": {str(n + 1): {str(e): v for e, v in enumerate(row)} for n, row in enumerate(rows)}}


def test_esft_scores_of_a_file_or_a_folder(tmp_path):
    write(tmp_path / "a_scores_law.json", esft([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    write(tmp_path / "a_scores_intent.json", esft([[0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]))
    one = import_popularity(tmp_path / "a_scores_law.json", "esft")
    assert one.layers == (1, 2) and one.experts == 3 and list(one.domains) == ["law"] and one.status == "measured"
    both = import_popularity(tmp_path, "esft", "Other")
    assert set(both.domains) == {"law", "intent"} and both.model == "Other"
    assert both.table(2, "law")[0].tolist() == [0.5, 0.25, 0.25]
    assert both.table(2)[1] == pytest.approx([0.25, 0.25, 0.5])
    assert [row.argmax() for row in both.table(4, "law")] == [0, 0, 2, 2] and both.table(1, "law").argmax() == 0
    with pytest.raises(TraceError, match="no domain 'x'"):
        both.table(2, "x")
    write(tmp_path / "b_scores_c.json", esft([[0.5, 0.25, 0.25]]))
    with pytest.raises(TraceError, match=r"b_scores_c.json.*other files"):
        import_popularity(tmp_path, "esft")


def test_olmoe_counts_and_which_model(tmp_path):
    models = {
        "mixtral": {"expert_counts": {"c4": [[3, 1], [1, 1]]}},
        "olmoe": {"expert_counts": {"c4": [[1, 2, 1], [0, 2, 2]], "book": [[1, 1, 2], [2, 1, 1]]}},
    }
    path = write(tmp_path / "counts", {"layers": [0, 7], "models": models})
    found = import_popularity(path, "olmoe")
    assert (
        found.model == "olmoe"
        and found.layers == (0, 7)
        and found.table(2, "c4").tolist() == [[0.25, 0.5, 0.25], [0, 0.5, 0.5]]
    )
    assert import_popularity(path, "olmoe", "mixtral").experts == 2
    with pytest.raises(TraceError, match="no model 'x'"):
        import_popularity(path, "olmoe", "x")


def test_fiddlers_order_gives_the_order_and_says_what_is_assumed(tmp_path):
    order = [[1, 0], [0, 1], [1, 2], [0, 0], [0, 2], [1, 1]]
    found = import_popularity(write(tmp_path / "o", {"order": order, "model": "Mix"}), "fiddler")
    assert found.status == "assumed" and "assumed" in found.source and found.model == "Mix"
    assert np.argsort(-found.table(2), axis=1).tolist() == [[1, 0, 2], [0, 2, 1]]


BAD_STATISTICS = [
    ("esft", {"experts": {}}, "lacks token_scores"),
    ("esft", {"token_scores": {"x": {}}}, "'x' is no layer"),
    ("esft", {"token_scores": {"1": {"0": 0.5, "2": 0.5}}}, r"token_scores.1: experts are not 0..1"),
    ("esft", {"token_scores": {"1": {"0": 0.5, "1": -0.5}}}, r"token_scores.1: not a list of numbers"),
    ("esft", {"token_scores": {"1": {"0": 0, "1": 0}}}, "all 0"),
    ("esft", esft([[0.5, 0.5], [1.0]]), "as many experts"),
    ("esft", '{"token_scores": {"1": {"0": 0.5, "0": 0.5}}}', "'0' is there twice"),
    ("esft", '{"token_scores": {"1": {"0": NaN, "1": 1}}}', "not a list of numbers"),
    ("esft", "[1]", "no JSON object"),
    ("esft", "{", "not JSON"),
    ("olmoe", {"models": {}, "layers": [0]}, "no model ''"),
    (
        "olmoe",
        {"models": {"m": {"expert_counts": {"c4": [[1], [1]]}}}, "layers": [0]},
        "expert_counts.c4: not a list for each",
    ),
    ("olmoe", {"models": {"m": {"expert_counts": {"c4": [["1"]]}}}, "layers": [0]}, r"c4\[0\]: not a list of numbers"),
    ("olmoe", {"models": {"m": {"expert_counts": {"c4": [[1], [1]]}}}, "layers": [7, 0]}, "ascend"),
    ("olmoe", {"models": {"m": {"expert_counts": {}}}, "layers": [0]}, "at least one domain"),
    ("fiddler", {"order": [[0, 1], [0, 1]]}, r"order\[1\]: layer 0, expert 1 is there twice"),
    ("fiddler", {"order": [[0, 0], [1, 1]]}, "2 pairs are not all of 2 layers x 2"),
    ("fiddler", {"order": [[0]]}, r"order\[0\]: not a pair"),
    ("fiddler", {"order": [[0, -1]]}, r"order\[0\]: -1 is no"),
    ("fiddler", {"order": []}, "0 pairs"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD_STATISTICS)
def test_bad_statistics_are_refused(tmp_path, kind, content, message):
    with pytest.raises(TraceError, match=message) as caught:
        import_popularity(write(tmp_path / "a_scores.json", content), kind)
    assert "a_scores.json" in str(caught.value)


def test_popularity_files(tmp_path, monkeypatch):
    found = import_popularity(write(tmp_path / "a_scores_law.json", esft([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])), "esft")
    path = tmp_path / "p.json"
    save_popularity(found, path)
    assert load_popularity(path) == found
    locality = Locality(popularity=0, sequence=0, token=0, correlation=0, source="a test")
    facts = synthesise(locality, 3, 1, 2, 100, 20, 0, popularity=found.table(2))
    share = np.bincount(facts.chosen[:, :, 0].ravel(), minlength=3) / 2000
    assert share == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    whole = json.loads(path.read_text())
    for changes, message in (
        ({"version": 5}, "version 5"),
        ({"domains": {"law": []}}, "as many experts"),
        ({"domains": {"law": [[0.5, 0.5, 0.5]] * 2}}, "sum to 1"),
        ({"domains": {"law": [[1.5, -0.5, 0]] * 2}}, "not frequencies"),
        ({"layers": []}, "1..4096 layers"),
        ({"extra": 1}, "unknown field"),
    ):
        write(path, whole | changes)
        with pytest.raises(TraceError, match=message):
            load_popularity(path)
    with pytest.raises(TraceError, match="there is no popularity"):
        load_popularity(tmp_path / "none")
    monkeypatch.setattr(popularity_module, "SOURCE_LIMIT", 10)
    with pytest.raises(TraceError, match="more than 10 bytes"):
        load_popularity(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match="holds no"):
        import_popularity(tmp_path / "empty", "esft")
