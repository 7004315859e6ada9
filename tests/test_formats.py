"""
数据格式的规律：每种公开格式都读成同一种消息，坏行连同位置一起报告。
Laws of dataset/formats.py: every public format becomes the same messages, and a bad line is named.
"""

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from dataset.formats import (BadLine, category, files_of, final_answer, read_each, read_questions,
                             read_rows, to_messages, to_question, to_text)
from dataset.lm_dataset import SFTDataset
from evaluation.exam import read_exam
from evaluation.metrics import read_tests
from model.tokenizer import Tokenizer
from runtime.args import COLUMNS

SUM = [{"role": "user", "content": "2 + 3 ="}, {"role": "assistant", "content": "5"}]
PAGE = (Path(__file__).resolve().parents[1] / "dataset/dataset.md").read_text(encoding="utf-8")
CHOICE = [{"role": "user", "content": "2 + 3 =\nA. 4\nB. 5\nC. 6\nD. 23"},
          {"role": "assistant", "content": "5"}]
GOOD_LINE = json.dumps({"conversations": SUM})


def turns(roles, key="conversations"):
    """"sua" as a row: system, user, assistant, each turn with its own position as content."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {key: [{"role": names[r], "content": f"{r}{i}"} for i, r in enumerate(roles)]}


def read_conversations(path, skip_bad_lines=False, log=print):
    return read_each(path, to_messages, skip_bad_lines, log)


def contents(row):
    return [message["content"] for message in to_messages(row)]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- formats -----------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [
    {"conversations": SUM},
    {"messages": SUM, "id": 7},
    {"conversations": [{"from": "human", "value": "2 + 3 ="}, {"from": "gpt", "value": "5"}]},
    {"instruction": "2 + 3 =", "input": "", "output": "5"},
    {"instruction": "", "input": "2 + 3 =", "output": "5", "system": "", "history": []},
    {"question": "2 + 3 =", "answer": "5"},
    {"prompt": "2 + 3 =", "response": "5"},
    {"ask": "2 + 3 =", "output": "5"},
    {"prompt": "2 + 3 =", "completion": "5"},
    {"messages": SUM, "tools": "[]", "system_prompt": ""},
])
def test_every_format_gives_the_same_conversation(row):
    assert to_messages(row) == SUM


def test_the_examples_of_the_page_are_what_the_code_reads():
    examples = re.findall(r"\| `(\{.+\})` \|$", PAGE, flags=re.MULTILINE)
    assert [to_messages(json.loads(example)) for example in examples] == [SUM] * 5


def test_the_exam_of_the_page_are_what_the_code_reads(tmp_path):
    exam, = re.findall(r"```csv\n(.+?)```", PAGE, flags=re.DOTALL)
    assert read_conversations(written(tmp_path, "a.csv", exam)) == [CHOICE]


def test_an_alpaca_input_goes_below_its_instruction_and_the_system_goes_first():
    row = {"instruction": "Add.", "input": "2 + 3", "output": "5", "system": "Be brief."}
    assert contents(row) == ["Be brief.", "Add.\n2 + 3", "5"]


def test_a_choice_is_answered_by_the_text_of_the_right_option():
    row = {"id": "q1", "question": "2 + 3 =", "options": {"A": "4", "B": "5"}, "answer_idx": "B"}
    assert contents(row) == ["2 + 3 =\nA. 4\nB. 5", "5"]


@pytest.mark.parametrize("content", [
    "id,question,A,B,C,D,answer,explanation\n0,2 + 3 =,4,5,6,23,B,count on\n",
    ",Question,A,B,C,D,Answer\n0,2 + 3 =,4,5,6,23,B\n",
    "answer,d,c,b,a,question\nb,23,6,5,4,2 + 3 =\n",
], ids=["C-Eval", "CMMLU", "in any order"])
def test_an_exam_in_csv_is_a_choice(tmp_path, content):
    assert read_conversations(written(tmp_path, "exam.csv", content)) == [CHOICE]


def test_an_exam_row_without_its_answer_is_a_question_but_no_training_row(tmp_path):
    path = written(tmp_path, "test.csv", "id,question,A,B,C,D,answer\n7,2 + 3 =,4,5,6,23,\n")
    assert read_questions(path) == [(CHOICE[:1], None, {"id": "7"})]
    with pytest.raises(BadLine,
                       match=r"line 2: options without 'answer_idx' \(in CSV: with an empty"):
        read_conversations(path)


@pytest.mark.parametrize("record, reason", [
    ("2 + 3 =,4,5,6,23,E", "answer_idx is 'E', which is none of the options"),
    ("2 + 3 =,4,5,6,B", "5 cells .*, where the header has 6"),
    (",4,5,6,23,B", "question is empty"),
])
def test_a_bad_record_of_an_exam_is_named(tmp_path, record, reason):
    with pytest.raises(BadLine, match=f"line 2: {reason}"):
        read_conversations(written(tmp_path, "exam.csv", f"question,A,B,C,D,answer\n{record}\n"))


@pytest.mark.parametrize("text, final", [
    ("Ann has 2 + 3 = <<2+3=5>>5 cats.\n#### 5", "5"),
    ("#### 4\nNo:\n#### 5 \n", "5"),
    (" five\ncats ", "five cats"),
    ("five ####", "five ####"),
    ("<think>\n#### 4\n</think>\n\n5", "5"),
])
def test_the_final_answer_stands_after_the_last_four_hashes_or_is_all_there_is(text, final):
    assert final_answer(text) == final


def test_a_sum_in_words_is_learned_whole_and_comes_to_its_last_number():
    row = {"question": "Ann has 2 cats, Bob 3. All?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    assert contents(row) == [row["question"], row["answer"]]
    assert final_answer(contents(row)[1]) == "5"


# ---- the law of a conversation -----------------------------------------------------------------

def test_a_trailing_user_turn_is_dropped_since_nothing_is_learned_from_it():
    assert contents(turns("suau")) == ["s0", "u1", "a2"]


@pytest.mark.parametrize("row, asked, answer, others", [
    ({"question": "2 + 3 =", "answer": "5", "id": 7}, ["2 + 3 ="], "5", {"id": 7}),
    ({"question": "2 + 3 =", "id": 7}, ["2 + 3 ="], None, {"id": 7}),
    ({"instruction": "Add.", "input": "2 + 3", "leaf": "sum"}, ["Add.\n2 + 3"], None,
     {"leaf": "sum"}),
    ({"question": "2 + 3 =", "options": {"A": "4", "B": "5"}, "answer_idx": "B"},
     ["2 + 3 =\nA. 4\nB. 5"], "5", {}),
    ({"question": "2 + 3 =", "options": {"A": "4", "B": "5"}}, ["2 + 3 =\nA. 4\nB. 5"], None, {}),
    ({"messages": [{"role": "user", "content": "a"}], "answer": "of another lesson"}, ["a"], None,
     {"answer": "of another lesson"}),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                        {"from": "gpt", "value": "b"}]},
     ["s", "a"], "b", {}),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                        {"from": "human", "value": "c"}]},
     ["a", "b", "c"], None, {}),
])
def test_a_question_ends_where_its_last_answer_begins_or_is_missing(row, asked, answer, others):
    question = to_question(row)
    assert [message["content"] for message in question.messages] == asked
    assert question.messages[-1]["role"] == "user"
    assert (question.answer, question.others) == (answer, others)


@pytest.mark.parametrize("row, reason", [
    ({"conversations": []}, "no turn of the user"),
    ({"conversations": [{"role": "system", "content": "s"}]}, "no turn of the user"),
    ({"conversations": [{"role": "assistant", "content": "a"}]},
     "has role assistant, expected user"),
    ({"question": "a", "answer": " "}, "empty assistant turn"),
    ({"question": "a", "options": {"A": "b"}, "answer_idx": None}, "answer_idx is None"),
    ({"options": {"A": "b"}}, "question is None"),
    ({"answer": "5"}, "no known format"),
])
def test_a_row_without_a_question_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        to_question(row)


def test_a_question_that_is_left_out_keeps_its_place(tmp_path):
    path = written(tmp_path, "a.jsonl", f'{GOOD_LINE}\nbad\n\n{{"question": "a"}}\n')
    first, bad, last = read_questions(path, skip_bad_lines=True, log=lambda line: None)
    assert (first.answer, bad, last.answer) == ("5", None, None)


def test_a_later_user_turn_may_be_empty_but_the_first_may_not():
    row = turns("uaua")
    row["conversations"][2]["content"] = ""
    assert contents(row) == ["u0", "a1", "", "a3"]

    row["conversations"][0]["content"] = " "
    with pytest.raises(ValueError, match=r"conversations\[0\] is an empty user turn"):
        to_messages(row)


def test_an_empty_system_turn_is_no_system_turn():
    row = turns("sua")
    row["conversations"][0]["content"] = ""
    assert contents(row) == ["u1", "a2"]


@pytest.mark.parametrize("roles, reason", [
    ("a", r"conversations\[0\] has role assistant, expected user"),
    ("uua", r"conversations\[1\] has role user, expected assistant"),
    ("uaa", r"conversations\[2\] has role assistant, expected user"),
    ("usa", r"conversations\[1\] is a system turn, which may only come first"),
    ("u", "no turn of the assistant"),
    ("s", "no turn of the assistant"),
    ("", "no turn of the assistant"),
])
def test_turns_that_do_not_alternate_are_refused_with_their_place(roles, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(turns(roles))


@pytest.mark.parametrize("row", [
    {"system": "s", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    {"system_prompt": "s", "messages": turns("ua")["conversations"]},
    {"messages": [{"role": "developer", "content": "s"}, *turns("ua")["conversations"]]},
    {"system_prompt": "s", "question": "u", "answer": "a"},
    {"system": "s", "question": "u", "options": {"A": "a"}, "answer_idx": "A"},
])
def test_the_system_text_beside_a_conversation_or_a_question_is_its_system_turn(row):
    messages = to_messages(row)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"][0] == "s" and "system" not in to_question(row).others


@pytest.mark.parametrize("marks, learned", [
    (({"weight": 0}, {"weight": 1}), "a3"), (({"train": False}, {}), "a3"), (({}, {"loss": 0}), "a1"),
    (({"weight": 1.0}, {"loss": None}), "a1 a3"), (({"weight": 1, "train": False}, {}), "a3"),
])
def test_a_turn_of_weight_0_is_context_and_none_of_its_tokens_a_target(marks, learned):
    row = turns("uaua", key="messages")
    for turn, keys in zip(row["messages"][1::2], marks):
        turn |= keys
    messages = to_messages(row)
    assert contents(row) == ["u0", "a1", "u2", "a3"] and to_messages({"messages": messages}) == messages
    tokenizer = Tokenizer.load()
    ids, targets = tokenizer.encode_chat(messages)
    found = tokenizer.decode(i for i, target in zip(ids, targets) if target)
    assert found == "".join(f"{answer}<|im_end|>" for answer in learned.split())


def test_the_answers_of_a_conversational_prompt_are_context():
    row = {"prompt": turns("sua")["conversations"] + [{"role": "user", "content": "u3"}],
           "completion": [{"role": "assistant", "content": "a4"}]}
    assert [message["content"] for message in to_messages(row)
            if message["role"] == "assistant" and message.get("train", True)] == ["a4"]
    assert to_question({"prompt": row["prompt"]}).answer is None


def test_reasoning_content_is_the_thought_of_its_answer():
    row = {"messages": [SUM[0], {**SUM[1], "reasoning_content": "two and three"}]}
    assert contents(row)[1] == "<think>\ntwo and three\n</think>\n\n5"


def test_an_input_beside_options_is_part_of_the_question():
    row = {"question": "Add.", "input": "2 + 3 =", "options": {"A": "4", "B": "5"}, "answer_idx": "B"}
    assert contents(row) == ["Add.\n2 + 3 =\nA. 4\nB. 5", "5"]


@pytest.mark.parametrize("row, reason", [
    ({"messages": SUM, "conversations": SUM}, "both 'conversations' and 'messages' are there"),
    ({"messages": [{"role": "system", "content": "b"}, *SUM], "system": "a"}, r"messages\[0\] is a system turn"),
    ({"messages": SUM, "tools": [{"name": "w"}]}, "the row has tools, and calls of tools are not read"),
    ({"messages": [SUM[0], {**SUM[1], "tool_calls": [{"id": "1"}]}]}, r"messages\[1\] has tool_calls, and calls"),
    ({"messages": [SUM[0], {"role": "tool", "content": "5"}]}, "has role 'tool'"),
    ({"messages": [SUM[0], {**SUM[1], "weight": 0.5}]}, r"messages\[1\] has \[0.5\] as weight/train/loss; a turn is context"),
    ({"messages": [SUM[0], {**SUM[1], "loss": False}]}, "no turn of the assistant is to be learned"),
    ({"messages": [SUM[0], {**SUM[1], "content": [{"type": "image_url"}]}]}, r"messages\[1\] has the part {'type': 'image_url'"),
    ({"messages": [SUM[0], {**SUM[1], "content": [{"type": "text", "text": 5}]}]}, r"messages\[1\]: a part is 5, not a string"),
    ({"messages": [SUM[0], {**SUM[1], "reasoning_content": 5}]}, r"messages\[1\]: reasoning_content is 5, not a string"),
    ({"messages": "[{]"}, r"messages is '\[\{\]', not a list of turns"),
    ({"question": "a", "prompt": "b", "options": {"A": "a"}, "answer_idx": "A"}, "both 'question' and 'prompt'"),
    ({"question": "a", "options": {"A": "a"}, "answer_idx": "A", "history": [["a", "b"]]}, "history is not read"),
    ({"question": "a", "options": {"A": "a"}, "answer_idx": []}, r"answer_idx is \[\], which is none"),
])
def test_a_key_that_carries_meaning_is_honoured_or_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(row)


@pytest.mark.parametrize("row, reason", [
    ({"foo": 1, "bar": 2}, r"no known format \(keys found: \['foo', 'bar'\]; dataset/dataset.md"),
    ({"conversations": "hi"}, "conversations is 'hi', not a list of turns"),
    ({"conversations": ["hi"]}, r"conversations\[0\] is 'hi', not a turn"),
    ({"conversations": [{"who": "user"}]}, r"conversations\[0\] is .*not a turn"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, r"has role 'robot' \(known: system, user"),
    ({"conversations": [{"from": [], "value": "hi"}]}, r"has role \[\] \(known: system, user"),
    ({"messages": [SUM[0], {"role": "assistant", "content": None}]},
     r"messages\[1\] is None, not a str"),
    ({"messages": [SUM[0], {"role": "assistant", "content": " "}]},
     r"messages\[1\] is an empty assistant"),
    ({"question": "2 + 3 =", "answer": 5}, "answer is 5, not a string"),
    ({"question": "", "answer": "5"}, "question is an empty user turn"),
    ({"question": "2 + 3 =", "answer": "5", "output": "five"},
     "both 'output' and 'answer' are there"),
    ({"instruction": "And 4?", "output": "9", "history": [["2 + 3 =", "5"]]},
     "history is not read"),
    ({"question": "2 + 3 =", "options": {"A": "5"}}, "options without 'answer_idx'"),
    ({"question": "2 + 3 =", "options": {"A": "5"}, "answer_idx": "B"},
     "'B', which is none of the options"),
    ({"question": "2 + 3 =", "options": ["5"], "answer_idx": "A"}, r"options is \['5'\], not an"),
    ({"question": "2 + 3 =", "options": {"A": 5}, "answer_idx": "A"}, r"options\['A'\] is 5, not"),
])
def test_a_row_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(row)


def test_a_huge_value_is_shortened_in_the_reason():
    with pytest.raises(ValueError) as error:
        to_messages({"conversations": "x" * 1_000_000})
    assert len(str(error.value)) < 120


def test_half_a_surrogate_pair_is_refused_because_no_tokenizer_can_encode_it():
    row = json.loads(r'{"text": "a\ud800"}')
    with pytest.raises(ValueError, match=r"text holds '\\ud800' at character 1"):
        to_text(row)


@pytest.mark.parametrize("row", [{}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": 5}])
def test_a_text_row_holds_text(row):
    with pytest.raises(ValueError, match="text"):
        to_text(row)


# ---- files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", GOOD_LINE + "\n"),
    ("no_final_newline.jsonl", "\n" + GOOD_LINE),
    ("windows.jsonl", GOOD_LINE + "\r\n\r\n"),
    ("mark.jsonl", "\ufeff" + GOOD_LINE),
    ("lines_named.json", GOOD_LINE + "\n"),
    ("list.json", f" [\n{GOOD_LINE}\n]"),
    ("mark.json", f"\ufeff[{GOOD_LINE}]"),
    ("object.json", f'{{"data": [\n{GOOD_LINE}]}}'),
    ("rows_named.json", f'{{"messages": {json.dumps(SUM)}}}'),
    ("typed.csv", "\ufeffQuestion, Answer \r\n2 + 3 =,5\r\n,\r\n"),
    ("semicolons.csv", "question;answer\n2 + 3 =;5\n"),
    ("tabs.tsv", "id\tQuestion\tAnswer\n7\t2 + 3 =\t5\n"),
])
def test_every_kind_of_file_gives_the_same_conversation(tmp_path, name, content):
    assert read_conversations(written(tmp_path, name, content)) == [SUM]


@pytest.mark.parametrize("name, content", [
    ("a.csv", "Ticket;Customer message;Agent reply;system\n7;2 + 3 =;5;Windows\n"),
    ("a.tsv", "prompt\tCustomer message\tAgent reply\n-\t2 + 3 =\t5\n"),
    ("a.jsonl", '{"answer": "?", "customer message": "2 + 3 =", "agent reply": "5"}'),
    ("known.jsonl", GOOD_LINE),                         # none of these columns: a validation file
])
def test_named_columns_are_read_and_no_others(tmp_path, monkeypatch, name, content):
    monkeypatch.setenv(COLUMNS, "question=customer message\nanswer=Agent reply")
    assert read_conversations(written(tmp_path, name, content)) == [SUM]


def test_a_named_column_that_is_missing_stops_a_table_and_is_a_bad_line_of_json(tmp_path, monkeypatch):
    monkeypatch.setenv(COLUMNS, "question=message\nanswer=replay")
    path = written(tmp_path, "a.csv", "message,reply\n2 + 3 =,5\n")
    with pytest.raises(BadLine, match="a.csv: --columns names 'replay', and the columns are message, reply$"):
        read_conversations(path, skip_bad_lines=True)
    path = written(tmp_path, "a.jsonl", '{"message": "a", "replay": "b"}\n{"message": "a"}\n')
    with pytest.raises(BadLine, match="line 2: --columns names 'replay', and the columns are message. Fix"):
        read_conversations(path)
    assert len(read_conversations(path, skip_bad_lines=True)) == 1


def test_tokens_of_the_same_file_under_other_columns_are_others(tmp_path, monkeypatch):
    path = written(tmp_path, "a.csv", "ask,formal,short\n2 + 3 =,It is five,5\n")
    found = []
    for answer in ("formal", "short"):
        monkeypatch.setenv(COLUMNS, f"question=ask\nanswer={answer}")
        found.append(SFTDataset([path], Tokenizer.load(), log=str).stream.tolist())
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_a_file_in_gb18030_is_named_as_such_even_when_skipping(tmp_path, name):
    text = {"a.csv": "question,answer\n2 + 3 =,5\n二加三等于几？,五\n", "a.txt": "二加三等于五。"}.get(
        name, json.dumps([{"question": "二加三？", "answer": "五"}], ensure_ascii=False))
    text = text.strip("[]") if name == "a.jsonl" else text
    path = written(tmp_path, name, text.encode("gb18030"))
    with pytest.raises(BadLine, match=f"{name} is GB18030, not UTF-8. Convert it: iconv -f GB18030 -t UTF-8 "):
        read_conversations(path, skip_bad_lines=True)
    path.write_bytes(path.read_bytes().decode("gb18030").encode())
    read_each(path, lambda row: row)


@pytest.mark.parametrize("content", [
    "question,answer\n二加三？,五\n".encode() + "三加三？,六\n".encode("gb18030"),     # one line of two
    "question,answer\n2 + 3 =,f\u00fcnf\n".encode("latin-1"),
], ids=["a damaged line", "German"])
def test_other_bytes_that_are_not_utf8_are_bad_lines(tmp_path, content):
    with pytest.raises(BadLine, match="is not UTF-8"):
        read_conversations(written(tmp_path, "a.csv", content))


def test_an_empty_cell_is_a_question_for_the_teacher_but_no_training_row(tmp_path):
    path = written(tmp_path, "a.csv", "question,answer\n2 + 3 =,5\n2 + 3 =,\n")
    assert [question.answer for question in read_questions(path)] == ["5", None]
    with pytest.raises(BadLine, match="line 3: answer is an empty assistant turn"):
        read_conversations(path)


def test_a_blank_line_ends_a_paragraph_and_a_paragraph_is_numbered_by_its_first_line(tmp_path):
    path = written(tmp_path, "story.txt", "\nOnce\nthere was\n\n \nThe end")
    assert list(read_rows(path)) == [(2, {"text": "Once\nthere was"}), (6, {"text": "The end"})]
    assert read_each(path, to_text) == ["Once\nthere was", "The end"]


def test_where_lines_endoftext_stand_a_blank_line_is_part_of_the_text(tmp_path):
    path = written(tmp_path, "stories.txt",
                   "\nOnce\n\nthere was.\n<|endoftext|>\n\nThe end\n<|endoftext|>\n")
    assert list(read_rows(path)) == [(2, {"text": "Once\n\nthere was."}), (7, {"text": "The end"})]


def test_a_csv_record_over_two_lines_is_numbered_by_its_first(tmp_path):
    path = written(tmp_path, "a.csv", 'prompt,output\n"one\ntwo",three\nfour,five\n')
    assert [number for number, _ in read_rows(path)] == [2, 4]


def test_a_bad_line_names_file_line_value_and_the_way_out(tmp_path):
    robot = GOOD_LINE.replace("assistant", "robot")
    path = written(tmp_path, "sft.jsonl", f"{GOOD_LINE}\n\n{robot}\n")
    with pytest.raises(BadLine) as error:
        read_conversations(path)
    assert str(error.value) == (
        f"{path}, line 3: conversations[1] has role 'robot' (known: system, user, human, "
        "assistant, gpt, developer). Fix the line, or pass --skip_bad_lines to leave it out.")


@pytest.mark.parametrize("name, content, reason", [
    ("cut.jsonl", GOOD_LINE[:-3], "line 1: not a whole JSON object"),
    ("two.jsonl", GOOD_LINE + GOOD_LINE, "line 1: not a whole JSON object: Extra data"),
    ("number.jsonl", "5", "line 1: 5 is not a JSON object"),
    pytest.param("deep.jsonl", "[" * 100_000, "line 1: JSON that is not read", id="deep"),
    pytest.param("long.jsonl", "9" * 5_000, "line 1: ", id="long"),
    ("byte.jsonl", b'{"question": "\xba", "answer": "5"}', r"line 1: question holds '\\udcba'"),
    ("byte.csv", b"question,answer\n\xba,5", r"line 2: .* is not UTF-8"),
    ("story.txt", "Once", r"line 1: no known format .* only text is for train_pretrain\.py"),
    ("item.json", f"[{GOOD_LINE}, 5]", "item 2: .* Fix the item"),
    ("cut.json", "[" + GOOD_LINE, "cut.json: Expecting .*: line 1 column .* read completely or not at all"),
    ("keys.jsonl", '{"question": "a", "answer": "b", "answer": "c"}', "line 1: .* the key 'answer' stands twice in {"),
    ("keys.json", '[{"question": "a", "answer": "b", "answer": "c"}]', "keys.json: the key 'answer' stands twice"),
    ("twice.csv", "ask,output,Ask\n1,2,3\n", "line 1: two columns are called 'ask'"),
    ("cells.csv", "question,answer\n1,2,3\n", "line 2: 3 cells .*, where the header has 2"),
    ("quote.csv", 'question,answer\n1,2\n"3,4\n5,6\n', "line 3: not a CSV record"),
])
def test_a_damaged_file_is_refused_where_the_damage_is(tmp_path, name, content, reason):
    with pytest.raises(BadLine, match=reason):
        read_conversations(written(tmp_path, name, content))


def test_skipped_lines_are_counted_and_the_first_three_are_told(tmp_path):
    path = written(tmp_path, "a.jsonl", f"{GOOD_LINE}\nbad\n{{}}\n5\nbad\n{GOOD_LINE}\n")
    lines = []
    assert read_conversations(path, skip_bad_lines=True, log=lines.append) == [SUM, SUM]
    (line,) = lines
    assert line.startswith(f"{path}: left out 4 of 6 lines. line 2: not a whole JSON object")
    assert "; line 3: no known format" in line and "; line 4: 5 is not" in line
    assert "line 5" not in line


def test_a_file_of_good_lines_is_read_in_silence(tmp_path):
    lines = []
    read_conversations(written(tmp_path, "a.jsonl", GOOD_LINE), skip_bad_lines=True,
                       log=lines.append)
    assert lines == []


@pytest.mark.parametrize("name, content, reason", [
    ("a.jsonl", "", "is empty"),
    ("a.json", "[]", "is empty"),
    ("a.csv", "question,answer\n", "is empty"),
    ("a.txt", "\n\n", "is empty"),
    ("a.jsonl", "bad\nbad\n", "none of its 2 lines is good. line 1: not a whole"),
    ("a.bin", "\x00\x01", r"not a kind of file that is read here\. Convert it to \.jsonl"),
])
def test_a_file_with_nothing_to_learn_is_an_error_even_when_skipping(tmp_path, name, content,
                                                                     reason):
    with pytest.raises(ValueError, match=reason):
        read_conversations(written(tmp_path, name, content), skip_bad_lines=True)


def test_a_folder_is_its_readable_files_by_name_and_a_file_is_itself(tmp_path):
    for name in ("b.csv", "a.JSONL", "c.txt", "notes.md", ".hidden.json"):
        written(tmp_path, name, GOOD_LINE)
    (tmp_path / "d.json").mkdir()
    assert [file.name for file in files_of(tmp_path)] == ["a.JSONL", "b.csv", "c.txt"]
    # named by its owner: read_rows decides
    assert files_of(str(tmp_path / "notes.md")) == [tmp_path / "notes.md"]


def test_a_folder_with_nothing_to_read_is_an_error_that_names_what_is_read(tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError,
                       match=r"no file in .* is one of \.jsonl, \.json, \.csv, \.tsv, \.txt\. Subfolders are"):
        files_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere. Check the path"):
        files_of(tmp_path / "nowhere")


@pytest.mark.parametrize("more, name", [
    ({"leaf": "math/sum", "category": "math", "subject": "sums", "meta_info": "m"}, "math/sum"),
    ({"meta_info": "m", "subject": "sums", "category": "math"}, "math"),
    ({"meta_info": "m", "subject": "sums", "leaf": ""}, "sums"),
    ({"meta_info": "m", "subject": None}, "m"), ({"meta_info": "m", "department": "内科"}, "内科"),
    ({"meta_info": {"source": "m"}}, "exam"),
    ({}, "exam"),
])
def test_a_row_is_about_its_leaf_category_subject_or_meta_info_or_else_its_file(more, name):
    assert category({"conversations": SUM} | more, default="exam") == name


def test_a_missing_file_of_ours_ends_with_the_command_that_makes_it():
    ours = Path(__file__).resolve().parents[1] / "dataset" / "nowhere.jsonl"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl.* python dataset/miniworld\.py$"):
        read_conversations(ours)
    with pytest.raises(FileNotFoundError, match="^no file at theirs.jsonl. Check the path.$"):
        read_each("theirs.jsonl", to_text)


def test_reading_costs_little_more_than_parsing_the_json(tmp_path):
    path = written(tmp_path, "a.jsonl", (GOOD_LINE + "\n") * 4_000)

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    parsing = min(seconds(lambda: [json.loads(line) for line in open(path)]) for _ in range(3))
    reading = min(seconds(lambda: read_conversations(path)) for _ in range(3))
    assert reading < 5 * parsing


# ---- mutations ---------------------------------------------------------------------------------

KINDS = [
    {"conversations": SUM, "system": "s", "tools": None, "id": 7},
    {"messages": [SUM[0], {**SUM[1], "reasoning_content": "c", "weight": 1}], "meta_info": {"a": [1]}},
    {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": []},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b", "tool_calls": []}]},
    {"messages": json.dumps(SUM)},
    {"prompt": SUM[:1], "completion": SUM[1:]},
    {"question": "a", "options": {"A": "b", "B": "c"}, "answer_idx": "B", "leaf": "x/y", "input": "d"},
    {"text": "One two three."},
    {"question": "a", "distribution": {"b": 0.5, "c": 0.5}, "conversations": SUM[:1]},
]
CSV = b'id,question,A,B,C,D,answer\n0,"2 + 3\n=",4,5,6,23,B\n1,1 + 1 =,1,2,3,4,\n'
ODD = [None, True, 0, 2, -1.5, 1e400, "", " ", "\ud800", "x" * 300, [], {}, [None], [[]], {"a": {}}, ["a"], [{"type": "text"}],
       [{"role": "user"}], [{"role": [], "content": {}}], "[", "[1]", '[{"role": 1}]', {"": ""}]


def mutated(row, generator):
    """A row with one place changed: another value, key or type, a turn twice or left out."""
    row = json.loads(json.dumps(row))
    places = []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(row)
    holder, key = generator.choice(places)
    match generator.randrange(5):
        case 0:
            holder[key] = generator.choice(ODD)
        case 1:
            del holder[key]
        case 2 if isinstance(holder, dict):
            holder[generator.choice(["role", "from", "value", "messages", "options", "weight", "system", "tools", "train"])] = holder[key]
        case 3 if isinstance(holder, list):
            holder.insert(key, holder[key])
        case _:
            holder[key] = {str(i): holder[key] for i in range(2)} if generator.random() < 0.5 else [holder[key]]
    return row


def test_of_600_mutated_rows_each_is_read_or_named_with_its_place(tmp_path):
    """Also bytes of the line are changed: flipped, doubled, cut."""
    generator, counts = random.Random(0), Counter()
    for n in range(600):
        row = generator.choice(KINDS)
        line = CSV if n % 8 == 0 else json.dumps(mutated(row, generator) if n % 4 else row).encode()
        if n % 4 == 0:
            at = generator.randrange(len(line))
            middle = generator.choice([bytes([generator.randrange(256)]), b"", line[at:at + 9] * 2, b'"', b"\xff", b"["])
            line = line[:at] + middle + line[at + generator.randrange(2):]
        name = "rows.csv" if n % 8 == 0 else generator.choice(["rows.jsonl", "rows.json", "list.json"])
        path = written(tmp_path, name, b"[%s]" % line if name == "list.json" else line)
        for read in (read_conversations, read_questions, read_exam_of, lambda path: read_tests([path]),
                     lambda path: read_each(path, to_text)):
            try:
                read(path)
                counts["read"] += 1
            except ValueError as error:
                counts["named"] += 1
                assert str(path) in str(error), error
    print(f"600 mutated rows, {counts['read']:,} times read, {counts['named']:,} times named, 0 tracebacks")
    assert counts.total() == 5 * 600 and counts["read"] > 300


def read_exam_of(path):
    return read_exam([path])
