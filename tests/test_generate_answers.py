"""
教师作答的规律：文件里就是教师贪心生成的答案；怎么跑都是同一个文件；不成对的行会被指出。
Laws of a teacher's answers: the file holds what it generates, the file is the same however it was made, and rows that are
no pair are named.
"""

import json
import re
import shlex
import signal
import threading

import pytest
import torch

from dataset.formats import Question
from helpers_run import ROOT, TINY, complaint, start, succeed, wait_until
from interop.checkpoint import load_model, new_model, save_model
from model.config import LMConfig
from model.generate import generate
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from runtime.precision import seed_of
from scripts.generate_answers import (Task, main, part_slices, read_tasks, report, to_answer,
                                      to_rows)
from test_agents import Endpoint, completion
from test_serve import Server

SCRIPT = "scripts/generate_answers.py"
N = 32


def question(i: int, hint: str = "") -> dict:
    return {"role": "user", "content": f"{hint}what is {i} plus {i % 7}?"}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(printed: str) -> tuple[str, str]:
    """What a run said at its end, less what the clock decides."""
    return re.search(r"wrote (.*); [\d.]+ s, .* tokens/s((\n.*)*)\nLearn", printed).group(1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The questions of a student, without answers, and those of a teacher, with a hint; and a teacher that was never
    trained, its weights drawn wide, so that its answers differ, and some of them end."""
    folder = tmp_path_factory.mktemp("answers")
    write(folder / "student.jsonl", [{"id": i, "conversations": [question(i)]} for i in range(N)])
    write(folder / "teacher.jsonl", [{"conversations": [question(i, "count up. ")]} for i in range(N)])
    model, tokenizer = new_model(LMConfig(dim=32, n_layers=2, n_heads=2, max_seq_len=128), ROOT / "model/tokenizer.json")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
        model.output.weight[tokenizer.end_of_turn].mul_(2.5)
    save_model(model, tokenizer, folder / "model.pth")
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    return {"teacher": folder / "model.pth", "data_path": folder / "student.jsonl", "dtype": "float32",
            "teacher_data_path": folder / "teacher.jsonl", "max_new_tokens": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def teacher(folder):
    return load_model(folder / "model.pth")


@pytest.fixture(scope="module")
def said(teacher) -> list[tuple[str, bool]]:
    """What the teacher says to each question with the hint, asked alone: the text, and whether it came to an end."""
    model, tokenizer = teacher
    prompts = [tokenizer.encode_chat([question(i, "count up. ")], add_generation_prompt=True)[0] for i in range(N)]
    answers = [generate(model, [prompt], 16, tokenizer.end_of_turn)[0] for prompt in prompts]
    return [(tokenizer.decode(answer), len(answer) < 16) for answer in answers]


@pytest.fixture(scope="module")
def written(flags, folder):
    out = folder / "written.jsonl"
    return out, succeed(SCRIPT, out=out, **flags)


SAMPLED = {"temperature": 1, "num_samples": 3, "keep_unfinished": True}


@pytest.fixture(scope="module")
def sampled(flags, folder):
    out = folder / "sampled.jsonl"
    return out, succeed(SCRIPT, out=out, **flags, **SAMPLED)


# ---------------------------------------------------------------------------------------------- what the teacher has said


def test_the_student_s_question_is_followed_by_what_the_teacher_says_to_its_own(written, said):
    finished = [i for i, (text, ended) in enumerate(said) if ended and text.strip()]
    assert 10 < len(finished) < N
    assert read(written[0]) == [
        {"conversations": [question(i), {"role": "assistant", "content": said[i][0]}], "id": i} for i in finished]


def test_an_answer_without_an_end_is_left_out_and_counted_or_kept(written, said, flags, tmp_path):
    unfinished = sum(not ended for _, ended in said)
    empty = sum(ended and not text.strip() for text, ended in said)
    assert unfinished > 0
    assert f"wrote {N - unfinished - empty} of {N} answers; left out: {unfinished} no end within" in written[1]
    succeed(SCRIPT, out=tmp_path / "kept.jsonl", **flags, keep_unfinished=True)
    assert [row["conversations"][-1]["content"] for row in read(tmp_path / "kept.jsonl")] == [
        text for text, _ in said if text.strip()]


def test_an_answer_is_the_text_that_encodes_to_its_tokens_where_a_space_is_put_before_texts():
    ranks = {bytes([value]): 16 + value for value in range(256)}
    for prefix_space in (False, True):
        tokenizer = Tokenizer(PATTERN, SPECIAL_TOKENS, ranks, prefix_space=prefix_space)
        assert to_answer(tokenizer.encode("5 a"), tokenizer)[0] == "5 a"


def test_a_question_is_a_conversation_up_to_its_last_answer_or_to_its_end(flags, tmp_path):
    """One that leaves no room for an answer is left out and counted."""
    first = [question(1), {"role": "assistant", "content": "2"}]
    data = write(tmp_path / "mixed.jsonl", [
        {"conversations": first, "leaf": "sum"}, {"messages": [*first, question(2)]},
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "id": "a"},
        {"question": "1 " * 100}, {"question": "1 + 1"}])
    alone = flags | {"data_path": data, "teacher_data_path": None, "keep_unfinished": True}
    printed = succeed(SCRIPT, out=tmp_path / "out.jsonl", **alone)
    assert ("wrote 4 of 5 answers; left out: 1 the question fills the teacher's max_seq_len"
            in printed)
    rows = read(tmp_path / "out.jsonl")
    assert [row["conversations"][:-1] for row in rows] == [
        [question(1)], [*first, question(2)], [{"role": "user", "content": "Add.\n1 + 1"}],
        [{"role": "user", "content": "1 + 1"}]]
    assert [{key: row[key] for key in row if key != "conversations"} for row in rows] == [
        {"leaf": "sum"}, {}, {"id": "a"}, {}]


def test_samples_of_a_question_stand_together_and_are_not_all_the_same(sampled):
    rows = read(sampled[0])
    ids = [row["id"] for row in rows]
    assert ids == sorted(ids) and set(ids) == set(range(N)) and len(ids) > 2.5 * N      # a few have no words
    answers = {i: {row["conversations"][-1]["content"] for row in rows if row["id"] == i} for i in ids}
    assert sum(len(different) > 1 for different in answers.values()) > N / 2


def test_random_numbers_depend_on_the_seed_and_the_part_alone():
    seeds = [seed_of(seed, part)
             for part, seed in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3


def test_only_right_answers_are_kept_if_asked(said, flags, tmp_path):
    """Rows 0, 2, 4, ... have the teacher's own answer, with a space behind it, the others another one."""
    data = write(tmp_path / "gold.jsonl", [
        {"id": i, "conversations": [question(i), {"role": "assistant", "content": f"{text} " if i % 2 == 0 else "no"}]}
        for i, (text, _) in enumerate(said) if text.strip()])
    printed = write(tmp_path / "printed.jsonl", [
        {"question": question(i, "count up. ")["content"]} for i, (text, _) in enumerate(said) if text.strip()])
    pairs = flags | {"data_path": data, "teacher_data_path": printed, "only_right": True}
    printed = succeed(SCRIPT, out=tmp_path / "out.jsonl", **pairs)
    wrong = sum(ended and text.strip() != "" for text, ended in said[1::2])
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [
        i for i, (text, ended) in enumerate(said) if ended and text.strip() and i % 2 == 0]
    assert f"{wrong} not the file's final answer" in printed


def test_an_answer_is_left_out_if_it_is_empty_unfinished_or_not_the_gold_one(byte_tokenizer):
    tokenizer = byte_tokenizer()

    def what_becomes_of(text, finished=True, gold=None, keep=False):
        tokens = tokenizer.encode(text) + [tokenizer.end_of_turn] * finished
        task = Task(Question([], None, {}), [], gold)
        counts, rows = to_rows([task], [to_answer(tokens, tokenizer)], gold is not None, keep)
        assert len(rows) == counts["written"]
        return [key for key in ("written", "unfinished", "empty", "wrong") if counts[key]]

    assert what_becomes_of("5") == what_becomes_of("5", finished=False, keep=True) == ["written"]
    assert what_becomes_of("") == what_becomes_of(" \n") == ["empty"]
    assert what_becomes_of("5", finished=False) == ["unfinished"]
    assert what_becomes_of(" 5", gold="5 ") == ["written"]
    assert what_becomes_of(" 5", gold="6") == ["wrong"]


def test_a_right_answer_is_known_by_what_follows_the_thought_and_kept_once(byte_tokenizer):
    """Of two questions, five answers each: as in the file, the same again, in other words, by a wrong way, and wrong."""
    tokenizer, gold = byte_tokenizer(), "<think>two a\none b</think> c"
    other, detour, wrong, cut = (f"<think>{thought}" for thought in (
        "a, then b</think>  c", "two x\none y</think> c", "two a\none b</think> d", "two a\none b\nc"))
    tasks = [Task(Question([{"role": "user", "content": each}], gold, {}), [], gold) for each in "ab"]

    def what_becomes_of(texts, finished, only_right=True, keep_unfinished=False):
        answers = [to_answer(tokenizer.encode(text) + [tokenizer.end_of_turn] * finished, tokenizer) for text in texts] * 2
        found, rows = to_rows(tasks, answers, only_right, keep_unfinished)
        assert [row["conversations"][0]["content"] for row in rows] == sorted(row["conversations"][0]["content"] for row in rows)
        return found, [row["conversations"][-1]["content"] for row in rows if row["conversations"][0]["content"] == "a"]

    texts = [gold, gold, other, detour, wrong]
    found, kept = what_becomes_of(texts, finished=True)
    assert kept == [gold, other, detour] and (found["written"], found["repeated"], found["wrong"]) == (6, 2, 2)
    assert report(found, True) == ("6 of 10 answers, 80.0% right; left out: 2 not the file's final answer, 2 equal to a "
                                   "right answer before it to the same question")
    assert what_becomes_of(texts, finished=True, only_right=False)[1] == texts
    for keep_unfinished in (False, True):
        assert what_becomes_of([cut], finished=False, keep_unfinished=keep_unfinished)[1] == []


def test_the_command_that_is_printed_at_the_end_runs_and_leaves_the_teacher_as_it_was(written, folder):
    """Two steps of it: the student starts from the teacher's weights and learns all answers."""
    _, script, *words = shlex.split(written[1].splitlines()[-1].partition("Learn from them: ")[2])
    before = (folder / "model.pth").read_bytes()
    printed = succeed(script, *words, val_path="none",
                      **TINY | {"max_steps": 2, "batch_size": 4})
    assert f"{len(read(written[0]))} samples of {written[0]}" in printed
    assert f"from {folder}/model.pth" in printed and (folder / "written_sft/full_sft_32.pth").exists()
    assert (folder / "model.pth").read_bytes() == before


# ------------------------------------------------------------------------------------------------- however it came about


def test_two_processes_write_what_one_does(sampled, flags, tmp_path):
    printed = succeed(SCRIPT, out=tmp_path / "two.jsonl", processes=2, **flags, **SAMPLED)
    assert (tmp_path / "two.jsonl").read_bytes() == sampled[0].read_bytes()
    assert counts(printed) == counts(sampled[1])
    assert [path.name for path in tmp_path.iterdir()] == ["two.jsonl"]


def test_a_run_that_is_interrupted_within_a_part_resumes_to_the_file_of_an_unbroken_one(sampled, flags, tmp_path):
    out, parts = tmp_path / "ended.jsonl", tmp_path / "ended.jsonl.parts"
    running = start(SCRIPT, out=out, **flags, **SAMPLED)
    wait_until(lambda: len(list(parts.glob("part-*.json"))) >= 2)
    running.send(signal.SIGINT)
    ended, n_done = running.wait(), len(list(parts.glob("part-*.json")))
    assert ended.code == 130 and not out.exists() and 2 <= n_done < 16, ended.output
    assert f"{n_done} of 16 parts are saved. Resume with: python {SCRIPT}" in ended.output

    printed = complaint(SCRIPT, out=out, **flags, **SAMPLED | {"temperature": 0.5})
    assert f"{parts} holds parts of another file: --temperature was 1.0, is 0.5. " in printed
    printed = succeed(SCRIPT, out=out, **flags, **SAMPLED)
    assert f"{16 - n_done} of 16 parts are missing" in printed and counts(printed) == counts(sampled[1])
    assert out.read_bytes() == sampled[0].read_bytes() and not parts.exists()


def test_few_questions_are_one_batch_and_many_are_parts_of_eight_batches():
    """Answers: 20 of one batch of 64; 320 in 16 parts if the batch is 10; 1,600 of batches of 10 in parts of 80."""
    for n, batch_size, num_samples, n_parts in (
            (20, 64, 1, 1), (320, 10, 1, 16), (1600, 10, 1, 20), (400, 10, 4, 20), (3, 1, 8, 3)):
        slices = part_slices(n, batch_size, num_samples)
        assert len(slices) == n_parts and [i for each in slices for i in range(n)[each]] == list(range(n))


# --------------------------------------------------------------------------------------------------- behind an endpoint


@pytest.fixture(scope="module")
def served(folder):
    server = Server(f"big={folder}/model.pth")
    yield server
    server.stop()


def behind(url, flags, folder, **more):
    """The same flags with an endpoint instead of weights."""
    return flags | {"teacher": None, "dtype": None, "teacher_url": url, "teacher_model": "big",
                    "teacher_replies": folder / "replies.jsonl"} | more


def test_an_endpoint_s_answers_are_those_of_its_weights_and_no_question_is_sent_twice(written, flags, folder, tmp_path):
    mortal = Server(f"big={folder}/model.pth")
    far = behind(mortal.url, flags, tmp_path)
    printed = succeed(SCRIPT, out=tmp_path / "out.jsonl", **far)
    turns = [{"role": "assistant", "content": row["conversations"][1]["content"].strip()} for row in read(written[0])]
    assert read(tmp_path / "out.jsonl") == [{"conversations": [row["conversations"][0], turn], "id": row["id"]}
                                            for row, turn in zip(read(written[0]), turns, strict=True)]
    assert counts(printed) == counts(written[1]) and "--weights STUDENT --data_path" in printed
    mortal.stop()
    assert counts(succeed(SCRIPT, out=tmp_path / "again.jsonl", **far)) == counts(printed)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_an_interrupted_run_by_an_endpoint_resumes_to_the_file_of_two_processes(served, flags, tmp_path):
    far = behind(served.url, flags, tmp_path, teacher_parallel=1, limit=8, **SAMPLED)
    out, parts = tmp_path / "ended.jsonl", tmp_path / "ended.jsonl.parts"
    running = start(SCRIPT, out=out, **far)
    wait_until(lambda: list(parts.glob("part-*.json")))
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130 and not out.exists() and "parts are saved. Resume with" in ended.output
    succeed(SCRIPT, out=out, **far)
    fresh = behind(served.url, flags, tmp_path, teacher_replies=tmp_path / "others.jsonl", limit=8, **SAMPLED)
    succeed(SCRIPT, out=tmp_path / "unbroken.jsonl", processes=2, **fresh)
    assert out.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    sent = [sum(path.read_text().count("\n") for path in tmp_path.glob(f"{name}.jsonl*")) for name in ("replies", "others")]
    assert sent == [3 * 8, 3 * 8]
    assert len({row["conversations"][1]["content"] for row in read(out)}) > 8


@pytest.fixture
def runs(monkeypatch, flags, tmp_path):
    """runs(then, ...) -> what main() printed at its end, or why it stopped, by an endpoint that does `then`."""
    monkeypatch.setattr("signal.signal", lambda *_: None)       # pytest keeps its own
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    servers = []

    def run(then, **more):
        servers.append(Endpoint(then=then))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        given = behind(servers[0].url, flags, tmp_path, out=tmp_path / "out.jsonl", limit=6, **more)
        words = [[f"--{name}"] + [str(value)] * (value is not True) for name, value in given.items() if value is not None]
        monkeypatch.setattr("sys.argv", [SCRIPT, *sum(words, [])])
        try:
            main()
        except SystemExit as ended:
            return servers, ended.code

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def numbered(request) -> int:
    return int(re.search(r"is (\d+) plus", request["messages"][0]["content"])[1])


def test_failed_refused_and_unfinished_answers_are_left_out_and_counted(runs, tmp_path, capsys):
    def then(request):
        i, body = numbered(request), completion("five")
        body["choices"][0] |= {"finish_reason": "length" if i == 1 else "stop"}
        return (400, {"error": "too long"}) if i == 0 else (200, completion(None)) if i == 2 else (200, body)

    runs(then)
    printed = capsys.readouterr().out
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [3, 4, 5]
    assert "wrote 3 of 6 answers; left out: 1 no reply, 1 no end within --max_new_tokens" in printed
    assert "1 empty" in printed and "no reply to request" in printed and "too long" in printed
    (tmp_path / "out.jsonl").unlink()
    runs(then, keep_unfinished=True)
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [1, 3, 4, 5]


@pytest.mark.parametrize("then, more, reason", [
    ((401, {"error": "who are you?"}), {}, "401 .*who are you.*Check that it is up"),
    ((500, {"error": "oops"}), {"num_samples": 3, "temperature": 1, "teacher_parallel": 1}, "10 failed requests in a row"),
    (lambda request: (200, completion("five")), {"teacher_budget": 25, "teacher_parallel": 1}, "budget of 25 tokens is used"),
], ids=["no permission", "down", "no budget"])
def test_a_run_whose_endpoint_gives_up_says_why_keeps_its_parts_and_resumes(then, more, reason, runs, tmp_path, capsys):
    servers, code = runs(then, batch_size=1, **more)
    printed = capsys.readouterr().out
    assert code == 1 and re.search(f"stopped; big at 127.0.0.1: .*{reason}.*parts are saved. Resume with: ", printed)
    servers[0].then = lambda request: (200, completion("five"))
    runs(None, batch_size=1, **more | {"teacher_budget": 0})
    assert "wrote " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- what is refused


def test_rows_that_are_no_pair_are_named(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}])
    other = write(tmp_path / "other.jsonl", [{"question": "a", "answer": "1"}, {"question": "b", "answer": "3"}])
    longer = write(tmp_path / "longer.jsonl", [{"question": each} for each in "abc"])
    for path, more, reason in (
            (other, {}, f"row 2 of {one} and of {other} are no pair: the answer is '2' in the one, '3' in the other"),
            (longer, {}, f"{one} has 2 rows, {longer} 3: row by row they must hold the same questions")):
        with pytest.raises(ValueError, match=re.escape(reason)):
            read_tasks([one], [path])
    with pytest.raises(ValueError, match=f"{longer}, row 1 has no answer to compare the teacher's with"):
        read_tasks([longer], None, only_right=True)


def test_a_bad_line_on_one_side_takes_its_partner_with_it(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"question": each, "answer": each} for each in "abc"])
    other = write(tmp_path / "other.jsonl", [{"question": "A"}, {"title": "b"}, {"question": "C", "answer": "c"}])
    with pytest.raises(ValueError, match=f"{other}, line 2: no known format"):
        read_tasks([one], [other])
    tasks = read_tasks([one], [other], skip_bad_lines=True)
    assert [(task.question.messages[0]["content"], task.messages[0]["content"], task.gold) for task in tasks] == [
        ("a", "A", "a"), ("c", "C", "c")]


@pytest.mark.parametrize("more, reason", [
    ({"max_new_tokens": 0}, "--max_new_tokens 0 must be 1 or more"),
    ({"temperature": -1}, "--temperature -1.0 must be 0 or more"),
    ({"temperature": 1, "top_p": 0}, r"--top_p 0.0 must lie in (0, 1]"),
    ({"num_samples": 2}, "need a --temperature above 0"),
    ({"data_path": ["a", "b"]}, "--teacher_data_path names 1 files, --data_path 2; they are pairs"),
    ({"data_path": "none.jsonl"}, "no file at none.jsonl"),
    ({"teacher_url": "http://h/v1"}, "give either --teacher WEIGHTS or --teacher_url URL, and not both"),
    ({"teacher_url": "http://h/v1", "temperature": 1, "top_p": 0.8}, "an endpoint has its own settings"),
    ({"max_new_tokens": 1, "limit": 1}, "nothing to write: 0 of 1 answers; left out: 1 no end"),
])
def test_what_cannot_be_answered_says_why(more, reason, flags, tmp_path, monkeypatch, capsys):
    given = flags | {"out": tmp_path / "out.jsonl"} | more
    argv = [[f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            for name, value in given.items()]
    monkeypatch.setattr("sys.argv", [SCRIPT, *sum(argv, [])])
    monkeypatch.setattr("signal.signal", lambda *_: None)       # pytest keeps its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert reason in f"{capsys.readouterr().err}{ended.value.code}"
    assert not list(tmp_path.iterdir())
