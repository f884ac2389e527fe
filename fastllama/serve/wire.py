"""OpenAI's JSON formats as msgspec structs: requests and responses."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a conversation.

    content: a text, or parts such as {"type": "text", "text": ...}. The fields from refusal on are empty in responses
    of OpenAI's and other servers, and so come back in the next request; type: "text" or "message" of some clients.
    """

    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    parsed: Any = None
    provider_specific_fields: Any = None
    type: Any = None


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: token counts in a last chunk. include_obfuscation: padding against observers; ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Struct, kw_only=True, forbid_unknown_fields=True):
    """type: "text", "json_object" or "json_schema"."""

    type: str
    json_schema: Any = None


class CommonRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of both completion endpoints, null if absent. Fields of type Any may be null or their default."""

    model: str | None = None
    # Length, number and sampling
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not in OpenAI's API
    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    # Without effect on the text
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Only their defaults are legal
    store: Any = None
    service_tier: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    # Only null is legal
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None


class ChatRequest(CommonRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None


class CompletionRequest(CommonRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions; prompt: a text, texts, token ids, or lists of token ids."""

    prompt: str | list[Any] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt or a conversation; add_special_tokens: BOS before a prompt, null is true."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize; tokens: token ids."""

    model: str | None = None
    tokens: list[Any]


class PromptTokensDetails(Struct, kw_only=True):
    """cached_tokens: prompt tokens found in the prefix cache."""

    cached_tokens: int


class Usage(Struct, kw_only=True):
    """Token counts of a request, for all its prompts and samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct, kw_only=True):
    """One of the likeliest tokens at a position. bytes: also for a part of a character, whose token is shown as U+FFFD.

    logprob: finite, as in all these structs: msgspec writes infinity as null.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob, kw_only=True):
    """A token of an answer, and the likeliest ones at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """The logprobs of a chat's choice: one entry for each token."""

    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(Struct, kw_only=True):
    """The whole answer of a chat's choice."""

    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    """One sample of a chat; finish_reason: "stop" or "length"."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatCompletion(Struct, kw_only=True, tag_field="object", tag="chat.completion"):
    """The response of a chat, not streamed. created: Unix time."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class ChatDelta(Struct, kw_only=True):
    """The new part of a chat's choice."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    """A choice of a chunk; finish_reason: set in its last one."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Struct, kw_only=True, tag_field="object", tag="chat.completion.chunk"):
    """An event of a chat's stream. usage: UNSET unless requested; then None, and the counts in the last chunk."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(Struct, kw_only=True):
    """The logprobs of a completion's choice, one entry for each token; None for the first token of an echoed prompt.

    top_logprobs: log-probabilities of the likeliest tokens by text. text_offset: characters of the text before the
    token.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    """One sample of one prompt, or its new part in a stream. finish_reason: None in a stream until the last event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(Struct, kw_only=True, tag_field="object", tag="text_completion"):
    """The response of a completion, and each event of its stream; usage: as in ChatChunk."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, kw_only=True, tag_field="object", tag="model"):
    """A name of the served model; max_model_len: tokens of prompt and answer together.

    notice: limits and licence of the model, Markdown; not in lists.
    """

    id: str
    created: int
    owned_by: str
    max_model_len: int
    notice: str | UnsetType = UNSET


class ModelList(Struct, kw_only=True, tag_field="object", tag="list"):
    """GET /v1/models."""

    data: list[ModelCard]


class TokenizeAnswer(Struct, kw_only=True):
    """The response of /tokenize; tokens: the token ids."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(Struct, kw_only=True):
    """The response of /detokenize."""

    prompt: str
