"""
代理的规律：答复按问的次序；接口失败有限次重试；付过钱的不再问第二次；密钥不落到任何文件里。
Laws of agents: replies come in the order of what was asked, an endpoint's failures are met a bounded number of times,
nothing is paid for twice, and the key is in no file and no log.
"""

import argparse
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
import torch

from ability_tree import agents
from ability_tree.agents import EndpointAgent, LocalAgent, OutOfBudget, add_agent_args, make_agent
from interop.checkpoint import load_model, save_model
from evaluation.exam import ExamQuestion, write_answers
from runtime.args import parse_args

KEY = "sk-0123456789abcdef"
CPU = torch.device("cpu")


def says(text):
    return [{"role": "user", "content": text}]


def asks(*texts):
    return [says(text) for text in texts]


# ---- an endpoint that does what a test tells it to -------------------------------------------------------

def completion(text, tokens=10):
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"total_tokens": tokens}}


def echo(request):
    """200, with "re: " and what was asked, for 10 tokens."""
    return 200, completion(f"re: {request['messages'][-1]['content']}\n")


class Endpoint(ThreadingHTTPServer):
    """On loopback. To the n-th request it does plan[n], to those beyond the plan `then`: each is handed the request and
    gives (status, body, headers), or None to drop the connection without a word."""

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
        body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *message):
        pass


class Clock:
    """Time passes only by sleeping, and every sleep is written down."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if seconds:
            self.slept.append(seconds)


@pytest.fixture
def endpoint(monkeypatch):
    """endpoint(*plan, then=...) -> an Endpoint under way."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
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
    """agent(server, ...) -> an agent of it that waits by a Clock of its own; its replies are in replies.jsonl."""

    def make(server, parallel=1, **options):
        return EndpointAgent(server.url, "m", tmp_path / "replies.jsonl", parallel=parallel, clock=Clock(), **options)

    return make


@pytest.fixture
def told(monkeypatch):
    """The lines of the log."""
    lines = []
    monkeypatch.setattr(agents, "Logger", lines.append)
    return lines


def rows_of(folder, name="replies.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


# ---- replies -----------------------------------------------------------------------------------------

def test_replies_come_in_the_order_of_the_questions_though_the_first_takes_longest(endpoint, agent):
    others_are_in = threading.Semaphore(0)

    def slow_first(request):
        for _ in range(3 if request["messages"][-1]["content"] == "0" else 0):
            assert others_are_in.acquire(timeout=5)     # so that all four must be under way together
        if request["messages"][-1]["content"] != "0":
            others_are_in.release()
        return echo(request)

    replies = agent(endpoint(then=slow_first), parallel=4).ask(asks("0", "1", "2", "3"), 8)
    assert replies == ["re: 0", "re: 1", "re: 2", "re: 3"]


def test_as_many_requests_are_under_way_as_allowed_and_no_more(endpoint, agent):
    under_way, most, lock, three = [0], [0], threading.Lock(), threading.Barrier(3, timeout=5)

    def counted(request):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        three.wait()                # nine requests pass in threes, or not at all
        with lock:
            under_way[0] -= 1
        return echo(request)

    agent(endpoint(then=counted), parallel=3).ask(asks(*"abcdefghi"), 8)
    assert most[0] == 3


def test_the_request_is_what_was_asked_and_a_seed_goes_with_sampling_only(endpoint, agent):
    server = endpoint()
    asking = agent(server)
    asking.ask(asks("u"), 8)
    asking.ask(asks("u"), 8, temperature=0.5, seed=3)
    greedy, sampled = server.requests
    assert greedy == {"model": "m", "messages": says("u"), "max_tokens": 8, "temperature": 0.0}
    assert sampled == greedy | {"temperature": 0.5, "seed": sampled["seed"]} and 0 <= sampled["seed"] < 2**31


def test_the_same_question_is_one_request_when_greedy_and_another_draw_each_time_when_sampled(endpoint, agent):
    server = endpoint()
    assert agent(server).ask(asks("u", "v", "u"), 8) == ["re: u", "re: v", "re: u"] and server.asked == ["u", "v"]

    sampled = [endpoint() for _ in range(3)]
    for at, seed in zip(sampled, (1, 1, 2)):
        agent(at).ask(asks("u", "u"), 8, temperature=1.0, seed=seed)
    seeds = [[request["seed"] for request in at.requests] for at in sampled]
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 4


def test_a_refusal_is_an_empty_reply_and_half_an_emoji_can_be_kept(endpoint, agent):
    server = endpoint((200, completion(None)), (200, completion("好\ud83d")))
    assert agent(server).ask(asks("u", "v"), 8) == ["", "好\ufffd"]
    assert agent(server).ask(asks("u", "v"), 8) == ["", "好\ufffd"] and server.asked == ["u", "v"]


# ---- failures ----------------------------------------------------------------------------------------

def test_a_429_is_waited_for_as_long_as_it_says(endpoint, agent, tmp_path):
    busy = (429, {"error": "busy"}, {"Retry-After": 7})
    asking = agent(endpoint(busy, busy))
    assert asking.ask(asks("u"), 8) == ["re: u"]
    assert asking.clock.slept == [7, 7] and rows_of(tmp_path)[0]["attempts"] == 3



@pytest.mark.parametrize("failure", [
    (500, {"error": "oops"}), (503, "busy"), (429, {}), (429, {}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), None,
    (200, "<html>"), (200, "{\"choices\": ["), (200, "[]"), (200, {"choices": []}), (200, {"choices": None}),
    (200, {"choices": [{"message": {"content": 5}}]}), (200, completion("u", "ten")),
    (200, "<p>", {"Content-Type": "text/html"}), (200, "x", {"Content-Encoding": "gzip"}),
])
def test_what_may_pass_is_tried_again_after_waits_that_double(endpoint, agent, failure, tmp_path):
    asking = agent(endpoint(failure, failure, failure))
    assert asking.ask(asks("u"), 8) == ["re: u"]
    assert asking.clock.slept == [1, 2, 4] and rows_of(tmp_path)[0]["attempts"] == 4


def test_a_connection_that_is_cut_within_the_body_or_stays_silent_is_tried_again(endpoint, agent):
    cut = (200, "{", {"Content-Length": 100, "Connection": "close"})
    over = threading.Event()
    server = endpoint(cut, lambda request: over.wait(5) and None)
    assert agent(server, timeout=0.3).ask(asks("u"), 8) == ["re: u"] and len(server.asked) >= 3
    over.set()


def test_attempts_are_bounded_and_a_reply_that_never_came_is_told_of_and_asked_again_by_the_next_run(
        endpoint, agent, told, tmp_path):
    def never_b(request):
        return (500, {"error": "oops"}) if request["messages"][-1]["content"] == "b" else echo(request)

    server = endpoint(then=never_b)
    assert agent(server, retries=2).ask(asks("a", "b", "c"), 8) == ["re: a", "", "re: c"]
    assert server.asked == ["a", "b", "b", "b", "c"]
    failed = rows_of(tmp_path)[1]
    assert (failed["reply"], failed["attempts"]) == (None, 3) and "500" in failed["error"] and "oops" in failed["error"]
    assert any("3 attempts" in line and failed["request"][:8] in line and "oops" in line for line in told)

    server.then = echo
    assert agent(server).ask(asks("a", "b", "c"), 8) == ["re: a", "re: b", "re: c"] and server.asked[5:] == ["b"]


def test_what_would_be_refused_again_is_tried_once(endpoint, agent, tmp_path):
    server = endpoint((400, {"error": "context too long"}), (429, {}, {"Retry-After": 86400}))
    assert agent(server).ask(asks("a", "b", "c"), 8) == ["", "", "re: c"] and server.asked == ["a", "b", "c"]
    assert "context too long" in rows_of(tmp_path)[0]["error"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_the_call_at_once(endpoint, agent, status):
    server = endpoint(echo, then=(status, {"error": "no"}))
    with pytest.raises(ValueError, match=f"m at 127.0.0.1 refuses all requests: .*{status}.*_key_env"):
        agent(server).ask(asks("a", "b", "c"), 8)
    assert server.asked == ["a", "b"]


def test_an_endpoint_that_is_down_ends_the_call_after_ten_failures_in_a_row(endpoint, agent, told):
    server = endpoint(then=(500, {}))
    with pytest.raises(ValueError, match="10 requests in a row had no reply.*Is it up"):
        agent(server, retries=1).ask(asks(*map(str, range(99))), 8)
    assert len(server.asked) == 20

    often = [(500, {}) if number % 10 else echo for number in range(99)]        # nine in a row, a reply, nine in a row, ...
    assert len([reply for reply in agent(endpoint(*often), retries=0).ask(asks(*map(str, range(99))), 8) if reply]) == 10


# ---- budget, pace, and what is kept ----------------------------------------------------------------------

def test_no_request_starts_once_the_budget_is_used_and_what_has_come_is_kept(endpoint, agent, tmp_path):
    server = endpoint()
    with pytest.raises(OutOfBudget, match="budget of 25 tokens is used") as stopped:
        agent(server, budget=25).ask(asks(*"abcde"), 8)         # 10 tokens each
    assert stopped.value.replies == ["re: a", "re: b", "re: c", "", ""]
    assert server.asked == ["a", "b", "c"] and [row["tokens"] for row in rows_of(tmp_path)] == [10, 10, 10]

    with pytest.raises(OutOfBudget):                            # what an earlier run used is used
        agent(server, budget=25).ask(asks(*"abcde"), 8)
    assert agent(server, budget=25).ask(asks(*"abc"), 8) == ["re: a", "re: b", "re: c"] and server.asked == ["a", "b", "c"]
    assert agent(server, budget=50).ask(asks(*"abcde"), 8)[3:] == ["re: d", "re: e"] and server.asked == [*"abcde"]


def test_what_is_under_way_when_the_budget_is_used_is_kept(endpoint, agent, tmp_path):
    both = threading.Barrier(2, timeout=5)

    def together(request):
        both.wait()
        return echo(request)

    with pytest.raises(OutOfBudget) as stopped:
        agent(endpoint(then=together), parallel=2, budget=10).ask(asks(*"abcdef"), 8)
    assert sum(map(bool, stopped.value.replies)) == len(rows_of(tmp_path)) == 2


def test_an_endpoint_that_does_not_count_is_counted_by_a_token_for_three_bytes(endpoint, agent, tmp_path):
    body = {"choices": completion("好的")["choices"]}           # 6 bytes, after 4 bytes of a question: 10 / 3, rounded up
    agent(endpoint((200, body))).ask(asks("2+2="), 8)
    assert rows_of(tmp_path)[0]["tokens"] == 4


def test_a_run_that_is_started_again_asks_nothing_twice_but_what_is_another_request(endpoint, agent, tmp_path):
    server = endpoint()
    for _ in range(2):
        assert agent(server).ask(asks("a", "b"), 8) == ["re: a", "re: b"]
        assert agent(server).ask(asks("a"), 8, temperature=1.0, seed=1) == ["re: a"]
    assert server.asked == ["a", "b", "a"]
    asking = agent(server)
    asking.ask(asks("a"), 9)
    asking.ask(asks("a"), 8, temperature=1.0, seed=2)
    asking.ask([[{"role": "system", "content": "s"}, *says("a")]], 8)
    EndpointAgent(server.url, "another", tmp_path / "replies.jsonl").ask(asks("a"), 8)
    elsewhere = endpoint()
    agent(elsewhere).ask(asks("a"), 8)
    assert server.asked == ["a", "b", *"aaaaa"] and elsewhere.asked == ["a"]


def test_a_kill_costs_the_line_that_it_cut_short_and_a_line_that_is_no_reply_is_named(endpoint, agent, tmp_path):
    server, path = endpoint(), tmp_path / "replies.jsonl"
    agent(server).ask(asks("a", "b"), 8)
    path.write_bytes(path.read_bytes()[:-5])
    assert agent(server).ask(asks("a", "b"), 8) == ["re: a", "re: b"] and server.asked == ["a", "b", "b"]
    assert [row["reply"] for row in rows_of(tmp_path)] == ["re: a", "re: b"]

    path.write_text(path.read_text() + "{\"question\": 1}\n")
    with pytest.raises(ValueError, match="replies.jsonl, line 3 is no reply"):
        agent(server)


def test_processes_write_files_of_their_own_read_all_and_share_budget_and_pace(endpoint, agent, tmp_path):
    server = endpoint()
    first, second = (agent(server, rank=rank, n_processes=2, parallel=2, budget=40, rpm=60) for rank in (0, 1))
    first.ask(asks("a"), 8)
    with pytest.raises(OutOfBudget):
        second.ask(asks("b", "c", "d"), 8)                     # half of 40 is used by the second
    assert first.gap == 2 and first.parallel == 1 and second.left == 0
    assert (len(rows_of(tmp_path)), len(rows_of(tmp_path, "replies.jsonl.part1"))) == (1, 2)
    assert agent(server).ask(asks("a", "b", "c"), 8) == ["re: a", "re: b", "re: c"] and len(server.asked) == 3


def test_requests_keep_to_so_many_a_minute_attempts_among_them(endpoint, agent):
    asking = agent(endpoint(echo, (500, {}), (500, {})), rpm=30)            # one every 2 seconds
    asking.ask(asks("a", "b"), 8)
    # b: 2 s for its turn; 1 s for the failure and 1 s more for the turn; 2 s for the failure, which is a turn.
    assert asking.clock.slept == [2, 1, 1, 2] and asking.clock.now == 6


def test_the_pace_is_that_of_all_requests_under_way_together(endpoint, agent):
    asking = agent(endpoint(), parallel=4, rpm=12)
    asking.ask(asks(*"abcdefg"), 8)
    assert asking.clock.slept == [5] * 6


# ---- the key -----------------------------------------------------------------------------------------

def quoting(status, headers=None):
    """An endpoint's answer that quotes the key it was sent."""
    return status, json.dumps({"error": f"Bearer {KEY} is bad"}), headers or {}


def test_the_key_is_sent_and_is_in_no_log_no_file_and_no_error(endpoint, agent, told, tmp_path, monkeypatch, caplog):
    caplog.set_level(0)
    monkeypatch.setenv("SOME_KEY", KEY + "\n")
    quotes = (200, completion(f"your key is {KEY}"))
    server = endpoint(quotes, quoting(500), quoting(400), (200, f"no JSON {KEY}"), then=quoting(401))
    asking = agent(server, retries=0, key_env="SOME_KEY")
    with pytest.raises(ValueError) as error:
        asking.ask(asks(*"abcde"), 8)
    assert set(server.keys) == {f"Bearer {KEY}"} and len(server.keys) == 5
    assert "Bearer *** is bad" in str(error.value) and error.value.__cause__ is None and error.value.__suppress_context__
    assert [row.get("error", row["reply"]).count("***") for row in rows_of(tmp_path)] == [1, 1, 1, 1]
    everything = [(tmp_path / "replies.jsonl").read_text(), *told, str(error.value), asking.name, caplog.text]
    assert not any(KEY in text for text in everything)


def test_without_a_key_none_is_looked_for(endpoint, agent, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = endpoint()
    agent(server).ask(asks("a"), 8)
    assert server.keys == ["Bearer none"]


def test_a_short_key_is_a_word_like_any_other(endpoint, agent, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "e")
    assert agent(endpoint(), key_env="SOME_KEY").ask(asks("hello"), 8) == ["re: hello"]


@pytest.mark.parametrize("value, problem", [(None, "none of the name given"), ("", "empty"), (" ", "empty"), ("sk-é", "ASCII")])
def test_a_key_that_is_missing_is_told_of_without_what_may_be_the_key_itself(agent, endpoint, monkeypatch, value, problem):
    if value is not None:
        monkeypatch.setenv(KEY, value)
    with pytest.raises(ValueError, match=f"_key_env.*{problem}|{problem}") as error:
        agent(endpoint(), key_env=KEY)
    assert KEY not in str(error.value)


# ---- weights -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(tiny, byte_tokenizer, tmp_path_factory):
    """An untrained model that writes bytes at random."""
    tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("weights") / "bytes.pth"
    save_model(tiny(vocab_size=tokenizer.vocab_size, max_seq_len=80), tokenizer, path)
    return path


def test_a_local_agent_writes_what_greedy_decoding_writes_and_nothing_where_there_is_no_room(weights, told):
    model, tokenizer = load_model(weights)
    texts = ["2 + 3 =", "too long " * 9, "what is 3 plus 4?"]
    local = LocalAgent(weights, CPU)
    replies = local.ask(asks(*texts), 6)
    assert replies == write_answers(model, tokenizer, [ExamQuestion(says(text), "", None, "") for text in texts], 6)
    assert replies[0] != replies[2] and replies[1] == "" and "1 of 3 conversations are longer than 79 tokens" in told[0]
    local.rows = 1
    assert local.ask(asks(*texts), 6) == replies and local.ask([], 6) == []


def test_a_local_agent_draws_by_the_seed_and_what_is_asked_twice_is_drawn_twice(weights):
    local = LocalAgent(weights, CPU)
    first, again, other = (local.ask(asks("u", "u"), 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and first[0] != first[1]


# ---- flags -------------------------------------------------------------------------------------------

def made(*argv):
    parser = argparse.ArgumentParser()
    for role in ("writer", "judge"):
        add_agent_args(parser, role)
    return make_agent(parse_args(parser, argv), "writer", CPU)


def test_the_flags_make_the_agent_that_they_describe(endpoint, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_KEY", KEY)
    local = made("--writer", str(weights), "--writer_parallel", "3")
    assert isinstance(local, LocalAgent) and local.rows == 3 and local.name == str(weights)
    server = endpoint()
    (tmp_path / "writer.yaml").write_text(f"writer_url: {server.url}/\nwriter_model: big\n")
    far = made("--config", "writer.yaml", "--writer_key_env", "SOME_KEY", "--writer_budget", "7", "--writer_rpm", "30")
    assert (far.name, far.url, far.key, far.left, far.gap, far.parallel) == ("big at 127.0.0.1", server.url, KEY, 7, 2, 8)
    assert far.ask(asks("a"), 8) == ["re: a"]
    assert rows_of(tmp_path / "out/replies", "writer.jsonl")[0]["reply"] == "re: a"


@pytest.mark.parametrize("argv, problem", [
    ("", "give either --writer WEIGHTS or --writer_url URL"),
    ("--writer a.pth --writer_url http://h/v1", "not both"),
    ("--writer_url http://h/v1", "--writer_model NAME"),
    ("--writer_url h:8000 --writer_model m", "must begin with http"),
    ("--writer a.pth --writer_rpm 5 --writer_model m", "--writer_model, --writer_rpm: of no effect without --writer_url"),
    ("--writer a.pth --writer_parallel 0", "--writer_parallel 1 or more"),
    ("--writer_url http://h/v1 --writer_model m --writer_budget -1", "--writer_budget -1 and"),
])
def test_flags_that_do_not_go_together_are_refused_by_name(argv, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        made(*argv.split())


def test_only_an_endpoint_needs_the_openai_package_and_says_how_to_get_it(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert made("--writer", str(weights)).ask(asks("u"), 2)
    with pytest.raises(ValueError, match="pip install openai"):
        made("--writer_url", "http://127.0.0.1:9/v1", "--writer_model", "m")
