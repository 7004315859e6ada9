"""
服务的规律：答案与直接生成相同；给定词元的对数概率就是模型的；坏请求得到清楚的拒绝；离开的客户让出位置。
Laws of the server: an answer is what generate() writes, log-probabilities are the model's, a bad request
is refused by name, a client that leaves gives back its row, and a stop finishes what is running.
"""

import asyncio
import concurrent.futures
import re
import shutil
import signal
import socket
import threading

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient

from helpers_run import ROOT, complaint, start, wait_until
from interop.checkpoint import load_model
from model.generate import generate
from serving.api import make_app
from serving.engine import Answer, Engine, Full

KEY = "sk-0123456789abcdef"
ASKED = [{"role": "user", "content": "3 plus 4?"}]


class Server:
    """scripts/serve.py with these flags, at a free port."""

    def __init__(self, *weights, **flags):
        self.run = start(ROOT / "scripts/serve.py", weights=list(weights), port=0, device="cpu", **flags)
        wait_until(lambda: "http://" in self.run.output or not self.run.processes[0].is_alive())
        self.url = re.search(r"http://\S+", self.run.output)[0]
        self.root = self.url.removesuffix("/v1")

    def client(self, key="none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)

    def stop(self):
        self.run.send(signal.SIGTERM)
        return self.run.wait()


@pytest.fixture
def serve():
    """Server(...), which does not outlive its test."""
    started = []
    yield lambda *weights, **flags: started.append(Server(*weights, **flags)) or started[-1]
    for each in started:
        if each.run.processes[0].is_alive():
            each.run.send()


@pytest.fixture(scope="module")
def server(models):
    server = Server(f"teacher={models}/teacher.pth", f"student={models}/student.pth")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def teacher(models):
    model, tokenizer = load_model(models / "teacher.pth", "cpu")
    return model.eval(), tokenizer


def chat(client, **more):
    return client.chat.completions.create(**{"model": "teacher", "messages": ASKED, "max_tokens": 12} | more)


# -- answers


def test_a_greedy_answer_is_that_of_generate(client, teacher):
    model, tokenizer = teacher
    prompt = tokenizer.encode_chat(ASKED, add_generation_prompt=True)[0]
    ids, = generate(model, [prompt], 12, tokenizer.end_of_turn)
    found = chat(client, temperature=0, logprobs=True, extra_body={"return_tokens_as_token_ids": True})
    assert found.choices[0].message.content == tokenizer.decode(ids)
    assert [each.token for each in found.choices[0].logprobs.content][:len(ids)] == [f"token_id:{i}" for i in ids]
    assert found.usage.prompt_tokens == len(prompt) and found.choices[0].finish_reason in ("stop", "length")


def test_a_stream_has_the_text_of_the_whole_answer(client):
    asked = {"n": 3, "seed": 5, "temperature": 5, "stop": ["e", "th"]}
    whole = chat(client, **asked)
    *chunks, last = chat(client, **asked, stream=True, stream_options={"include_usage": True})
    texts = ["".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].index == i) for i in range(3)]
    assert texts == [choice.message.content for choice in whole.choices] and len({*texts}) == 3
    assert last.usage.completion_tokens > 0 and not last.choices


def test_the_answers_to_a_prompt_have_the_seeds_that_follow_the_first(client):
    several = chat(client, n=3, seed=5, temperature=5).choices
    alone = [chat(client, seed=seed, temperature=5).choices[0] for seed in (5, 6, 7)]
    assert [each.message.content for each in several] == [each.message.content for each in alone]


def test_an_answer_ends_before_a_stop_and_gives_back_its_row(client, server, teacher):
    model, tokenizer = teacher
    ids, = generate(model, [tokenizer.encode("The ")], 20, tokenizer.end_of_turn)
    text = tokenizer.decode(ids)
    middle = text[len(text) // 2:][:4]
    asked = {"model": "teacher", "prompt": "The ", "max_tokens": 20, "temperature": 0, "stop": ["none such", middle]}
    whole = client.completions.create(**asked).choices[0]
    assert whole.text == text[:text.index(middle)] and whole.finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    wait_until(lambda: not httpx.get(f"{server.root}/health").json()["teacher"]["answering"], 2)


def test_a_content_may_come_in_parts_of_text(client):
    parts = [{"type": "text", "text": text} for text in ("3 plus ", "4?")]
    whole, joined = (chat(client, temperature=0, messages=[{"role": "user", "content": content}]) for content in ("3 plus 4?", parts))
    assert joined.choices[0].message.content == whole.choices[0].message.content and joined.usage == whole.usage


def test_the_same_seed_gives_the_same_answer_whoever_else_asks(client):
    alone = chat(client, seed=3, temperature=5).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = [*pool.map(lambda seed: chat(client, seed=seed, temperature=5).choices[0].message.content, (1, 2, 3, 4, 5, 3))]
    assert together[2] == together[5] == alone and len(set(together)) > 2


def test_log_probabilities_of_given_tokens_are_the_model_s(client, teacher):
    model, tokenizer = teacher
    prompts = [tokenizer.encode("The dose is 3 mg."), tokenizer.encode("每日 2 次")]
    found = client.completions.create(model="teacher", prompt=prompts, echo=True, max_tokens=0, logprobs=4,
                                      extra_body={"return_tokens_as_token_ids": True})
    for prompt, choice in zip(prompts, found.choices, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor(prompt), [len(prompt)]).logits.log_softmax(-1)
        own = log_p[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
        first, *rest = choice.logprobs.token_logprobs
        assert first is None and rest == pytest.approx(own.tolist(), abs=1e-5)
        for place, top in zip(log_p, choice.logprobs.top_logprobs[1:]):
            values, ids = place.topk(4)
            assert top == pytest.approx({f"token_id:{i}": value for i, value in zip(ids.tolist(), values.tolist())},
                                        abs=1e-5)
        assert choice.text == tokenizer.decode(prompt)


def test_a_text_is_continued(client, teacher):
    model, tokenizer = teacher
    ids, = generate(model, [tokenizer.encode("The ")], 5, tokenizer.end_of_turn)
    found = client.completions.create(model="teacher", prompt=["The ", "The "], max_tokens=5, temperature=0)
    assert [choice.text for choice in found.choices] == [tokenizer.decode(ids)] * 2


def test_models_and_health_are_listed(client, server):
    wait_until(lambda: not httpx.get(f"{server.root}/health").json()["teacher"]["answering"])
    assert [each.id for each in client.models.list()] == ["teacher", "student"]
    assert httpx.get(f"{server.root}/health").json() == {
        name: {"answering": 0, "waiting": 0} for name in ("teacher", "student")}


# -- refusals


@pytest.mark.parametrize("wrong, status, said", [
    ({"model": "none"}, 404, "this server has teacher, student"),
    ({"messages": []}, 400, "messages"), ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, 400, "messages.0.content"),
    ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"), ({"n": 17}, 400, "n: "),
    ({"top_p": 0}, 400, "top_p"), ({"top_p": "much"}, 400, "top_p"), ({"stop": [1]}, 400, "stop"), ({"stop": ""}, 400, "stop"), ({"stop": ["a"] * 17}, 400, "stop"),
    ({"max_tokens": True}, 400, "max_tokens"), ({"max_tokens": 0}, 400, "without echo max_tokens is at least 1"), ({"extra_body": {"seed": 1.5}}, 400, "seed"),
    ({"messages": [{"role": "user", "content": "a " * 200}]}, 400, "the model reads 128"),
])
def test_a_bad_request_is_refused_by_the_name_of_its_field(client, wrong, status, said):
    with pytest.raises(openai.APIStatusError) as refused:
        chat(client, **wrong)
    assert refused.value.status_code == status and said in refused.value.message


@pytest.mark.parametrize("body, status", [(b"{", 400), (b"[1]", 400), (b"[" * 100_000, 400), (b" " * (5 << 20), 413)])
def test_a_body_that_is_no_request_is_refused_without_a_stack_trace(server, body, status):
    answer = httpx.post(f"{server.url}/chat/completions", content=body)
    assert answer.status_code == status and "Traceback" not in answer.text and answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [10 ** 9], [[1, "a"]], 3, [["a"]], "", ["a"] * 17])
def test_a_prompt_is_a_text_or_ids_of_the_vocabulary(client, prompt):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="teacher", prompt=prompt)


# -- many clients


def test_a_client_that_leaves_gives_back_its_row(models, serve):
    server = serve(f"teacher={models}/teacher.pth", max_concurrency=1)
    health = lambda: httpx.get(f"{server.root}/health").json()["teacher"]
    forever = {"model": "teacher", "messages": ASKED, "stream": True, "max_tokens": 100_000}
    with httpx.stream("POST", f"{server.url}/chat/completions", json=forever) as stream:
        next(stream.iter_lines())
    wait_until(lambda: health() == {"answering": 0, "waiting": 0})
    server.stop()


def test_a_client_that_hangs_up_on_a_whole_answer_gives_back_its_row(models, serve):
    server = serve(f"teacher={models}/teacher.pth", max_concurrency=1)
    health = lambda: httpx.get(f"{server.root}/health").json()["teacher"]
    forever = {"model": "teacher", "temperature": 10, "prompt": [[i] for i in range(16)]}      # some of 16 last to the limit
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/completions", json=forever, timeout=0.05)
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as half:       # or before its body is there
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 99\r\n\r\n{")
    wait_until(lambda: health() == {"answering": 0, "waiting": 0}, 2)
    assert "Traceback" not in server.stop().output


def test_a_full_queue_takes_all_of_a_request_or_none(teacher):
    engine, done = Engine("teacher", *teacher, n_rows=1, max_waiting=2), []
    gate = threading.Event()
    engine.submit(Answer([1, 2], 1, lambda got: gate.wait(10)))         # the engine's thread waits in it
    wait_until(lambda: engine.rows.owners)
    engine.submit(Answer([1, 2], 1, done.append), Answer([1, 2, 3], 1, done.append))
    with pytest.raises(Full):
        engine.submit(Answer([1, 2], 1, done.append))
    gate.set()
    wait_until(lambda: len(done) == 4)                                  # a Token and a reason each
    assert len(engine.waiting) == 0


def test_a_full_queue_answers_429_and_when_to_come_back(teacher):
    engine = Engine("teacher", *teacher, n_rows=1, max_waiting=1)
    engine.n_readings, engine.waiting = 1, [None] * 2                   # as many as may, not served
    with TestClient(make_app({"teacher": engine})) as client:
        for path, more in (("chat/completions", {"messages": ASKED}), ("completions", {"prompt": "a", "echo": True})):
            refused = client.post(f"/v1/{path}", json={"model": "teacher"} | more)
            assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"


def test_a_name_may_have_a_slash_and_a_path_an_equals_sign(models, tmp_path):
    folder = tmp_path / "lr=0.1"
    shutil.copytree(models, folder)
    server = Server(f"{folder}/teacher.pth", f"a/b={folder}/student.pth")
    client = server.client()
    assert [each.id for each in client.models.list()] == ["teacher", "a/b"] and chat(client, model="a/b").choices
    assert httpx.get(f"{server.root}/v1/page/vocabulary/a%2Fb").status_code == 200
    server.stop()


def test_an_error_reaches_its_client_and_the_engine_goes_on(teacher):
    engine, got = Engine("teacher", *teacher), []
    engine.submit(Answer([10 ** 9], 1, got.append))                     # no such row of the embedding
    wait_until(lambda: got)
    assert isinstance(got[0], Exception)
    engine.submit(Answer([1, 2], 1, got.append))
    wait_until(lambda: len(got) == 3)
    assert got[2] in ("stop", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_no_stack_trace_leaves_the_server(teacher, stream, capsys):
    model, tokenizer = teacher
    engine = Engine("teacher", model, tokenizer)
    engine.step = lambda new: 1 / 0
    with TestClient(make_app({"teacher": engine}), raise_server_exceptions=False) as client:
        answer = client.post("/v1/chat/completions", json={"model": "teacher", "messages": ASKED, "stream": stream})
    assert "rror" in answer.text and "Traceback" not in answer.text and "division" not in answer.text
    assert answer.status_code == (200 if stream else 500)               # a stream has begun, and ends with the error
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_no_sampling_setting_ends_the_answers_of_others(client):
    for strange in ({"temperature": 1e-40}, {"top_p": 1e-40}, {"extra_body": {"top_k": 10 ** 30}}, {"max_tokens": 10 ** 30}):
        assert chat(client, **strange).choices[0].finish_reason in ("stop", "length")


def test_answers_go_on_while_tokens_are_read(teacher):
    engine, got = Engine("teacher", *teacher), []
    gate = threading.Event()

    async def read():
        reading = asyncio.ensure_future(engine.read(gate.wait, 10))
        await asyncio.sleep(0)
        engine.submit(Answer([1, 2], 5, got.append))
        while not got or isinstance(got[-1], tuple):                    # until the reason comes
            await asyncio.sleep(0.01)
        assert not reading.done()
        gate.set()
        assert await reading
    asyncio.run(read())


# -- the process


def test_the_key_is_needed_and_in_no_log(models, serve, monkeypatch):
    server = serve(f"teacher={models}/teacher.pth", api_key_env="SERVE_KEY", variables={"SERVE_KEY": KEY})
    for key in ("none", KEY + "0"):
        with pytest.raises(openai.AuthenticationError):
            chat(server.client(key))
    assert chat(server.client(KEY)).choices[0].message.content is not None
    assert httpx.get(f"{server.root}/health").status_code == 200
    assert KEY not in server.stop().output


def test_sigterm_finishes_what_is_running(models, serve):
    server = serve(f"teacher={models}/teacher.pth")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.client().completions.create, model="teacher", prompt=["a"] * 8, max_tokens=100, temperature=10)
        wait_until(lambda: httpx.get(f"{server.root}/health").json()["teacher"]["answering"])
        ended = server.stop()
        assert len(answer.result().choices) == 8 and ended.code in (0, -signal.SIGTERM) and "Traceback" not in ended.output


def test_a_port_in_use_and_a_wide_open_host_are_named(models):
    weights = f"{models}/teacher.pth"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "--port 0" in complaint("scripts/serve.py", weights=weights, port=port)
    assert "--api_key_env" in complaint("scripts/serve.py", weights=weights, host="0.0.0.0", port=0)
    assert "two models" in complaint("scripts/serve.py", weights=[weights, weights], port=0)
