"""
远处教师的规律：与内存里的教师给出同样的损失；每个样本只问一次；换了分词器或停了的服务，说得清楚。
Laws of a served teacher: its loss is that of the teacher in memory, no sample is asked for twice, and another
tokenizer, a dead server and an answer without log-probabilities are named.
"""

import json
import math
import threading
from types import SimpleNamespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dataset.lm_dataset import batch_of_answers
from distill.cache import TeacherCache, command
from distill.served import ServedTeacher, read_ahead
from distill.teachers import Teacher
from helpers_run import TINY, complaint, start, succeed, wait_until
from interop.checkpoint import load_model
from model.tokenizer import Tokenizer
from test_serve import Server


@pytest.fixture(scope="module")
def server(models):
    server = Server(f"teacher={models}/teacher.pth")
    yield server
    server.stop()


def teacher(url, name, tokenizer, **options) -> ServedTeacher:
    served = ServedTeacher(url, name, **options)
    served.check(tokenizer)
    return served


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def losses(folder, name):
    return [row["kd"] for row in rows(folder, name) if "kd" in row]


@pytest.fixture
def flags(models, data, tmp_path):
    return TINY | {"student": models / "student.pth", "data_path": data / "sft_data.jsonl", "val_path": "none",
                   "max_steps": 4, "log_interval": 1, "out_dir": tmp_path}


@pytest.mark.parametrize("script, name, more", [
    ("train_onpolicy.py", "full_onpolicy_32", {"sample_every": 2, "max_new_tokens": 8}),
    ("train_distillation.py", "full_dist_32", {"alpha": 0.5}),
    ("train_distillation.py", "full_dist_32", {"with_context": True})])
def test_a_served_teacher_gives_the_loss_of_the_teacher_in_memory(server, models, data, flags, tmp_path, script, name, more):
    if more.pop("with_context", False):
        flags |= {"data_path": data / "experience_student.jsonl", "teacher_data_path": data / "experience_teacher.jsonl",
                  "val_path": None, "eval_interval": 2}
    succeed(script, **flags | more, teacher=models / "teacher.pth")
    near = losses(tmp_path, name)
    succeed(script, **flags | more, teacher_url=server.url, teacher_model="teacher", teacher_top_k=100)
    far = losses(tmp_path, name)
    assert near != far                                  # the tail of 6,300 tokens is one bucket
    assert far == pytest.approx(near, rel=0.05)


def test_the_next_batches_are_read_while_the_student_learns():
    class Recorder(ServedTeacher):
        def prefetch(self, sequences):
            self.seen += sequences

    served = Recorder("http://localhost:1/v1", "m")
    served.seen, served.answered, stop = [], lambda sequences: sequences != [[7]], SimpleNamespace(requested=False)
    batches = [batch_of_answers([[i]], [[i]]) for i in range(1, 20)]
    ahead = read_ahead(iter(batches), [Teacher(served)], stop, 1)
    assert next(ahead) is batches[0] and served.seen == [[i] for i in range(1, len(served.seen) + 1)]
    assert 5 < len(served.seen) < 19 and not stop.requested
    assert [next(ahead) for _ in range(5)][-1] is batches[5] and stop.requested     # the step before [7] is the last
    assert [*batches[:6], *ahead] == batches
    plain = read_ahead(iter(batches), [Teacher(None)], stop, 1)
    assert [next(plain), *plain] == batches


def test_predictions_are_the_model_s_and_no_sequence_is_asked_for_twice(server, models):
    model, tokenizer = load_model(models / "teacher.pth", "cpu")
    served = teacher(server.url, "teacher", tokenizer, top_k=5)
    assert served.config.max_seq_len == model.config.max_seq_len
    batch = batch_of_answers([[20, 21], [30]], [[22, 23, 24], [31, 32]])
    top = served.look_up(batch)
    with torch.no_grad():
        log_p = model(batch.tokens, batch.lengths, at=batch.at).logits.log_softmax(-1)
    values, ids = log_p.topk(5)
    assert torch.equal(top.ids, ids) and torch.allclose(top.log_p, values, atol=1e-5)
    total = top.log_p.exp().sum(-1) + top.tail.exp()
    assert torch.allclose(total, torch.ones(len(total)), atol=1e-5)
    served.client = None                                # a further request would fail
    assert torch.equal(served.look_up(batch).ids, ids)


def test_the_cache_of_a_served_teacher_is_that_of_the_teacher_in_memory(server, models, flags, tmp_path):
    of = {"data_path": flags["data_path"], "max_seq_len": 128, "device": "cpu"}
    succeed("scripts/cache_teacher.py", **of, teacher=models / "teacher.pth", top_k=8, cache_dir=tmp_path / "near")
    succeed("scripts/cache_teacher.py", **of, teacher_url=server.url, teacher_model="teacher", teacher_top_k=8,
            cache_dir=tmp_path / "far")
    near, far = TeacherCache(tmp_path / "near"), TeacherCache(tmp_path / "far")
    assert (near.keys == far.keys).all()
    near, far = near.look_up(near.keys), far.look_up(far.keys)
    assert torch.equal(near.ids, far.ids) and torch.allclose(near.log_p, far.log_p, atol=1e-4)
    succeed("train_distillation.py", **flags, teacher_cache=tmp_path / "far")


def test_the_way_out_of_a_served_cache_is_its_own_command(flags):
    about = {"teacher": "big one at http://x/v1", "dtype": "served", "tokenizer": "t.json", "max_seq_len": 9, "top_k": 4, "sampled": 0,
             "temperature": 1.0, "skip_bad_lines": False, "files": {"a.jsonl": "", "b.jsonl": ""}}
    assert command(about, "out/cache", "--overwrite") == (
        "python scripts/cache_teacher.py --teacher_url http://x/v1 --teacher_model 'big one' --tokenizer t.json --max_seq_len 9 --top_k 4 "
        "--sampled 0 --temperature 1.0 --data_path a.jsonl b.jsonl --cache_dir out/cache --overwrite")
    assert "a server answers at 1" in complaint("scripts/cache_teacher.py", data_path=flags["data_path"], teacher_url="http://x/v1",
                                                teacher_model="m", top_k=4, temperature=2)


# -- failures


@pytest.mark.parametrize("wrong, said", [({"objective": "pg"}, "--objective gkd"), ({"temperature": 2}, "temperature 1"),
                                         ({"teacher": "a.pth"}, "give one of them")])
def test_flags_that_a_served_teacher_cannot_follow_are_refused(flags, wrong, said):
    assert said in complaint("train_onpolicy.py", **flags, teacher_url="http://localhost:1/v1", teacher_model="m", **wrong)


@pytest.mark.parametrize("wrong, said", [({"teacher": "a.pth"}, "give one of them"), ({"temperature": 2}, "at temperature 1"),
                                         ({"feature_weight": 1}, "in memory"),
                                         ({"teacher_top_k": 0}, "teacher_top_k")])
def test_what_distillation_cannot_ask_of_a_served_teacher_is_refused(server, flags, wrong, said):
    assert said in complaint("train_distillation.py", **flags, teacher_url=server.url, teacher_model="teacher", **wrong)


class Answers(BaseHTTPRequestHandler):
    """Says what its server's `says` makes of a request."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.server.says(request)
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        data = json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "me"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def other():
    """other(says) -> the URL of a server that answers `says(request)`."""
    servers = []

    def make(says):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        server.says, server.daemon_threads = says, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield make
    for server in servers:
        server.shutdown()


def vllm(tokenizer, k):
    """prompt_logprobs, as vLLM writes them: the token itself may be one more than k."""
    def says(request):
        prompts = [tokenizer.encode(each) if isinstance(each, str) else each for each in request["prompt"]]
        place = {str(i): {"logprob": -math.log(20 + i), "rank": i + 1} for i in range(k)}
        return 200, {"choices": [
            {"index": n, "text": "", "logprobs": {"tokens": [f"token_id:{i}" for i in ids]},
             "prompt_logprobs": [None] + [place | {str(i): {"logprob": None}} for i in ids[1:]]}
            for n, ids in enumerate(prompts)]}
    return says


def test_the_prompt_logprobs_of_vllm_are_read(other):
    served = teacher(other(vllm(Tokenizer.load(), 5)), "m", Tokenizer.load(), top_k=5)
    top = served.look_up(batch_of_answers([[20]], [[21, 22]]))
    assert top.ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert top.log_p[0].tolist() == pytest.approx([-math.log(20 + i) for i in range(5)], abs=1e-6)


@pytest.mark.parametrize("says, said", [
    (lambda request: (200, {"choices": [{"index": 0, "logprobs": {"tokens": ["token_id:5"], "top_logprobs": [None]}}]}), "the student's tokenizer"),
    (lambda request: (401, {"error": {"message": "who are you?"}}), "401"),
    (lambda request: (200, {"choices": [{"index": 0, "logprobs": {"tokens": ["3", " plus"], "top_logprobs": [None, {}]}}]}),
     "generate_answers.py --teacher_url"),
    (lambda request: (200, "[" * 100_000), "recursion"),
    (lambda request: (200, ["no completion"]), "did not return"),
    (lambda request: (200, {"choices": [{"index": 0, "text": "hello", "logprobs": None}]}), "did not return"),
], ids=["another tokenizer", "no permission", "no ids", "deep JSON", "no object", "no log-probabilities"])
def test_a_server_that_is_no_teacher_stops_the_run_before_training(other, flags, says, said):
    output = complaint("train_onpolicy.py", **flags, teacher_url=other(says), teacher_model="m")
    assert said in output and "step 1" not in output


@pytest.mark.parametrize("script, name, more", [("train_onpolicy.py", "full_onpolicy_32", {"max_new_tokens": 4}),
                                                ("train_distillation.py", "full_dist_32", {"batch_size": 2})])
def test_a_server_that_dies_stops_the_run_cleanly_and_resume_goes_on(models, flags, tmp_path, script, name, more):
    asked = tmp_path / "asked.jsonl"            # more than is read ahead; what has been read needs no server
    asked.write_text("".join(json.dumps({"question": f"{i} plus 1?", "answer": f"{i + 1}."}) + "\n" for i in range(4000)))
    flags |= {"data_path": asked, "max_steps": 2000, "epochs": 1, "batch_size": 2, "teacher_model": "teacher", **more}

    def run_until(done, server):
        run = start(script, **flags, teacher_url=server.url)
        log = tmp_path / f"{name}.jsonl"
        wait_until(lambda: log.exists() and log.read_text() and rows(tmp_path, name)[-1]["step"] > done)
        return run

    mortal = Server(f"teacher={models}/teacher.pth")
    run = run_until(0, mortal)
    mortal.run.send()
    ended = run.wait(120)
    assert ended.code == 130 and "Traceback" not in ended.output and "teacher at 127.0.0.1" in ended.output
    done = rows(tmp_path, name)[-1]["step"]
    assert f"stopped after step {done} of 2000; everything is saved" in ended.output
    if script == "train_onpolicy.py":           # resumes by the same lines
        return
    flags["resume"] = True
    again = Server(f"teacher={models}/teacher.pth")
    run = run_until(done, again)
    run.send()
    run.wait(60)
    again.stop()
