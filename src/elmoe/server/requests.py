"""Bodies to requests of the engine: prompts to tokens, parameters to sampling, all refusals by field."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from elmoe.engine.engine import Engine
from elmoe.engine.kv_cache import PAGE_POSITIONS
from elmoe.engine.request import Request, numbered
from elmoe.errors import BudgetError, ElmoeError, RequestError
from elmoe.generation import SamplingParams
from elmoe.llm import Model
from elmoe.server.errors import ApiError, not_yet, with_hint
from elmoe.server.schemas import ChatBody, CompletionBody, Message, SamplingBody
from elmoe.server.settings import Settings

COMPLETION_TOKENS = 16
"""Tokens of a completion whose request does not say, as in OpenAI's API."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "repetition_penalty": (1.0,), "logit_bias": ({},),
    "json_object": (False,), "json_schema": (),
}  # fmt: skip
"""Parameters that change nothing with these values: sent only where they do."""
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "template", "special_tokens", "self"}
"""Variables of a chat template that the server sets."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the name of the field that it came from."""

    tokens: tuple[int, ...]
    field: str


class Translator:
    """Makes requests for one model under the limits of a server."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._parameters = {field.name for field in fields(SamplingParams)}
        self.context = _longest(model.engine)
        """Positions of the longest request: the model's context, or what the KV cache holds."""
        self.most_prompt = min(settings.prompt_tokens or self.context, self.context - 1)
        vocabulary = model.tokenizer.get_vocab(with_added_tokens=True)
        self._longest_token = max((len(token) for token in vocabulary), default=1)

    def check_model(self, name: str) -> None:
        """404 for a model that is not served."""
        served = self._settings.model_name
        if name != served:
            raise ApiError(404, f"there is no model '{name[:80]}': this server has '{served}'", "model", "model_not_found")

    def chat(self, body: ChatBody) -> list[Request]:
        """The request of a chat; may take seconds in a hostile template."""
        prompt = self.chat_prompt(body.messages, body.chat_template_kwargs)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
        most = body.max_completion_tokens or body.max_tokens
        given = {"logprobs": body.top_logprobs or 0, "max_tokens": most or self.context}
        return self._requests([prompt], body, given | _format(body))

    def completion(self, body: CompletionBody) -> list[Request]:
        """The requests of a completion, one for each prompt."""
        prompt = body.prompt
        if isinstance(prompt, str):
            prompts = [self.text_prompt(prompt, "prompt")]
        elif isinstance(prompt[0], int):
            prompts = [self._ids_prompt(prompt, "prompt")]
        else:
            prompts = [
                self.text_prompt(one, name) if isinstance(one, str) else self._ids_prompt(one, name)
                for name, one in ((f"prompt.{index}", one) for index, one in enumerate(prompt))
            ]
        given = {"logprobs": body.logprobs or 0, "max_tokens": body.max_tokens or COMPLETION_TOKENS}
        return self._requests(prompts, body, given | _format(body))

    def chat_prompt(self, messages: Iterable[Message], variables: Mapping[str, Any] | None) -> Prompt:
        """A chat as tokens."""
        for name in variables or {}:
            if name in RESERVED or not name.isidentifier():
                raise ApiError(400, f"the variable '{name[:60]}' cannot be set", "chat_template_kwargs", "invalid_value")
        plain = [message.model_dump(exclude_none=True) for message in messages]
        try:
            text = self._model.chat_prompt(plain, **dict(variables or {}))
        except RequestError as error:
            raise ApiError(400, with_hint(str(error), error.hint), "messages", "invalid_chat") from None
        return self.text_prompt(text, "messages", special=False)

    def text_prompt(self, text: str, field: str, special: bool = True) -> Prompt:
        """A text as tokens; one that cannot fit is refused before it is cut into tokens."""
        if len(text) > self._longest_token * (self.most_prompt + 1):
            raise ApiError(
                400, f"{field} has {len(text)} characters, more than {self.most_prompt} tokens can hold: shorten it", field,
                "context_length_exceeded",
            )  # fmt: skip
        try:
            return Prompt(self._model.encode(text, special), field)
        except ElmoeError as error:
            raise ApiError(400, with_hint(str(error), error.hint), field, "invalid_value") from None

    def _ids_prompt(self, ids: Any, field: str) -> Prompt:
        vocabulary = self._model.spec.vocabulary
        wrong = next((token for token in ids if token >= vocabulary), None)
        if wrong is not None:
            raise ApiError(400, f"{field} has the token {wrong}, ids are 0 to {vocabulary - 1}", field, "invalid_value")
        return Prompt(tuple(ids), field)

    def _requests(self, prompts: list[Prompt], body: SamplingBody, given: dict[str, Any]) -> list[Request]:
        copies = body.n or 1
        if copies * len(prompts) > self._settings.answers:
            told = f"{copies * len(prompts)} answers are wanted, this server gives {self._settings.answers} to a request"
            raise ApiError(400, told, "n" if copies > 1 else "prompt", "invalid_value")
        for prompt in prompts:
            over = len(prompt.tokens) - self.most_prompt
            if over > 0:
                raise ApiError(
                    400, f"{prompt.field} has {len(prompt.tokens)} tokens, {over} more than the {self.most_prompt} that a "
                    f"prompt may have (the context of {self.context} holds the answer, too): shorten it", prompt.field,
                    "context_length_exceeded",
                )  # fmt: skip
        model, field = self._model, None if body.response_format is None else "response_format"
        try:
            params = SamplingParams(**self._sampling(body, given)).seeded()
            requests = numbered(
                replace(params, max_tokens=min(params.max_tokens, self.context - len(prompt.tokens))).request(
                    prompt.tokens, model.tokenizer, model.grammars
                )
                for prompt in prompts
            )
            field = None
            for request in requests:
                request.check(model.spec.vocabulary, model.spec.max_positions)
        except (RequestError, BudgetError) as error:
            first = str(error).partition(" ")[0]
            field = first if first in SamplingBody.model_fields else field
            raise ApiError(400, with_hint(str(error), error.hint), field, "invalid_value") from None
        return requests

    def _sampling(self, body: SamplingBody, given: dict[str, Any]) -> dict[str, Any]:
        """Parameters of an answer: those of the body, and ``given``. One that changes the answer and that the engine does
        not know is refused."""
        chosen: dict[str, Any] = {"temperature": 1.0}
        bias = None if body.logit_bias is None else {int(token): value for token, value in body.logit_bias.items()}
        own = {name: getattr(body, name) for name in SamplingBody.model_fields}
        for name, value in (own | given | {"logit_bias": bias}).items():
            if value is None or (name in NEUTRAL and value in NEUTRAL[name]):
                continue
            if name in self._parameters:
                chosen[name] = value
            elif name in NEUTRAL:
                raise not_yet("response_format" if name.startswith("json_") else name)
        return {**chosen, "seed": None if body.seed is None else body.seed & (1 << 63) - 1}


def _longest(engine: Engine) -> int:
    """Positions of the longest request: the model's context, or what the KV cache holds, whose pages layers may share."""
    layout, most = engine.cache.layout, engine.spec.max_positions
    stretches = range(PAGE_POSITIONS, most + PAGE_POSITIONS, PAGE_POSITIONS)
    held = bisect_right(stretches, engine.cache.pages, key=lambda positions: layout.pages(positions, engine.scheduler.chunk))
    return min(most, held * PAGE_POSITIONS)


def _format(body: SamplingBody) -> dict[str, Any]:
    """What the answer has to be, as sampling parameters."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None:
        raise ApiError(400, "json_schema is missing", "response_format.json_schema", "missing_required_parameter")
    return {"json_schema": wanted.json_schema.schema_}
