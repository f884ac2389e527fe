"""Invalid input for a server: requests with an invalid body, and bytes that are not legal HTTP."""

from __future__ import annotations

from benchmarks.serving.requests import request

_DIGITS = b"9" * 1000
_BODIES: tuple[bytes, ...] = (
    b"",
    b"nonsense",
    b"null",
    b"[]",
    b'{"prompt": "a"',
    b'\xef\xbb\xbf{"prompt": "a", "n": 0}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "stop": "\\udfff"}',
    b'{"prompt": "a", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"prompt": "a", "metadata": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "temperature": ' + _DIGITS + b"}",
    b'{"prompt": "a", "max_tokens": -' + _DIGITS + b"}",
    b'{"prompt": "a", "seed": ' + _DIGITS + b"}",
    b'{"prompt": "a", "seed": 1.5}',
    b'{"prompt": [' + _DIGITS + b"]}",
    b'{"prompt": [-1]}',
    b'{"prompt": [1e9]}',
    b'{"prompt": [true]}',
    b'{"prompt": [["a"], 1]}',
    b'{"prompt": {}}',
    b'{"prompt": "a", "max_tokens": "many"}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "n": 1000000}',
    b'{"prompt": "a", "logit_bias": {"' + _DIGITS + b'": 1}}',
    b'{"prompt": "a", "logit_bias": {"1": NaN}}',
    b'{"prompt": "a", "logit_bias": [1]}',
    b'{"prompt": "a", "stop": ["", "b"]}',
    b'{"prompt": "a", "stop": {"a": 1}}',
    b'{"prompt": "a", "stream": "yes"}',
    b'{"prompt": "a", "stream_options": {"include_usage": true}}',
    b'{"prompt": "a", "logprobs": 1000}',
    b'{"prompt": "a", "unheard_of": 1}',
    b'{"prompt": "' + b"word " * 100_000 + b'"}',
    b'{"prompt": [' + b"5," * 50_000 + b"5]}",
    b'{"messages": [{"role": "user", "content": "a"}]}',
)
_CONVERSATIONS: tuple[bytes, ...] = (
    b'{"messages": []}',
    b'{"messages": "a"}',
    b'{"messages": [{"role": "wizard", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": null}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
    b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
    b'{"messages": [{"role": "user", "content": "' + b"word " * 100_000 + b'"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}], "tool_choice": "required"}',
    b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}',
)
NONSENSE = (
    *(request(body) for body in _BODIES),
    *(request(body, "/v1/chat/completions") for body in _CONVERSATIONS),
)
_HOST = b"Host: localhost\r\n"
_JSON = b"Content-Type: application/json\r\n"
GARBLED: tuple[bytes, ...] = (
    b"\x00\x01\x02\x03\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
    b"GET\r\n\r\n",
    b"BREW /v1/completions HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET / HTTP/9.9\r\n" + _HOST + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n" + _HOST + _JSON + b"Content-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n" + _HOST + _JSON + b"Content-Length: 1000000000\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n" + _HOST + _JSON + b"Content-Length: " + _DIGITS + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n" + _HOST + _JSON + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    b"POST /v1/completions HTTP/1.1\r\n" + _HOST + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: evil.example\r\n" + _JSON + b"Content-Length: 2\r\n\r\n{}",
    b"GET /v1/completions HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\n" + _HOST + _JSON + b"Content-Length: 2\r\n\r\n{}",
    b"GET /../../etc/passwd HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET /%ff%00 HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET /nothing HTTP/1.1\r\n" + _HOST + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n",
    b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n" + _HOST + b"\r\n",
)
