"""``--memory``: what is foreseen is kept, and what cannot be kept is refused with the amount that would do."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import httpx
import msgspec
import pytest
from fastapi.testclient import TestClient

from elmoe.cli.serve import _is_loopback
from elmoe.engine.cache_layout import layout_of
from elmoe.engine.options import EngineOptions
from elmoe.errors import BudgetError
from elmoe.extras import EXTRAS
from elmoe.models.tensors import macs_per_token
from elmoe.server.app import create_app
from elmoe.server.memory import forecast, planned
from elmoe.server.settings import Settings
from elmoe.store import open_store
from elmoe.store.synthetic import synthesize
from tests.server.live import LiveServer
from tests.tiny import tiny_spec

SPEC = tiny_spec(
    vocabulary=512, hidden=512, layers=6, heads=8, kv_heads=8, head_dim=64, experts=40, top_k=4, expert_width=1024,
    max_positions=2048, tied_embeddings=False,
)  # fmt: skip
MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store of some 400 MB."""
    path = tmp_path_factory.mktemp("memory") / "store"
    synthesize(path, SPEC, 1, lambda done, total: None)
    return path


def size(path):
    return sum(file.stat().st_size for file in path.iterdir())


def test_what_fits_and_what_does_not(large):
    options = EngineOptions(batch=4)
    with open_store(large) as reader:
        whole = forecast(reader, size(large), options, 4 << 30)
        assert whole.whole and whole.resident_share == 1 and planned(options, whole).fast_memory is None
        half = forecast(reader, size(large), options, whole.program + 250 * MIB)
        assert not half.whole and 0.1 < half.resident_share < 0.7
        assert half.program + half.buffers + half.fast <= half.memory
        assert planned(options, half).fast_memory == half.fast
        with pytest.raises(BudgetError) as refused:
            forecast(reader, size(large), options, 100 * MIB)
        needed = int(re.search(r"--memory (\d+)MiB", refused.value.hint).group(1))
        assert forecast(reader, size(large), options, needed * MIB + 16 * MIB).resident_share < 0.3


def test_times_are_those_that_were_measured(large, monkeypatch, tmp_path):
    """Of the store itself where it was measured; of another one scaled; of the demo model where nothing was kept."""
    from elmoe.measure import speeds

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = EngineOptions(batch=4)
    with open_store(large) as reader, open_store("demo") as demo:
        told = forecast(reader, size(large), options, 4 << 30).facts()
        assert "measured on 'demo'" in told["why"] and f"elmoe doctor --store {large}" in told["why"]
        first = speeds.measure(demo, repeats=1)
        speeds.keep(first)
        times = forecast(reader, size(large), options, 4 << 30).times
        touched = speeds.touched_bytes(reader) / speeds.touched_bytes(demo)
        assert times.decode == pytest.approx(first.decode_seconds * max(touched, macs_per_token(SPEC) / first.decode_macs))
        own = speeds.measure(reader, repeats=1)
        speeds.keep(own)
        speeds.keep(msgspec.structs.replace(own, machine="another", decode_seconds=1e9))
        whole = forecast(reader, size(large), options, 4 << 30)
        assert whole.times.decode == own.decode_seconds and whole.times.prompt_seconds == 1000 * own.prompt_seconds
        assert "measured on this store" in whole.facts()["why"] and whole.times.decode_reads == whole.times.prompt_reads == 0
        half = forecast(reader, size(large), options, whole.program + 250 * MIB)
        assert half.times.decode == own.decode_seconds and half.times.decode_reads > 0 and half.times.prompt_reads > 0
        assert "GB/s of disk" in half.facts()["why"] and "ms read" in half.facts()["why"]
        for content in ("", "[", "[{}]", speeds.kept_file().read_text().replace('"bytes": ', '"bytes": -')):
            speeds.kept_file().write_text(content)
            assert speeds.kept(large) is None


def test_a_forecast_needs_no_other_extra():
    """Neither here nor in `elmoe doctor`, which measures."""
    code = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import elmoe.measure.speeds, elmoe.server.memory"
    done = subprocess.run([sys.executable, "-c", code, *EXTRAS["sim"], *EXTRAS["chat"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_stays_within_what_was_given(large):
    """With prompts of more than a chunk, several at once, and drafts."""
    given = 390 * MIB
    assert size(large) > given
    with LiveServer(str(large), "--memory", "390MiB", "--batch", "4", "--model-name", "m") as server:
        told = next(line for line in server.log() if line["message"] == "forecast")
        assert told["memory"] == "390.0MiB" and float(told["experts_in_memory"].rstrip("%")) < 80

        async def main():
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
                bodies = [
                    {"model": "m", "prompt": [(7 * i + at) % 512 for at in range(600)], "max_tokens": 8, "ignore_eos": True}
                    for i in range(6)
                ]
                return await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))

        assert all(response.status_code == 200 for response in asyncio.run(main()))
        with open(f"/proc/{server.process.pid}/status") as file:
            peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
        assert peak <= given, json.dumps({"peak": peak / MIB, "told": told})
        metrics = httpx.get(f"{server.url}/metrics").text
        assert float(re.search(r"^elmoe_read_bytes_total (\S+)", metrics, re.MULTILINE).group(1)) > 0


def test_too_little_is_refused_and_two_ways_at_once():
    with pytest.raises(RuntimeError, match=r"(?s)too little for this model.*hint: give --memory \d+MiB"):
        LiveServer("demo", "--memory", "50MiB")
    with pytest.raises(RuntimeError, match="--memory divides the memory itself"):
        LiveServer("demo", "--memory", "8GiB", "--fast-memory", "1GiB")


@pytest.mark.parametrize("window", [None, 40])
def test_an_answer_without_a_length_takes_what_the_cache_still_holds(store, tmp_path, window):
    """The KV cache holds fewer positions than the model's context; layers with windows need fewer pages than others."""
    import elmoe

    attention = msgspec.structs.replace(tiny_spec().layers[0].attention, window=window)
    spec = tiny_spec(max_positions=2048)
    kept = [msgspec.structs.replace(layer, attention=attention) for layer in spec.layers[1:]]
    spec = msgspec.structs.replace(spec, layers=(spec.layers[0], *kept))
    synthesize(tmp_path / "store", spec, 1, lambda done, total: None)
    layout, chunk = layout_of(spec), 64
    pages = layout.pages(640, chunk)
    with elmoe.load(tmp_path / "store", kv_memory=pages * layout.page_bytes, prefill_chunk=chunk, mode="plain") as model:
        app = create_app(model, Settings("m"))
        with TestClient(app) as client:
            assert client.get("/props").json()["context"] == 640
            for given in ({}, {"max_tokens": 4000}):
                body = {"model": "m", "prompt": [5] * 600, "ignore_eos": True, "temperature": 0} | given
                answer = client.post("/v1/completions", json=body).json()
                assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] <= 640
            full = client.post("/v1/completions", json=body | {"prompt": [5] * 640})
            assert full.status_code == 400 and "context" in full.json()["error"]["code"]


def test_pages_of_windows_are_foreseen_as_they_are_held(tmp_path):
    """A layer with a window of 40 takes three pages at most, whatever the context is."""
    spec = tiny_spec(max_positions=1 << 15)
    attention = msgspec.structs.replace(spec.layers[0].attention, window=40)
    spec = msgspec.structs.replace(
        spec, layers=tuple(msgspec.structs.replace(layer, attention=attention) for layer in spec.layers)
    )
    synthesize(tmp_path / "store", spec, 1, lambda done, total: None)
    with open_store(tmp_path / "store") as reader:
        found = forecast(reader, size(tmp_path / "store"), EngineOptions(batch=2, prefill_chunk=64), 4 << 30)
    layout = layout_of(spec)
    assert found.kv == 2 * layout.pages(1 << 15, 64) * layout.page_bytes == 2 * 3 * layout.groups * layout.page_bytes


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.5.5.5", True), ("::1", True), ("localhost", True), ("::1234", False), ("0.0.0.0", False),
     ("localhost.example", False), ("127.example", False), ("10.0.0.1", False)],
)  # fmt: skip
def test_only_loopback_needs_no_key(host, inside):
    assert _is_loopback(host) is inside
