"""
接口的客户端：OpenAI 的协议，总时间与回复大小都有上限。
Clients of an endpoint of OpenAI's protocol, whose requests are bounded in time and size.
"""

import os
from functools import partial
from time import monotonic

MAX_BODY = 1 << 26          # bytes of a reply: the log-probabilities of 100,000 tokens


def make_client(url: str, key_env: str | None, retries: int, timeout: float, before=None):
    """(an openai.OpenAI, its key). Raises ValueError for a wrong URL, a missing package or key.

    timeout     seconds of a whole attempt
    before      called before each attempt
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"*_url {url} must begin with http:// or https:// and end before "
                         "/chat/completions")
    try:
        import openai           # needed for endpoints only
    except ImportError:
        raise ValueError("an endpoint needs the openai package: pip install openai") from None
    # Without a key, the package would send the user's OPENAI_API_KEY.
    key = os.environ.get(key_env, "").strip() if key_env else "none"
    if not key:             # key_env is not repeated: it may be the key itself, by mistake
        raise ValueError("*_key_env names an environment variable with the API key; there is "
                         "none of this name, or it is empty. Type: export NAME=KEY")
    hooks = {"request": [*([before] if before else []), partial(bound_time, timeout)],
             "response": [bound_size]}
    return openai.OpenAI(
        base_url=url.rstrip("/"), api_key=key, timeout=timeout, max_retries=retries,
        default_headers={"Accept-Encoding": "identity"},
        http_client=openai.DefaultHttpxClient(event_hooks=hooks)), key


def bound_time(seconds: float, request):
    """A request hook: the whole attempt may take so many seconds, not only each read. No attempt
    shares its connection, whose reads end at its deadline."""
    deadline = monotonic() + seconds
    request.headers["Connection"] = "close"

    def watch(event, info):
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            stream = info["return_value"]
            read = stream.read
            stream.read = lambda size, timeout: read(size, max(1e-3, deadline - monotonic()))

    request.extensions["trace"] = watch


def bound_size(response):
    """A response hook: a reply has at most MAX_BODY bytes, and is not compressed."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("a compressed reply, which was not requested")
    body = bytearray()
    for part in response.iter_raw():
        body += part
        if len(body) > MAX_BODY:
            raise ValueError(f"a reply of more than {MAX_BODY:,} bytes")
    response._content = bytes(body)
