"""The command line on real input: every verb, its JSON, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elmoe.trace import load_acceptance, read_trace
from tests.command import run
from tests.templated import templated_store, untemplated_store


def process(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own: for its memory, and for what is read when it starts."""
    return subprocess.run(
        [sys.executable, "-m", "elmoe.cli.main", *arguments],
        capture_output=True, text=True, check=check, env=os.environ | environment, timeout=300,
    )  # fmt: skip


def elmoe(*arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in this process."""
    done = run(*arguments, stdin=stdin.encode())
    assert done.returncode == 0 or not check, done.stderr.decode()
    return subprocess.CompletedProcess(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())


def elmoe_json(*arguments: str) -> dict:
    return json.loads(elmoe(*arguments, "--json").stdout)


def test_demo():
    done = elmoe("demo", "--max-tokens", "24")
    for text in (
        "identical output: yes",
        "draft tokens accepted",
        "tokens per verification",
        "hit rate",
        "slow tier",
        "simulated tier",
        "so no read can be saved, and drafts are additional work",
        "enforced budget, direct reads, throttled to 0.1 GB/s",
        "Half of the experts' bytes are on a slow disk now",
        "Here ",
        "go on with:",
    ):
        assert text in " ".join(done.stdout.split())
    data = elmoe_json("demo", "--max-tokens", "16")
    assert data["identical"] is True and set(data["modes"]) == {"plain", "cache", "elastic"}
    rates = data["on_disk"]["tokens_per_second"]
    assert rates["elastic"] > rates["plain"] > 0 and rates["cache"] > rates["plain"]
    assert data["modes"]["elastic"]["draft_slow_reads"] == 0 and data["modes"]["elastic"]["acceptance_rate"] > 0.3


def test_generate_is_the_same_in_every_mode(tmp_path):
    common = ("generate", "demo", "--prompt", "The whale", "--max-tokens", "20", "--temperature", "0.8", "--seed", "4")
    plain = elmoe_json(*common, "--mode", "plain")
    trace = tmp_path / "run.trace"
    elastic = elmoe_json(*common, "--fast-memory", "25%", "--draft-length", "4", "--trace", str(trace))
    for key in ("text", "token_ids", "logprobs", "finish_reason"):
        assert plain[key] == elastic[key]
    assert len(plain["token_ids"]) == len(plain["logprobs"]) <= 20 and elastic["tier"].startswith("simulated tier")
    assert read_trace(trace).table.num_rows > 20
    text = elmoe(*common, "--mode", "plain").stdout
    assert text == f"The whale{plain['text']}\n"


def test_generate_a_batch_with_stop_strings():
    data = elmoe_json(
        "generate", "demo", "--prompt", "The sea", "--prompt", "def f(x):", "--max-tokens", "30", "--stop", " the"
    )
    assert len(data["results"]) == 2
    assert all(" the" not in row["text"] for row in data["results"])


def test_inspect_and_verify():
    data = elmoe_json("inspect", "demo", "--verify")
    assert data["verified"] and data["experts"] == 512 and data["minimum_fast_memory"] > data["dense_bytes"]
    assert "MSB slices" in elmoe("inspect", "demo").stdout


def test_export_and_convert_back(tmp_path):
    file, store = str(tmp_path / "demo.gguf"), str(tmp_path / "store")
    assert elmoe_json("export", "demo", file)["bytes"] == (tmp_path / "demo.gguf").stat().st_size
    elmoe("convert", file, store)
    common = ("--prompt", "The whale", "--max-tokens", "8")
    assert elmoe_json("generate", store, *common)["logprobs"] == elmoe_json("generate", "demo", *common)["logprobs"]


def test_eval(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The whale is a large animal that lives in the sea. " * 40)
    data = elmoe_json("eval", "demo", "--text", str(text), "--window", "64", "--windows", "3")
    assert 1 < data["target_perplexity"] < 200 and data["tokens"] == 3 * 63 and 0.5 < data["agreement"] <= 1


def test_bench():
    data = elmoe_json("bench", "demo", "--batch", "1,2", "--max-tokens", "8", "--repeats", "1", "--fast-memory", "50%",
                      "--draft-length", "2")  # fmt: skip
    assert len(data["rows"]) == 6 and all(row["identical"] for row in data["rows"])
    assert all(row["tokens_per_second"] > 0 and row["overhead_ms_per_token"] > 0 for row in data["rows"])


def test_synth_and_bench_of_it(tmp_path):
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=300, hidden_size=64, intermediate_size=64,
        moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=256, tie_word_embeddings=False, hidden_act="silu",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    elmoe("synth", str(tmp_path / "config.json"), str(tmp_path / "store"), "--layers", "2", "--seed", "3")
    assert len(elmoe_json("inspect", str(tmp_path / "store"), "--verify")["model"]["layers"]) == 2
    rows = elmoe_json("bench", str(tmp_path / "store"), "--batch", "2", "--max-tokens", "4", "--repeats", "1")["rows"]
    assert all(row["identical"] for row in rows)


def test_an_enforced_budget_gives_the_same_text(tmp_path):
    common = ("generate", "demo", "--prompt", "The whale", "--max-tokens", "20", "--temperature", "0.8", "--seed", "4")
    plain = elmoe_json(*common, "--mode", "plain")
    timeline = tmp_path / "run.json"
    done = process(*common, "--fast-memory", "20MiB", "--slow-bandwidth", "1.7GB/s", "--policy", "lru", "--split",
                "whole_experts", "--timeline", str(timeline), "--json")  # fmt: skip
    data = json.loads(done.stdout)
    assert "reader: direct" in done.stderr and data["tier"] == "enforced budget, direct reads, throttled to 1.7 GB/s"
    assert data["token_ids"] == plain["token_ids"] and data["logprobs"] == plain["logprobs"]
    assert 20 << 20 < data["peak_memory_bytes"] < 320 << 20
    assert data["statistics"]["read_bytes"] > 0 and len(data["statistics"]["phases"]["plain"]["layer_hits"]["msb"]) == 8
    assert {"passes", "kernels", "waits"} <= {
        event["args"]["name"] for event in json.loads(timeline.read_text())["traceEvents"] if event["ph"] == "M"
    }


def test_record_look_at_and_replay_a_trace(tmp_path):
    (tmp_path / "prompts.txt").write_text("The whale was\nA prime number is\n")
    trace = tmp_path / "run.trace"
    facts = elmoe_json("trace", "record", "demo", str(trace), "--prompts", str(tmp_path / "prompts.txt"), "--max-tokens",
                       "24", "--every-position", "--fast-memory", "50%", "--all-ranks")  # fmt: skip
    assert read_trace(trace).header.ranks == 64
    assert facts["statistics"]["committed_tokens"] == 48
    assert elmoe_json("trace", "show", str(trace))["sequences"] == 2
    rates = elmoe_json("trace", "policies", str(trace), "--share", "0.25")["hit_rates"]
    assert set(rates) == {"decayed", "lru", "lfu", "static", "random", "belady"} and rates["belady"] == max(rates.values())
    bench = ("bench", "demo", "--replay", str(trace), "--batch", "2", "--max-tokens", "8", "--repeats", "1", "--reader",
             "direct", "--fast-memory", "50%")  # fmt: skip
    data = elmoe_json(*bench)
    assert data["tier"].endswith("replayed") and len(data["rows"]) == 3 and all(row["identical"] for row in data["rows"])


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_synth_names_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    done = elmoe("synth", str(tmp_path / "config.json"), str(tmp_path / "store"), check=False)
    assert done.returncode == 1 and "config.json'" in done.stderr and "Traceback" not in done.stderr


def test_fit_synthesise_import_and_profile(tmp_path):
    fitted, facts, log = tmp_path / "fit.json", tmp_path / "facts", tmp_path / "log"
    sizes = ("--experts", "16", "--top-k", "2", "--layers", "2")
    made = elmoe_json("trace", "synthesise", "gsm8k", str(facts), *sizes, "--sequences", "4", "--positions", "40")
    assert made["shape"] == [4, 40, 2, 4] and made["source"].startswith("synthetic") and made["statistics"]["reuse at 1"] > 0
    found = elmoe_json("trace", "fit", str(facts), str(fitted))
    assert {row["name"] for row in found["statistics"]} >= {"reuse at 4", "distinct in 4", "LRU hits at 25%"}
    assert "measured" in elmoe("trace", "fit", str(facts), str(fitted), "--force").stdout
    assert elmoe_json("trace", "policies", str(facts))["hit_rates"]["belady"] > 0
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({"layers": [0], "models": {"m": {"expert_counts": {"c4": [list(range(1, 17))]}}}}))
    told = elmoe_json("trace", "import", str(counts), str(tmp_path / "p.json"), "--format", "olmoe")
    assert told["experts"] == 16 and told["domains"] == ["c4"]
    popular = ("--popularity", str(tmp_path / "p.json"), "--domain", "c4")
    assert "of m, c4" in elmoe("trace", "synthesise", str(fitted), str(facts), *sizes, *popular, "--force").stdout.replace(
        "\n", " "
    )
    log.write_text('{"n_layers": 1, "n_experts": 4, "top_k": 2}\n[0, 3, 1]\n[0, 2, 1]\n')
    assert elmoe_json("trace", "import", str(log), str(facts), "--format", "ndjson", "--force")["shape"] == [1, 2, 1, 2]
    (tmp_path / "prompts.txt").write_text("The whale was\n")
    profiled = elmoe_json("trace", "profile", "demo", str(tmp_path / "a.json"), "--prompts", str(tmp_path / "prompts.txt"),
                          "--max-tokens", "8", "--depth", "2")  # fmt: skip
    assert profiled["depths"] == [1, 2] and load_acceptance(tmp_path / "a.json").status == "measured"


def test_doctor():
    data = elmoe_json("doctor", "--quick")
    assert data["native_kernels"] is True and data["variant"] in data["variants"] and data["store"] == "demo"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("generate", "missing-store", "--prompt", "x"), "missing-store"),
        (("generate", "demo", "--prompt", ""), "prompt is empty"),
        (("generate", "demo", "--prompt", "word " * 4000), "context is 2048"),
        (("generate", "demo", "--prompt", "x", "--fast-memory", "1MiB"), "minimum of"),
        (("generate", "demo", "--prompt", "x", "--fast-memory", "lots"), "not an amount of memory"),
        (("generate", "demo", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("generate", "demo", "--prompt", "x", "--trace", "no/such/folder/t"), "cannot write trace"),
        (("bench", "demo", "--modes", "fast"), "no mode"),
        (("bench", "demo", "--replay", "no.trace"), "no.trace"),
        (("generate", "demo", "--prompt", "x", "--slow-bandwidth", "1.7GB"), "not a bandwidth"),
        (("generate", "demo", "--prompt", "x", "--slow-bandwidth", "1.7GB/s"), "no slow tier"),
        (("generate", "demo", "--prompt", "x", "--fast-memory", "1MiB", "--mode", "plain"), "minimum of"),
        (("trace", "show", "pyproject.toml"), "not a readable Parquet"),
        (("trace", "fit", "pyproject.toml", "out"), "not a readable Parquet"),
        (("trace", "import", "pyproject.toml", "out", "--format", "ndjson"), "line 1: not JSON"),
        (("trace", "synthesise", "none", "out", "--experts", "4", "--top-k", "2", "--layers", "1"), "preset: alpaca"),
        (("convert", "no-such-folder", "out"), "no-such-folder"),
        (("convert", "no-such.gguf", "out"), "no-such.gguf"),
        (("convert", "no-such-folder", "out", "--tokenizer", "pyproject.toml"), "--tokenizer is for GGUF"),
        (("export", "no-such-store", "out"), "no-such-store"),
        (("export", "demo", "pyproject.toml"), "exists already"),
    ],
)
def test_errors_name_the_thing(arguments, message, tmp_path):
    done = elmoe(*arguments, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not Path("out").exists()


def test_a_variant_this_processor_lacks_is_named():
    done = process("generate", "demo", "--prompt", "x", check=False, ELMOE_VARIANT="sve2")
    assert done.returncode == 1 and "sve2" in done.stderr and "Traceback" not in done.stderr
    done = process("generate", "demo", "--prompt", "x", check=False, ELMOE_PREFETCH="far")
    assert done.returncode == 1 and "ELMOE_PREFETCH is 'far'" in done.stderr and "Traceback" not in done.stderr


def test_prompts_from_standard_input_files_and_json_lines(tmp_path):
    (tmp_path / "prompt.txt").write_text("The whale\n")
    (tmp_path / "prompts.jsonl").write_text('"The sea"\n\n{"prompt": "The whale"}\n')
    common = ("generate", "demo", "--max-tokens", "6")
    plain = elmoe_json(*common, "--prompt", "The whale")
    read = elmoe(*common, "--prompt", "-", "--json", stdin="The whale\n")
    rows = [plain, json.loads(read.stdout), elmoe_json(*common, "--prompt", f"@{tmp_path / 'prompt.txt'}")]
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello!"}]}')
    alike = (("--prompts", str(tmp_path / "chat.jsonl")), ("--prompt", "Hello!"))
    chats = [elmoe_json(*common, "--chat", "--system", "You sing.", *words) for words in alike]
    assert chats[0]["token_ids"] == chats[1]["token_ids"]
    assert [row["prompt"] for row in rows] == ["The whale"] * 3 and len({row["text"] for row in rows}) == 1
    many = elmoe_json(*common, "--prompt", "@@home", "--prompts", str(tmp_path / "prompts.jsonl"))["results"]
    assert [row["prompt"] for row in many] == ["@home", "The sea", "The whale"] and many[2]["text"] == plain["text"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "there is no prompt"),
        (("--store", "The whale"), "there is no file or folder 'The whale'"),
        (("--store", "dmeo"), "did you mean 'demo'?"),
        (("--prompt", "-", "--prompt", "-"), "standard input is given as two prompts"),
        (("--prompt", "@nowhere.txt"), "nowhere.txt"),
        (("--prompt", "x", "--system", "y"), "--system needs --chat"),
        (("--prompts", "bad.jsonl"), "bad.jsonl, line 2 is no prompt"),
        (("--prompts", "empty.jsonl"), "holds no prompt"),
        (("--prompts", "broken.jsonl"), "broken.jsonl, line 1"),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, tuple) else "",
)  # fmt: skip
def test_prompts_that_are_refused(tmp_path, monkeypatch, arguments, words):
    (tmp_path / "bad.jsonl").write_text('"x"\n{"text": "y"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt"\n')
    monkeypatch.chdir(tmp_path)
    named = arguments[:1] == ("--store",)
    done = elmoe("generate", *(arguments[1:] if named else ("demo", *arguments)), check=False)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.strip().splitlines()) <= 3, done.stderr


def test_a_chat_with_a_store_without_a_template_is_refused(tmp_path):
    done = elmoe("generate", str(untemplated_store(tmp_path)), "--prompt", "x", "--chat", check=False)
    assert done.returncode == 1 and "'untemplated' has no chat template" in done.stderr


def test_copies_draw_apart_and_quiet_prints_the_answers_alone():
    common = ("generate", "demo", "--max-tokens", "8", "--temperature", "1", "--seed", "5")
    data = elmoe_json(*common, "--prompt", "The whale", "--prompt", "The whale", "--n", "2")["results"]
    assert len(data) == 4 and len({row["text"] for row in data}) == 4
    again = elmoe_json(*common, "--prompt", "The whale", "--n", "4")["results"]
    assert [row["text"] for row in again] == [row["text"] for row in data]
    done = elmoe(*common, "--prompt", "The whale", "--n", "2", "--quiet")
    assert done.stdout == f"{data[0]['text']}\n{data[1]['text']}\n" and not done.stderr


def test_the_text_of_a_special_token_stops():
    common = ("generate", "demo", "--prompt", "The whale", "--max-tokens", "1500", "--temperature", "1.2", "--seed", "2",
              "--ignore-eos")  # fmt: skip
    free, stopped = elmoe_json(*common), elmoe_json(*common, "--stop", "<|endoftext|>")
    assert 0 in free["token_ids"] and stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: free["token_ids"].index(0) + 1]


def test_a_chat_has_a_system_message_and_messages_of_its_own(tmp_path):
    store = str(templated_store(tmp_path))
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]}) + "\n"
    )
    common = ("generate", store, "--max-tokens", "8")
    one = elmoe_json(*common, "--prompt", "Who?", "--chat", "--system", "Be short.")
    other = elmoe_json(*common, "--prompts", str(tmp_path / "chats.jsonl"))
    assert one["token_ids"] == other["token_ids"] != elmoe_json(*common, "--prompt", "Who?", "--chat")["token_ids"]
    assert one["prompt"] == other["prompt"] == "Who?"


def test_without_a_verb_the_help_is_shown_as_help():
    done = subprocess.run([sys.executable, "-m", "elmoe.cli.main"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Usage: ") and "hint" not in done.stderr
