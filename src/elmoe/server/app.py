"""The application: routes, and what they do with the model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from elmoe import __version__
from elmoe.engine.request import Request as EngineRequest
from elmoe.llm import Model
from elmoe.server.answers import Answers
from elmoe.server.bodies import BoundedRoute, Held
from elmoe.server.engine_thread import Call, EngineThread, Full
from elmoe.server.errors import ApiError, on_http_error, on_invalid
from elmoe.server.exchange import Exchange
from elmoe.server.gate import Gate
from elmoe.server.metrics import Metrics, counted
from elmoe.server.requests import Translator
from elmoe.server.schemas import (
    ChatBody,
    ChatCompletion,
    Completion,
    CompletionBody,
    Content,
    DetokenizeBody,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    SamplingBody,
    TokenizeBody,
    TokenList,
)
from elmoe.server.settings import Settings
from elmoe.server.token_texts import TokenTexts
from elmoe.store.format import MANIFEST

INLINE_CHARACTERS = 4096
"""Longest text that is cut into tokens without leaving the loop."""
MOST_RETRY = 60
"""Longest time that Retry-After tells, seconds."""
STOP_SECONDS = 20.0
"""Time that a step under way has to end at the end of the program."""
T = TypeVar("T")


class Service:
    """What the routes share: the model, the thread that steps its engine, and the limits."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.translator = Translator(model, settings)
        self.texts = TokenTexts(model.tokenizer)
        self.engine = EngineThread(model.engine, model.engine.options.batch + settings.queue, counted)
        self.metrics = Metrics(model, self.engine)
        self.opened = int((model.path / MANIFEST).stat().st_mtime)
        digest = hashlib.blake2b((model.path / MANIFEST).read_bytes(), digest_size=4).hexdigest()
        self.fingerprint = f"elmoe-{__version__}-{digest}"
        self._seconds = 1.0  # that a call takes, about
        self.started: Callable[[], None] = lambda: None
        """Called when requests can come."""

    @property
    def card(self) -> ModelCard:
        """The model as a list of models tells it."""
        return ModelCard(
            id=self.settings.model_name, object="model", created=self.opened, owned_by="elmoe",
            max_model_len=self.translator.context,
        )  # fmt: skip

    async def translated(self, make: Callable[..., T], body: Any, size: int) -> T:
        """Do in a worker thread what may take long."""
        return await asyncio.to_thread(make, body) if size > INLINE_CHARACTERS else make(body)

    async def answer(
        self, request: Request, body: ChatBody | CompletionBody, requests: list[EngineRequest]
    ) -> Response:  # fmt: skip
        """Serve requests and send what comes."""
        settings, chat = self.settings, isinstance(body, ChatBody)
        wanted = bool(body.logprobs) if chat else body.logprobs is not None
        answers = Answers(requests, settings.model_name, self.fingerprint, self.texts, chat, wanted)
        stream, options = bool(body.stream), body.stream_options
        if options is not None and not stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options", "invalid_value")
        progress = stream and bool(body.return_progress)
        try:
            call = self.engine.submit(requests, stream, progress)
        except Full:
            raise self.full(len(answers.choices)) from None
        facts = request.scope["facts"]
        exchange = Exchange(
            self.engine, call, answers, settings.request_seconds, settings.event_seconds, settings.ping_seconds, progress,
            partial(self.ended, facts),
        )  # fmt: skip
        if stream:
            usage = options is not None and options.include_usage
            return exchange.stream(usage, options is not None and options.continuous_usage_stats)
        answer = await exchange.whole(request)
        return Response(answer.model_dump_json(exclude_none=False), media_type="application/json")

    def full(self, answers: int) -> ApiError:
        """The refusal of a call for which there is no room."""
        batch = self.model.engine.options.batch
        told = f"{self.engine.answers} answers are served or wait, of at most {batch + self.settings.queue}"
        seconds = min(MOST_RETRY, max(1, round(self._seconds * max(1, self.engine.answers - batch) / batch)))
        return ApiError(429, f"{told}: try again", None, "queue_full", {"retry-after": str(seconds)})

    def ended(self, facts: dict[str, Any], call: Call, answers: Answers, error: BaseException | None) -> None:
        """Note how a call went."""
        facts |= {
            "id": answers.id, "prompt_tokens": answers.prompt_tokens, "completion_tokens": answers.completion_tokens,
            "finish": answers.finish_reasons, "ended": None if error is None else type(error).__name__,
            "first_token_seconds": None if call.first_token is None else round(call.first_token - call.began, 4),
        }  # fmt: skip
        seconds = perf_counter() - call.began
        self._seconds += 0.1 * (seconds - self._seconds)
        self.metrics.ended(call, answers, error, seconds)


def service_of(request: Request) -> Service:
    """The service of an application."""
    service: Service = request.app.state.service
    return service


Of = Annotated[Service, Depends(service_of)]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field is wrong.", 401: "The key is missing or wrong.", 404: "There is no such model.",
        408: "The body did not arrive.", 413: "The body is too large.", 415: "The body is no JSON.",
        429: "The queue is full, or too much is sent at once: see Retry-After.", 500: "The model or the server failed.",
        504: "Time is up.",
    }.items()
}  # fmt: skip


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


_READ, _WRITTEN = _responses(401), _responses(400, 401, 408, 413, 415, 429)
_EVENTS = {"description": "The answer, or its events.", "content": {"text/event-stream": {}}}
_SERVED = _WRITTEN | _responses(404, 500, 504) | {200: _EVENTS}


def create_app(model: Model, settings: Settings) -> FastAPI:
    """The application for an open model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service: Service = app.state.service
        service.engine.start()
        service.started()
        yield
        service.engine.stop(STOP_SECONDS)

    app = FastAPI(
        title="elmoe", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Mixture-of-Experts models behind OpenAI's wire format.",
    )  # fmt: skip
    app.state.service, app.state.settings, app.state.held = Service(model, settings), settings, Held()
    app.router.route_class = BoundedRoute
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=499))
    app.add_exception_handler(Exception, _on_failure)
    _add_openai_routes(app)
    _add_own_routes(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    schemas = app.openapi()["components"]["schemas"]  # kept: what clients are told of fields that depend on the model
    for name in ("ChatBody", "CompletionBody"):
        schemas[name]["properties"]["model"]["enum"] = [settings.model_name]
    paths = {path for route in app.routes if (path := getattr(route, "path", ""))}

    def count(path: str, status: int) -> None:
        app.state.service.metrics.requests.labels(path if path in paths else "other", str(status)).inc()

    app.add_middleware(Gate, keys=settings.keys, count=count)
    return app


async def _on_failure(request: Request, error: Exception) -> JSONResponse:
    return ApiError(500, "the server failed on this request; its log says more", None, "internal_error").response


def _add_openai_routes(app: FastAPI) -> None:
    """Routes of OpenAI's API."""

    @app.get("/v1/models", response_model=ModelList, responses=_READ)
    async def models(service: Of) -> ModelList:
        """The model that is served."""
        return ModelList(object="list", data=[service.card])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=_responses(401, 404))
    async def model(name: str, service: Of) -> ModelCard:
        """One model."""
        service.translator.check_model(name)
        return service.card

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_SERVED)
    async def chat(body: ChatBody, request: Request, service: Of) -> Response:
        """The answer to a chat; events with `stream: true`."""
        service.translator.check_model(body.model)
        requests = await asyncio.to_thread(service.translator.chat, body)
        return await service.answer(request, body, requests)

    @app.post("/v1/completions", response_model=Completion, responses=_SERVED)
    async def completion(body: CompletionBody, request: Request, service: Of) -> Response:
        """The continuation of prompts; events with `stream: true`."""
        service.translator.check_model(body.model)
        requests = await service.translated(service.translator.completion, body, _size(body))
        return await service.answer(request, body, requests)


def _size(body: SamplingBody) -> int:
    """Characters of the prompts."""
    prompt = getattr(body, "prompt", "")
    return len(prompt) if isinstance(prompt, str) else sum(len(one) if isinstance(one, str | list) else 1 for one in prompt)


def _add_own_routes(app: FastAPI) -> None:
    """Routes beside OpenAI's API, as other servers have them."""

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "The last step failed."}})
    async def health(service: Of) -> Response:
        """Whether the server works; needs no key."""
        failure = service.engine.failure
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    @app.get("/metrics", responses=_READ, response_class=PlainTextResponse)
    async def metrics(service: Of) -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/props", responses=_READ)
    async def props(service: Of) -> dict[str, Any]:
        """What is served, and how."""
        model, settings, options = service.model, service.settings, service.model.engine.options
        return {
            "model": settings.model_name, "version": __version__, "context": service.translator.context,
            "max_positions": model.spec.max_positions, "vocabulary": model.spec.vocabulary, "mode": options.mode,
            "slots": options.batch, "queue": settings.queue, "reader": model.reader_note, "tier": model.tier,
            "chat_template": model.reader.chat_template(), "most_answers": settings.answers,
            "most_body_bytes": settings.body_bytes, "most_prompt_tokens": service.translator.most_prompt,
            "most_request_seconds": settings.request_seconds,
        }  # fmt: skip

    @app.post("/tokenize", response_model=TokenList, responses=_WRITTEN)
    async def tokenize(body: TokenizeBody, service: Of) -> TokenList:
        """Token ids of a text, or of a chat as the template writes it."""
        translator = service.translator
        if (body.content is None) == (body.messages is None):
            raise ApiError(400, "give either content or messages", "content", "invalid_value")
        if body.content == "":
            tokens: tuple[int, ...] = ()
        elif body.content is not None:
            make = partial(translator.text_prompt, field="content", special=body.add_special)
            tokens = (await service.translated(make, body.content, len(body.content))).tokens
        else:
            assert body.messages is not None
            tokens = (await asyncio.to_thread(translator.chat_prompt, body.messages, body.chat_template_kwargs)).tokens
        return TokenList(tokens=list(tokens), count=len(tokens), max_model_len=translator.context)

    @app.post("/detokenize", response_model=Content, responses=_WRITTEN)
    async def detokenize(body: DetokenizeBody, service: Of) -> Content:
        """The text of token ids, special tokens included."""
        vocabulary = service.model.spec.vocabulary
        if any(token >= vocabulary for token in body.tokens):
            raise ApiError(400, f"a token is above {vocabulary - 1}, the largest id", "tokens", "invalid_value")
        return Content(content=service.model.tokenizer.decode(body.tokens, skip_special_tokens=False))
