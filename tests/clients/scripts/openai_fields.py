"""openai 3.x: the fields that its types read from answers, and the exceptions that it raises for errors."""

import json

import openai

client = openai.OpenAI(api_key="random-string", max_retries=0)
question = [{"role": "user", "content": "Once upon a time"}]
raised = {}


def refused(name, **fields):
    """Notes what a request raises."""
    try:
        client.chat.completions.create(**{"model": "any", "messages": question, "max_tokens": 4, **fields})
    except openai.APIStatusError as error:
        raised[name] = [type(error).__name__, error.code, error.param]


refused("unknown", extra_body={"no_such_field": 1})
refused("too_hot", temperature=9)
refused("too_long", messages=[{"role": "user", "content": "word " * 20_000}])
refused("tools", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], tool_choice="required")
try:
    client.embeddings.create(model="any", input="text")
except openai.APIStatusError as error:
    raised["embeddings"] = [type(error).__name__, error.code, error.param]

several = client.chat.completions.create(model="any", messages=question, n=3, seed=7, max_tokens=12)
again = client.chat.completions.create(model="any", messages=question, n=3, seed=7, max_tokens=12)
likely = client.chat.completions.create(
    model="any", messages=question, max_tokens=6, logprobs=True, top_logprobs=3, temperature=0
)
echo = client.completions.create(
    model="any", prompt=["Once upon", "The fox"], echo=True, logprobs=2, max_tokens=2, n=2, temperature=0
)
stopped = client.chat.completions.create(
    model="any", messages=question, max_tokens=200, stop=["."], extra_body={"top_k": 1}
)
entries = likely.choices[0].logprobs.content
print(
    json.dumps(
        {
            "raised": raised,
            "models": [model.id for model in client.models.list()],
            "several": [choice.message.content for choice in several.choices],
            "again": [choice.message.content for choice in again.choices],
            "fingerprints": [several.system_fingerprint, again.system_fingerprint],
            "likely": likely.choices[0].message.content,
            "likely_bytes": [byte for entry in entries for byte in entry.bytes],
            "likely_best": all(entry.top_logprobs[0].logprob >= entry.logprob for entry in entries),
            "likely_tops": [len(entry.top_logprobs) for entry in entries],
            "echo": [[choice.index, choice.text, choice.logprobs.to_dict()] for choice in echo.choices],
            "usage": echo.usage.to_dict(),
            "stopped": [stopped.choices[0].message.content, stopped.choices[0].finish_reason],
        }
    )
)
