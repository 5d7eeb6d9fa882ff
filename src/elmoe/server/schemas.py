"""Bodies of requests and answers, as OpenAI's API has them. What is not listed is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from elmoe.engine.request import LEAST_TEMPERATURE
from elmoe.server.settings import LONGEST_STOP, MOST_BIASES, MOST_MESSAGES, MOST_PROMPTS, MOST_STOPS


class Body(BaseModel):
    """What a client sends: types are not converted, unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


StopText = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class StreamOptions(Body):
    """Of a stream. ``include_usage``: a last event with the usage; ``continuous_usage_stats``: usage in each event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SchemaBody(Body):
    """A JSON schema that the answer obeys."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None


class SamplingBody(Body):
    """What chats and completions share."""

    model: str = Field(description="The model that is served, see `/v1/models`.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0 is greedy. Default: 1.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Default: 1, which is off.")
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = Field(None, description="Default: 0, which is off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Default: 0, which is off.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Default: 0.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Default: 0.")
    repetition_penalty: Annotated[float, Field(ge=0.001, le=100)] | None = Field(None, description="Default: 1.")
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(
        None, description="Same request and seed, same text. Without one it is drawn, and told in the answer."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = Field(None, description="Answers to each prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(
        None, description="Most tokens of an answer. Default of a chat: what the context holds; of a completion: 16."
    )
    response_format: ResponseFormat | None = None
    ignore_eos: bool | None = Field(None, description="Go on behind the model's end, to measure.")
    return_progress: bool | None = Field(None, description="Events of a stream that tell how much of a prompt is computed.")
    user: str | None = Field(None, description="Not used.")

    @field_validator("temperature")
    @classmethod
    def _far_from_zero(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"use 0 for the most likely tokens, or at least {LEAST_TEMPERATURE}")
        return temperature

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for name in bias or {}:
            if not (name.isascii() and name.isdigit() and len(name) < 10) or (name[0] == "0" and name != "0"):
                raise ValueError("a key is no token id")
        return bias


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


SENT_BACK = "Null, as in an answer that is sent back."


class Message(Body):
    """One message of a chat. ``developer`` is taken as ``system``, the name that templates know."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Handed to the chat template.")
    reasoning_content: str | None = Field(None, description="Handed to the chat template.")
    refusal: None = Field(None, description=SENT_BACK)
    tool_calls: None = Field(None, description=SENT_BACK)
    function_call: None = Field(None, description=SENT_BACK)
    audio: None = Field(None, description=SENT_BACK)


class ChatBody(SamplingBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(None, description="As `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    metadata: dict[str, str] | None = Field(None, description="Not used.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")


class CompletionBody(SamplingBody):
    """``POST /v1/completions``."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: None = None
    suffix: None = None


class TokenizeBody(Body):
    """``POST /tokenize``: a text, or a chat as its template writes it."""

    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special: bool = Field(False, description="With the tokens that a prompt begins with.")


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]


class Answer(BaseModel):
    """What the server sends."""

    model_config = ConfigDict(protected_namespaces=())


class PromptDetails(Answer):
    """``cached_tokens``: of the prompt, found in the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    """Tokens of a request; those of prompts count once, however many answers there are."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class TopLogprob(Answer):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry for each token of the answer."""

    content: list[TokenLogprob]


class CompletionLogprobs(Answer):
    """As the completions API has it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class AnswerMessage(Answer):
    """The text of an answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Answer):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CompletionChoice(Answer):
    """One answer to a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    """An answered chat. ``seed``: that it was drawn with."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int
    choices: list[ChatChoice]
    usage: Usage


class Completion(Answer):
    """Answered prompts. ``seed``: that they were drawn with."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    """All of them: one."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenList(Answer):
    """Token ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class Content(Answer):
    """The text of token ids."""

    content: str


class Health(Answer):
    """``ok``, or what failed."""

    status: str


class ErrorDetail(Answer):
    """``param``: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """What went wrong."""

    error: ErrorDetail
