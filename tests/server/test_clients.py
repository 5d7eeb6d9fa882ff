"""OpenAI's own client against a server in a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil

import openai
import pytest

from tests.server.live import LiveServer

CHAT = {"model": "whale", "messages": [{"role": "user", "content": "What is a whale?"}], "max_tokens": 16}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_a_chat_whole_and_streamed(client, model):
    alone = model.chat(CHAT["messages"], max_tokens=16, temperature=0.8, seed=5, logprobs=3)
    answer = client.chat.completions.create(**CHAT, temperature=0.8, seed=5, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == alone.text and answer.choices[0].finish_reason == "length"
    entries = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == list(alone.logprobs) and len(entries[0].top_logprobs) == 3
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == alone.text
    stream = client.chat.completions.create(
        **CHAT, temperature=0.8, seed=5, stream=True, stream_options={"include_usage": True}
    )  # fmt: skip
    *pieces, last = stream
    assert "".join(piece.choices[0].delta.content for piece in pieces) == alone.text
    assert last.usage == answer.usage and pieces[0].choices[0].delta.role == "assistant"


def test_completions_and_models(client, model):
    answer = client.completions.create(
        model="whale", prompt=["The whale", "The sea"], max_tokens=8, temperature=0, logprobs=1
    )
    alone = model.generate(["The whale", "The sea"], max_tokens=8)
    assert [choice.text for choice in answer.choices] == [one.text for one in alone]
    assert [model.id for model in client.models.list()] == ["whale"] and client.models.retrieve("whale").id == "whale"
    extra = client.completions.create(
        model="whale", prompt="The whale", max_tokens=8, seed=1, extra_body={"top_k": 1, "ignore_eos": True}
    )  # fmt: skip
    assert extra.choices[0].text == alone[0].text


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(**(CHAT | {"model": "gpt-4"}))
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**CHAT, temperature=-1)
    assert refused.value.param == "temperature" and refused.value.code == "invalid_value"


def test_tasks_are_served_together(live, model):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**CHAT, temperature=0, stream=True)
            streamed = "".join([piece.choices[0].delta.content async for piece in stream])
            calls = [client.chat.completions.create(**CHAT, temperature=1, seed=seed) for seed in range(8)]
            return streamed, [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    streamed, texts = asyncio.run(main())
    assert streamed == model.chat(CHAT["messages"], max_tokens=16).text
    assert texts == [model.chat(CHAT["messages"], max_tokens=16, temperature=1, seed=seed).text for seed in range(8)]


def test_keys_are_asked_for(store, tmp_path):
    (tmp_path / "keys").write_text("# of the house\nfirst key\nother key\n")
    with LiveServer("demo", "--api-key-file", str(tmp_path / "keys"), "--cors-origins", "https://chat.example") as server:
        for key, allowed in (
            ("first key", True),
            ("other key", True),
            ("third", False),
            ("# of the house", False),
            ("", False),
        ):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key or "x", max_retries=0)
            if allowed:
                assert [model.id for model in client.models.list()] == ["demo"]
            else:
                with pytest.raises(openai.AuthenticationError, match="API key"):
                    client.models.list()
            client.close()
        import httpx

        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        preflight = {"origin": "https://chat.example", "access-control-request-method": "POST"}
        allowed = httpx.options(f"{server.url}/v1/models", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        other = httpx.options(f"{server.url}/v1/models", headers=preflight | {"origin": "https://else.example"})
        assert "access-control-allow-origin" not in other.headers
        assert "other key" not in server.text() and "first key" not in server.text()


def test_a_key_of_the_environment_is_one_whatever_it_holds(store):
    import httpx

    with LiveServer("demo", environment=os.environ | {"ELMOE_API_KEY": " long secret\n"}) as server:
        for key, status in (("long secret", 200), ("long", 401), ("secret", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
    with pytest.raises(RuntimeError, match=r"\$ELMOE_API_KEY is empty"):
        LiveServer("demo", environment=os.environ | {"ELMOE_API_KEY": ""})


def test_what_can_never_fit_is_not_told_to_come_again(store):
    import httpx

    with LiveServer("demo", "--batch", "1", "--queue", "1") as server:
        for body, param in (({"prompt": "a", "n": 3}, "n"), ({"prompt": ["a", "b", "c"]}, "prompt")):
            answer = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "max_tokens": 1} | body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
            assert "3 answers are wanted, this server gives 2" in answer.json()["error"]["message"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_tls_and_what_does_not_fit(store, tmp_path):
    import ssl
    import subprocess

    import httpx

    names = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-out", names[0], "-keyout", names[1]], capture_output=True, check=True,
    )  # fmt: skip
    with LiveServer("demo", "--tls-cert", str(names[0]), "--tls-key", str(names[1])) as server:
        assert server.url.startswith("https://")
        assert httpx.get(f"{server.url}/health", verify=ssl.create_default_context(cafile=names[0])).status_code == 200
    for arguments in (("--tls-cert", names[0]), ("--tls-cert", names[0], "--tls-key", names[0])):
        with pytest.raises(RuntimeError, match="error: "):
            LiveServer("demo", *map(str, arguments))
