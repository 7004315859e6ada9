"""
代理的规律：答复按问的次序；接口失败有限次重试；付过钱的不再问第二次；密钥不落到任何文件里。
Laws of agents: replies come in the order of the conversations, an endpoint's failures are retried a
bounded number of times, nothing is paid for twice, and the key is in no file and no log.
"""

import argparse
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
import torch

from ability_tree.agents import LocalAgent, make_agent
from evaluation import exam
from interop.checkpoint import load_model, save_model
from runtime import endpoint as endpoints
from runtime.args import parse_args
from runtime.endpoint import EndpointAgent, OutOfBudget, add_agent_args

KEY = "sk-0123456789abcdef"
CPU = torch.device("cpu")


def says(text):
    return [{"role": "user", "content": text}]


def asks(*texts):
    return [says(text) for text in texts]


# ---- an endpoint that follows a plan -------------------------------------------------------------

def completion(text, tokens=10):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"total_tokens": tokens}}


def echo(request):
    """200, with "re: " and what was asked, for 10 tokens."""
    return 200, completion(f"re: {request['messages'][-1]['content']}\n")


class Endpoint(ThreadingHTTPServer):
    """On loopback. To the n-th request it does plan[n], to those beyond the plan `then`: a function
    of the request, or its result, (status, body, headers), or None to drop the connection."""

    daemon_threads = True

    def __init__(self, *plan, then=echo):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.then, self.numbers = plan, then, count()
        self.requests, self.keys = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self):
        return [request["messages"][-1]["content"] for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        number = next(self.server.numbers)
        does = self.server.plan[number] if number < len(self.server.plan) else self.server.then
        answer = does(request) if callable(does) else does
        if answer is None:
            self.close_connection = True
            return
        status, body, headers = (*answer, {})[:3]
        if isinstance(body, (str, dict, list)):
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": len(body)}
        for name, value in (defaults | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *message):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """endpoint(*plan, then=...) -> an Endpoint under way."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    running = []

    def start(*plan, then=echo):
        server = Endpoint(*plan, then=then)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def agent(tmp_path):
    """agent(server, ...) -> an agent of it; its replies are in replies.jsonl."""
    def make(server, parallel=1, **options):
        replies = tmp_path / "replies.jsonl"
        return EndpointAgent(server.url, "m", replies, parallel=parallel, **options)

    return make


@pytest.fixture
def log(monkeypatch):
    """The lines of the log."""
    lines = []
    for module in (endpoints, exam):
        monkeypatch.setattr(module, "Logger", lines.append)
    return lines


def rows_of(folder, name="replies.jsonl"):
    lines = (folder / name).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


# ---- replies -------------------------------------------------------------------------------------

def test_replies_come_in_order_and_as_many_requests_run_as_allowed(endpoint, agent):
    running, most, lock, three = [0], [0], threading.Lock(), threading.Barrier(3, timeout=5)

    def counted(request):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        number = three.wait()       # nine requests pass in threes, or not at all
        with lock:
            running[0] -= 1
        time.sleep(0.01 * number)   # and end in any order
        return echo(request)

    replies = agent(endpoint(then=counted), parallel=3).generate(asks(*"abcdefghi"), 8)
    assert replies == [f"re: {letter}" for letter in "abcdefghi"] and most[0] == 3


def test_a_request_has_its_conversation_and_a_seed_only_when_sampled(endpoint, agent):
    server = endpoint()
    asking = agent(server)
    asking.generate(asks("u"), 8)
    asking.generate(asks("u"), 8, temperature=0.5, seed=3)
    greedy, sampled = server.requests
    assert greedy == {"model": "m", "messages": says("u"), "max_tokens": 8, "temperature": 0.0}
    assert sampled == greedy | {"temperature": 0.5, "seed": sampled["seed"]}


def test_equal_conversations_are_one_request_when_greedy_and_differ_when_sampled(endpoint, agent):
    server = endpoint()
    assert agent(server).generate(asks("u", "v", "u"), 8) == ["re: u", "re: v", "re: u"]
    assert server.asked == ["u", "v"]
    sampled = [endpoint() for _ in range(3)]
    for at, seed in zip(sampled, (1, 1, 2)):
        agent(at).generate(asks("u", "u"), 8, temperature=1.0, seed=seed)
    seeds = [[request["seed"] for request in at.requests] for at in sampled]
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 4
    assert all(0 <= seed < 2**31 for seed in seeds[0])


def test_a_refusal_is_an_empty_reply_and_half_an_emoji_can_be_kept(endpoint, agent):
    server = endpoint((200, completion(None)), (200, completion("好\ud83d")))
    for _ in range(2):
        assert agent(server).generate(asks("u", "v"), 8) == ["", "好?"]
    assert server.asked == ["u", "v"]


# ---- failures ------------------------------------------------------------------------------------

def test_what_may_pass_is_retried_by_the_client(endpoint, agent):
    cut = (200, "{", {"Content-Length": 100, "Connection": "close"})
    server = endpoint((500, {}), (429, {}), None, cut)
    assert agent(server, retries=4).generate(asks("u"), 8) == ["re: u"]
    assert server.asked == ["u"] * 5


def test_retries_are_bounded_and_the_next_run_sends_failed_requests_again(
        endpoint, agent, log, tmp_path):
    def never_b(request):
        if request["messages"][-1]["content"] == "b":
            return 500, {"error": "oops"}
        return echo(request)

    server = endpoint(then=never_b)
    assert agent(server, retries=2).generate(asks("a", "b", "c"), 8) == ["re: a", "", "re: c"]
    assert server.asked == ["a", "b", "b", "b", "c"]
    failed = rows_of(tmp_path)[1]
    assert failed["reply"] is None and "500" in failed["error"] and "oops" in failed["error"]
    assert any(failed["request"][:8] in line and "oops" in line for line in log)
    server.then = echo
    assert agent(server).generate(asks("a", "b", "c"), 8) == ["re: a", "re: b", "re: c"]
    assert server.asked[5:] == ["b"]


def test_what_would_fail_again_is_sent_once_and_what_is_no_completion_is_no_reply(
        endpoint, agent, tmp_path):
    server = endpoint((400, {"error": "context too long"}), (200, "<html>"), (200, {"choices": []}))
    assert agent(server).generate(asks(*"abcd"), 8) == ["", "", "", "re: d"]
    assert server.asked == [*"abcd"]
    errors = [row.get("error", "") for row in rows_of(tmp_path)]
    assert "context too long" in errors[0]
    assert all("no chat completion" in error for error in errors[1:3])


def test_a_refused_key_or_model_ends_the_call_at_once(endpoint, agent):
    for status in (401, 403, 404):
        server = endpoint(echo, then=(status, {"error": "no"}))
        with pytest.raises(ValueError, match=f"m at 127.0.0.1: .*{status}.*_key_env"):
            agent(server).generate(asks("a", "b", "c"), 8)
        assert server.asked == ["a", "b"]


def test_an_endpoint_that_is_down_ends_the_call_after_ten_failures_in_a_row(endpoint, agent, log):
    server = endpoint(then=(500, {}))
    with pytest.raises(ValueError, match="10 failed requests in a row.*Check that it is up"):
        agent(server, retries=0).generate(asks(*map(str, range(20))), 8)
    assert len(server.asked) == 10
    often = [(500, {}) if number % 10 else echo for number in range(20)]    # nine, a reply, nine
    replies = agent(endpoint(*often), retries=0).generate(asks(*map(str, range(20))), 8)
    assert len(list(filter(None, replies))) == 2


NO_REPLY = {
    "deep JSON": "[" * 200_000, "a list": "[1, 2]", "null": "null", "a text": '"ok"',
    "no choices": '{"choices": []}', "no message": '{"choices": [{}]}',
    "content as a list": '{"choices": [{"message": {"content": ["u"]}}]}',
    "no UTF-8": b'{"choices": "\xff"}', "nothing": b"", "HTML": "<html>502</html>", "no HTTP": None,
}


@pytest.mark.parametrize("body", NO_REPLY.values(), ids=NO_REPLY)
def test_what_is_no_completion_is_no_reply(body, endpoint, agent, log, tmp_path):
    plan = None if body is None else (200, body)
    assert agent(endpoint(then=plan), retries=0).generate(asks("u"), 8) == [""]
    assert "no reply to request" in log[0]
    assert [row["tokens"] for row in rows_of(tmp_path)] == [0]


# ---- budget, and what is kept --------------------------------------------------------------

def test_no_request_starts_once_the_budget_is_used_and_replies_are_kept(endpoint, agent, tmp_path):
    server = endpoint()
    for _ in range(2):                                          # an earlier run counts, too
        with pytest.raises(OutOfBudget, match="budget of 25 tokens is used"):
            agent(server, budget=25).generate(asks(*"abcde"), 8)        # 10 tokens each
        assert server.asked == [*"abc"] and [row["tokens"] for row in rows_of(tmp_path)] == [10] * 3
    assert agent(server, budget=25).generate(asks(*"abc"), 8) == ["re: a", "re: b", "re: c"]
    assert agent(server, budget=50).generate(asks(*"abcde"), 8)[3:] == ["re: d", "re: e"]
    assert server.asked == [*"abcde"]


def test_running_requests_are_completed_when_the_budget_is_used(endpoint, agent, tmp_path):
    both = threading.Barrier(2, timeout=5)

    def together(request):
        both.wait()
        return echo(request)

    with pytest.raises(OutOfBudget):
        agent(endpoint(then=together), parallel=2, budget=10).generate(asks(*"abcdef"), 8)
    assert len(rows_of(tmp_path)) == 2


def test_a_rerun_sends_no_request_twice_but_another_request_is_sent(endpoint, agent, tmp_path):
    server = endpoint()
    for _ in range(2):
        assert agent(server).generate(asks("a", "b"), 8) == ["re: a", "re: b"]
        assert agent(server).generate(asks("a"), 8, temperature=1.0, seed=1) == ["re: a"]
    assert server.asked == ["a", "b", "a"]
    asking = agent(server)
    asking.generate(asks("a"), 9)
    asking.generate(asks("a"), 8, temperature=1.0, seed=2)
    asking.generate([[{"role": "system", "content": "s"}, *says("a")]], 8)
    EndpointAgent(server.url, "another", tmp_path / "replies.jsonl").generate(asks("a"), 8)
    elsewhere = endpoint()
    agent(elsewhere).generate(asks("a"), 8)
    assert server.asked == ["a", "b", *"aaaaa"] and elsewhere.asked == ["a"]


def test_a_kill_costs_the_line_that_it_cut_short(endpoint, agent, tmp_path):
    server, path = endpoint(), tmp_path / "replies.jsonl"
    agent(server).generate(asks("a", "b"), 8)
    path.write_bytes(path.read_bytes()[:-5])
    assert agent(server).generate(asks("a", "b"), 8) == ["re: a", "re: b"]
    assert server.asked == ["a", "b", "b"]
    assert [row["reply"] for row in rows_of(tmp_path)] == ["re: a", "re: b"]


def test_processes_write_files_of_their_own_read_all_and_divide_the_budget(
        endpoint, agent, tmp_path):
    server = endpoint()
    first, second = (agent(server, rank=rank, n_processes=2, parallel=2, budget=40)
                     for rank in (0, 1))
    first.generate(asks("a"), 8)
    with pytest.raises(OutOfBudget):
        second.generate(asks("b", "c", "d"), 8)         # its half of 40 is used
    assert first.parallel == 1 and second.left == 0
    assert len(rows_of(tmp_path)) == 1 and len(rows_of(tmp_path, "replies.jsonl.part1")) == 2
    assert agent(server).generate(asks("a", "b", "c"), 8) == ["re: a", "re: b", "re: c"]
    assert len(server.asked) == 3


# ---- the key -------------------------------------------------------------------------------------

def test_the_key_is_sent_and_is_in_no_log_no_file_and_no_error(
        endpoint, agent, log, tmp_path, monkeypatch, caplog):
    def quoting(status):
        return status, json.dumps({"error": f"Bearer {KEY} is bad"})

    caplog.set_level(0)
    monkeypatch.setenv("SOME_KEY", KEY + "\n")
    server = endpoint(quoting(500), quoting(400), (200, f"no JSON {KEY}"), then=quoting(401))
    asking = agent(server, retries=0, key_env="SOME_KEY")
    with pytest.raises(ValueError) as error:
        asking.generate(asks(*"abcd"), 8)
    assert server.keys == [f"Bearer {KEY}"] * 4 and "Bearer *** is bad" in str(error.value)
    rows = rows_of(tmp_path)
    assert [row["error"].count("***") for row in rows] == [1] * 4
    cause = error.value.__cause__ or error.value.__context__
    everything = [(tmp_path / "replies.jsonl").read_text(), *log, str(error.value), caplog.text]
    assert cause is None and not any(KEY in text for text in everything)


def test_without_a_key_none_is_sent(endpoint, agent, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = endpoint()
    agent(server).generate(asks("a"), 8)
    assert server.keys == ["Bearer no-key"]


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_missing_key_is_reported_without_the_name_which_may_be_the_key(
        agent, endpoint, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv(KEY, value)
    with pytest.raises(ValueError, match="there is none of this name, or it is empty") as error:
        agent(endpoint(), key_env=KEY)
    assert KEY not in str(error.value)


# ---- weights -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(tiny, byte_tokenizer, tmp_path_factory):
    """An untrained model that generates random bytes."""
    tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("weights") / "bytes.pth"
    save_model(tiny(vocab_size=tokenizer.vocab_size, max_seq_len=80), tokenizer, path)
    return path


def test_a_local_agent_decodes_greedily_and_has_no_reply_where_there_is_no_room(weights, log):
    model, tokenizer = load_model(weights)
    texts = ["2 + 3 =", "too long " * 9, "what is 3 plus 4?"]
    local = LocalAgent(weights, CPU)
    replies = local.generate(asks(*texts), 6)
    assert replies == exam.write_answers(model, tokenizer, asks(*texts), 6)
    assert replies[0] != replies[2] and replies[1] == ""
    assert "1 of 3 conversations are longer than 79 tokens" in log[0]
    local.rows = 1
    assert local.generate(asks(*texts), 6) == replies and local.generate([], 6) == []


def test_a_local_agent_samples_by_the_seed_and_equal_conversations_differ(weights):
    local = LocalAgent(weights, CPU)
    first, again, other = (local.generate(asks("u", "u"), 8, temperature=1.0, seed=seed)
                           for seed in (1, 1, 2))
    assert first == again != other and first[0] != first[1]


# ---- flags ---------------------------------------------------------------------------------------

def made(*argv):
    parser = argparse.ArgumentParser()
    for role in ("writer", "judge"):
        add_agent_args(parser, role)
    return make_agent(vars(parse_args(parser, argv)), "writer", CPU)


def test_the_flags_make_the_agent_that_they_describe(endpoint, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_KEY", KEY)
    local = made("--writer", str(weights), "--writer_parallel", "3")
    assert isinstance(local, LocalAgent) and (local.rows, local.name) == (3, str(weights))
    server = endpoint()
    (tmp_path / "writer.yaml").write_text(f"writer_url: {server.url}/\nwriter_model: big\n")
    far = made("--config", "writer.yaml", "--writer_key_env", "SOME_KEY", "--writer_budget", "70")
    assert (far.name, far.url, far.key, far.left, far.parallel) == (
        "big at 127.0.0.1", server.url, KEY, 70, 8)
    assert far.generate(asks("a"), 8) == ["re: a"]
    assert rows_of(tmp_path / "out/replies", "writer.jsonl")[0]["reply"] == "re: a"


@pytest.mark.parametrize("argv, problem", [
    ("", "give either --writer WEIGHTS or --writer_url URL"),
    ("--writer a.pth --writer_url http://h/v1", "not both"),
    ("--writer_url http://h/v1", "--writer_model NAME"),
    ("--writer_url h:8000 --writer_model m", "must begin with http"),
])
def test_flags_that_exclude_each_other_are_named(argv, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        made(*argv.split())


def test_only_an_endpoint_needs_the_openai_package(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert made("--writer", str(weights)).generate(asks("u"), 2)
    with pytest.raises(ValueError, match="pip install openai"):
        made("--writer_url", "http://127.0.0.1:9/v1", "--writer_model", "m")
