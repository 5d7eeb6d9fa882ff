"""Routing that vLLM returned becomes routing facts: arrays, archives of arrays, and responses of its server."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.errors import TraceError
from elmoe.trace import import_vllm_routed, read_facts

EXPERTS, TOP_K, LAYERS = 16, 3, 4
RNG = np.random.default_rng(0)


def ids(tokens: int, layers: int = LAYERS) -> np.ndarray:
    """Different experts in each place, as int16."""
    return np.argsort(RNG.random((tokens, layers, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.int16)


def response(prompt: np.ndarray, *generated: np.ndarray) -> dict:
    """Of vLLM's server."""
    choices = [{"index": i, "text": "x", "routed_experts": one.tolist()} for i, one in enumerate(generated)]
    return {"id": "cmpl-1", "prompt_routed_experts": prompt.tolist(), "choices": choices}


def test_a_response_holds_a_prompt_and_its_completions(tmp_path):
    prompt, first, second, other = ids(5), ids(7), ids(4), ids(3)
    lines = [response(prompt, first, second), response(other, first)]
    (tmp_path / "run.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    facts = import_vllm_routed(tmp_path / "run.jsonl", EXPERTS)
    assert facts.prompts.tolist() == [5, 5, 3] and facts.lengths.tolist() == [12, 9, 10]
    assert (facts.experts, facts.top_k, facts.ranked.shape) == (EXPERTS, TOP_K, (3, 12, LAYERS, TOP_K))
    assert np.array_equal(facts.ranked[1, :9], np.concatenate((prompt, second)))
    assert np.array_equal(facts.decoding().ranked[2, :8], np.concatenate((other[-1:], first)))


def test_archives_hold_sequences_by_their_ending(tmp_path):
    arrays = {f"{kind}_{n}": ids(2 + n) for n in range(11) for kind in ("prompt_routed_experts", "routed_experts")}
    np.savez_compressed(tmp_path / "many.npz", **arrays)
    facts = import_vllm_routed(tmp_path / "many.npz", EXPERTS)
    assert facts.lengths.tolist() == [2 * (2 + n) for n in range(11)] and facts.prompts.tolist() == list(range(2, 13))
    np.savez(tmp_path / "one.npz", routed_experts=arrays["routed_experts_3"])
    facts = import_vllm_routed(tmp_path / "one.npz", EXPERTS)
    assert facts.prompts.tolist() == [1] and np.array_equal(facts.ranked[0], arrays["routed_experts_3"])


def test_layers_without_experts_and_tokens_without_routing_are_left_out(tmp_path):
    whole = ids(9)
    whole[:, 0], whole[7:] = 0, -1
    np.save(tmp_path / "one.npy", whole)
    facts = import_vllm_routed(tmp_path / "one.npy", EXPERTS, 4)
    assert facts.prompts.tolist() == [4] and np.array_equal(facts.ranked[0], whole[:7, 1:])
    assert facts.source == "imported: vLLM, 3 layers, top 3 of 16; one.npy; 1 layers without experts left out"


def test_the_command_writes_a_facts_file(tmp_path):
    np.save(tmp_path / "one.npy", ids(8))
    ask = ["trace", "import", str(tmp_path / "one.npy"), str(tmp_path / "out.facts"), "--format", "vllm-routed"]
    done = CliRunner().invoke(cli, [*ask, "--experts", "16", "--prompt-tokens", "3", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["shape"] == [1, 8, LAYERS, TOP_K]
    assert read_facts(tmp_path / "out.facts").prompts.tolist() == [3]
    refused = CliRunner().invoke(cli, ask)
    assert "go together" in str(refused.exception)


def written(tmp_path, name, content):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "none of .npy"),
        ("a.npy", b"\x93NUMPY", "cannot read"),
        ("a.npy", pickle.dumps([1]), "cannot read"),
        ("a.npz", b"PK\x05\x06", "cannot read"),
        ("a.npy", ids(4).astype(np.float32), "not whole numbers"),
        ("a.npy", ids(4)[:, 0], "not whole numbers"),
        ("a.npy", ids(4) + 9, "the model has 16"),
        ("a.npy", np.where(np.arange(6)[:, None, None] == 2, -1, ids(6)), "expert -1 is named"),
        ("a.npy", np.full((4, 2, 3), -1), "there is no token"),
        ("a.npy", np.zeros((4, 2, 3), np.int16), "no routing was recorded"),
        ("a.npy", np.repeat(ids(1), 2, axis=0)[..., [0, 0, 1]], "twice"),
        ("a.npz", {"other": ids(2)}, "holds no routed_experts"),
        ("a.npz", {"prompt_routed_experts": ids(2, 3), "routed_experts": ids(2)}, r"the prompt has layers.* \(3, 3\)"),
        ("a.npz", {"routed_experts_0": ids(2, 3), "routed_experts_1": ids(2)}, "different layers"),
        ("a.npz", {"prompt_routed_experts": ids(2), "routed_experts_0": ids(2)}, "prompt_routed_experts has no"),
        ("a.json", b'{"routed_experts": [[[2, true]], [[0, 2]]]}', "not whole numbers.* got `bool`"),
        ("a.json", b"[1]", "is no object"),
        ("a.json", b'{"choices": [{"text": "x"}]}', "has no routed_experts"),
        ("a.json", b'{"routed_experts": [[[1, 2]], [[1]]]}', "lists of different lengths|not whole numbers"),
        ("a.json", b'{"routed_experts": [[["1", "2"]]]}', "not whole numbers"),
        ("a.json", b'{"routed_experts": ' + b"[" * 100_000, "not JSON"),
        ("a.json", b"", "holds no routed_experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(tmp_path, name, content, told):
    path = written(tmp_path, name, content)
    with pytest.raises(TraceError, match=told):
        import_vllm_routed(path, EXPERTS, 1 if path.suffix == ".npy" else None)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ids(4))
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(raw.replace(b"(4, 4, 3)", b"(9, 9, 9)").replace(b"(9, 9, 9)", b"(4, 4, 9)"))
    with pytest.raises(TraceError, match="cannot read"):
        import_vllm_routed(tmp_path / "a.npy", EXPERTS, 1)
    with pytest.raises(TraceError, match=r"is for a \.npy file"):
        import_vllm_routed(tmp_path / "a.npy", EXPERTS)


def npy(shape: str, values: bytes = b"") -> bytes:
    """A file of ``numpy.save`` whose header has this shape."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


def test_a_damaged_file_is_a_trace_error(tmp_path):
    """Whatever NumPy, zipfile and zlib raise of it."""
    np.savez_compressed(tmp_path / "whole.npz", routed_experts=ids(40))
    whole, rng, refused = (tmp_path / "whole.npz").read_bytes(), np.random.default_rng(1), 0
    damaged = {"shape.npy": npy("(2, 3"), "large.npy": npy("(10000000000000, 1, 1)")}
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("routed_experts.npy", npy("(10000000000000, 1, 1)", b"1234"))
    for index in range(300):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[rng.integers(len(changed), size=2)] = rng.integers(256, size=2)
        damaged[f"{index}.npz"] = changed.tobytes()
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    for name in ("large.npz", *damaged):
        try:
            import_vllm_routed(tmp_path / name, EXPERTS, 1 if name.endswith("npy") else None)
        except TraceError:
            refused += 1
    assert refused > 250


def test_a_file_of_more_ids_than_allowed_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "sparse.npy", "wb") as file:
        file.write(npy("(1000000000000, 4, 1)"))
        file.truncate(file.tell() + 4_000_000_000_000)
    with pytest.raises(TraceError, match="more than 1073741824 expert ids"):
        import_vllm_routed(tmp_path / "sparse.npy", EXPERTS, 5)
