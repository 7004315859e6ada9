"""
考试的规律：选最可能的选项，自由作答按最终答案判分，宏平均可以手算。
Laws of evaluation/exam.py: of options the likeliest is chosen, of free answers the final one
counts, and macro averages are what a calculation by hand gives.
"""

import json

import numpy as np
import pytest
import torch

from dataset.formats import BadLine, is_right, to_messages
from evaluation.exam import ExamQuestion, answer, chrf, grade, read_exam, token_f1
from evaluation.metrics import measure
from evaluation.scores import score, score_answers
from model.config import LMConfig
from model.generate import generate
from model.transformer import Transformer


def question_of(question, gold="ok", options=None, category="all"):
    return ExamQuestion([{"role": "user", "content": question}], gold, options, category)


def exam_file(folder, *rows, name="exam.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer()


@pytest.fixture(scope="module")
def parrot(tokenizer):
    """A model that answers "ok " to every question. A prompt ends in a line end, and all
    that the model looks at is the last byte: after a line end it writes o, then k, then a space,
    then the end of the turn."""
    follows = {"\n": "o", "o": "k", "k": " "}
    pairs = [(16 + ord(now), 16 + ord(then)) for now, then in follows.items()]
    pairs.append((16 + ord(" "), tokenizer.end_of_turn))
    V = tokenizer.vocab_size
    model = Transformer(LMConfig(dim=V, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=V,
                                 max_seq_len=80,
                                 norm_eps=0.0, tie_embeddings=False)).eval()
    with torch.no_grad():
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].ffn.w2.weight.zero_()
        model.tok_embeddings.weight.copy_(torch.eye(V))
        model.output.weight.zero_()
        for now, then in pairs:
            model.output.weight[then, now] = 1.0
    return model


# ---- questions ---------------------------------------------------------------------------------

def test_a_question_is_what_a_student_learns_from_up_to_the_answer(tmp_path):
    rows = [{"question": "2 + 3 =", "options": {"A": "4", "B": "5"}, "answer_idx": "B",
             "meta_info": "sum"},
            {"conversations": [{"role": role, "content": text} for role, text in
                               [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"),
                                ("assistant", "b")]],
             "options": "of another lesson", "leaf": "talk"}]
    choice, talk = read_exam([exam_file(tmp_path, *rows)])
    for question, row in zip((choice, talk), rows):
        answered = [*question.messages, {"role": "assistant", "content": question.gold}]
        assert answered == to_messages(row)
    assert choice[1:] == ("5", ["4", "5"], "sum") and talk[1:] == ("b", None, "talk")


def test_an_exam_is_all_files_of_a_folder_less_what_has_no_answer(tmp_path):
    (tmp_path / "b.csv").write_text("question,A,B,C,D,answer\n2 + 3 =,4,5,6,23,B\n1 + 1 =,1,2,3,4,\n")
    exam_file(tmp_path, {"question": "u", "answer": "a"}, {"question": "v"}, name="a.jsonl")
    questions = read_exam([tmp_path])
    assert [(one.gold, one.category) for one in questions] == [("a", "a"), ("5", "b")]


def test_a_limit_draws_of_all_files_by_the_seed_and_keeps_their_order(tmp_path):
    paths = [exam_file(tmp_path,
                       *({"question": "u", "answer": str(i)} for i in range(start, start + 50)),
                       name=f"{start}.jsonl") for start in (0, 50)]
    sampled = [[int(question.gold) for question in read_exam(paths, limit=20, seed=seed)]
               for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2] and len(set(sampled[0])) == 20
    assert sampled[0] == sorted(sampled[0])
    assert sampled[0][0] < 50 <= sampled[0][-1]
    assert [len(read_exam(paths, limit=limit)) for limit in (0, 100, 101)] == [100] * 3


def test_an_exam_that_cannot_be_graded_says_so(tmp_path):
    path = exam_file(tmp_path, {"question": "u"}, {"question": "v"})
    with pytest.raises(ValueError,
                       match=r"exam\.jsonl: none of the 2 questions has an answer to grade by"):
        read_exam([path])
    path = exam_file(tmp_path, {"question": "u", "answer": "a"}, {"answer": "a"})
    with pytest.raises(BadLine, match=r"exam\.jsonl, line 2: no known format"):
        read_exam([path])
    lines = []
    assert len(read_exam([path], skip_bad_lines=True, log=lines.append)) == 1
    assert "left out 1 of 2 lines" in lines[0]


# ---- answers -----------------------------------------------------------------------------------

def test_a_free_answer_is_what_greedy_decoding_writes_up_to_the_end_of_turn(parrot, tokenizer):
    assert answer(parrot, tokenizer, [question_of("a"), question_of("b c")],
                  max_new_tokens=9) == ["ok", "ok"]
    assert answer(parrot, tokenizer, [question_of("a")], max_new_tokens=1) == ["o"]


def test_the_likeliest_option_is_chosen_wherever_it_stands(parrot, tokenizer):
    # Each byte that is not the parrot's own costs it some 16 nats: "ok" one (it expects a space),
    # "no" and "on" three.
    for options in (["no", "ok", "on"], ["ok", "on", "no"], ["on", "no", "ok"]):
        assert answer(parrot, tokenizer, [question_of("a", options=options)],
                      max_new_tokens=1) == ["ok"]


def test_options_are_weighed_after_the_prompt_that_the_student_learns_from(tiny, tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size, max_seq_len=80)

    def likeliest(question, options):
        talks = [[{"role": "user", "content": question}, {"role": "assistant", "content": option}]
                 for option in options]
        return max(zip(score(model, tokenizer, talks), options), key=lambda pair: pair[0].log_p)[1]

    options = [[chr(97 + i), chr(98 + i), chr(99 + i)] for i in range(20)]
    lettered = [f"{i}?\nA. {a}\nB. {b}\nC. {c}" for i, (a, b, c) in enumerate(options)]
    chosen = [likeliest(question, three) for question, three in zip(lettered, options)]
    assert chosen != [likeliest(question.split("\n")[0], three)
                      for question, three in zip(lettered, options)]
    questions = [question_of(question, options=three) for question, three in zip(lettered, options)]
    assert answer(model, tokenizer, questions, max_new_tokens=1) == chosen


def test_answers_stand_in_the_order_of_the_questions(tiny, tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size, max_seq_len=80)
    questions = [question_of("longer than the next"), question_of("x", options=["p", "q"]),
                 question_of("y"), question_of("zz", options=["r", "s"]), question_of("one more")]
    alone = [answer(model, tokenizer, [one], max_new_tokens=6)[0] for one in questions]
    assert len(set(alone)) == 5
    assert answer(model, tokenizer, questions, max_new_tokens=6) == alone
    prompts = [tokenizer.encode_chat(questions[i].messages, add_generation_prompt=True)[0]
               for i in (0, 2, 4)]
    words = generate(model, prompts, 6, tokenizer.end_of_turn)
    assert [alone[i] for i in (0, 2, 4)] == [tokenizer.decode(ids).strip() for ids in words]


def test_what_does_not_fit_is_answered_by_nothing_and_the_rest_as_ever(parrot, tokenizer):
    # The frame of a question takes 8 + 11 tokens: start user \n ... end \n, start assistant \n. 61
    # more fill the 80.
    frame = len(tokenizer.encode_chat(question_of("").messages, add_generation_prompt=True)[0])
    assert frame == 19
    full, one_left = question_of("q" * 61), question_of("q" * 60)
    assert answer(parrot, tokenizer, [full, question_of("a"), one_left],
                  max_new_tokens=9) == ["", "ok", "o"]
    # An option adds itself, the end of turn and a line end, which the model need not read: 19 + 58
    # + 2 + 2 - 1 = 80.
    fits = question_of("q" * 58, options=["ok", "no"])
    over = question_of("q" * 58, options=["ok", "not"])
    assert answer(parrot, tokenizer, [over, fits], max_new_tokens=9) == ["", "ok"]
    assert answer(parrot, tokenizer, [], max_new_tokens=9) == []
    assert grade(["", "ok", "o"],
                 [full, question_of("a"), one_left]).score == pytest.approx(1 / 3)


# ---- grades ------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, gold, right", [
    ("5", "5", True),
    ("5", "2 + 3 = <<2+3=5>>5\n#### 5", True),
    ("1 + 4 is\n#### 5 ", "#### 5", True),
    (" New\n York", "New York", True),
    ("NewYork", "New York", False),
    ("2 + 3 = 5", "#### 5", False),
    ("", "5", False),
    ("", "####", False),
])
def test_an_answer_is_right_if_it_comes_to_the_same(given, gold, right):
    assert is_right(given, gold) is right


def test_macro_averages_are_over_the_places_that_are_right_somewhere():
    # Five questions with different options; gold is A A B C A, given A B B D and nothing.
    #       given  gold  both     precision  recall  F1
    #   A     1      3     1           1        1/3   1/2
    #   B     2      1     1          1/2        1    2/3
    #   C     0      1     0           0         0     0        D is never gold, so it is no class
    options = [[f"{letter}{i}" for letter in "abcd"] for i in range(5)]
    questions = [question_of("?", f"{right}{i}", options[i]) for i, right in enumerate("aabca")]
    grades = grade(["a0", "b1", "b2", "d3", ""], questions)
    assert list(grades.metrics) == ["accuracy", "precision", "recall", "f1"]
    assert list(grades.metrics.values()) == pytest.approx([2 / 5, 1 / 2, 4 / 9, 7 / 18])


def test_without_options_each_final_answer_is_a_class():
    #          given  right  both     precision  recall  F1
    #   5        3      2     2          2/3        1    4/5
    #   x y      0      1     0           0         0     0     "" is none of the classes
    #   7        1      1     1           1         1     1
    questions = [question_of("?", gold) for gold in ("so\n#### 5", "5", "x  y", "7", "x y")]
    grades = grade(["5", "thus #### 5", "5", "7", ""], questions)
    assert list(grades.metrics.values()) == pytest.approx(
        [3 / 5, (2 / 3 + 0 + 1) / 3, (1 + 0 + 1) / 3, (4 / 5 + 0 + 1) / 3])


@pytest.mark.parametrize("given, gold, f1", [
    ("每日服两次。", "每日两次", 2 * 4 / 9),             # a character is a word, 。 is none
    ("take take 2 mg", "Take 2.", 2 * 2 / 6),           # the second take finds no partner
    ("so 5\n#### take 2", "take 2", 1.0), ("", "take 2", 0.0), ("rest", "take 2", 0.0)])
def test_a_texts_token_f1_is_what_it_has_in_common_with_the_gold_one(given, gold, f1):
    assert token_f1(given, gold) == pytest.approx(f1)


@pytest.mark.parametrize("given, gold, score", [
    ("abc", "abd", 7 / 18),             # P = R = (2/3 + 1/2 + 0) / 3
    ("ab", "abc", 14 / 33),             # P = (1 + 1 + 0) / 3, R = (2/3 + 1/2 + 0) / 3; 5 P R / (4 P + R)
    ("a b c", "abc", 1.0), ("多喝水", "多喝茶", 7 / 18), ("xyz", "abc", 0.0), ("", "abc", 0.0)])
def test_chrf_is_what_its_character_n_grams_have_in_common_with_the_gold_ones(given, gold, score):
    assert chrf(given, gold) == pytest.approx(score)


def test_a_test_file_has_exact_match_of_short_answers_and_token_f1_and_chrf_of_texts(parrot, tokenizer):
    def conversation(gold):
        return {"messages": [*question_of("a").messages, {"role": "assistant", "content": gold}], "leaf": "all"}

    text = "ok a b c d e f g h i j"                                     # the parrot answers "ok"
    tests = {"conversations": [], "choices": [], "distributions": [], "texts": []}
    found = [measure(parrot, tokenizer, tests | {"conversations": list(map(conversation, golds))})
             for golds in (["ok ", "no", text], ["ok "], [text])]
    assert [each.get("exact_match") for each in found] == [50, 100, None]
    assert [each.get("token_f1") for each in found] == [pytest.approx(100 / 6), None, pytest.approx(100 / 6)]
    p, r = 2 / 6, (2 / 12 + 1 / 11) / 6             # o k, ok; the text has 12 letters and 11 pairs
    assert found[2]["chrf"] == pytest.approx(100 * 5 * p * r / (4 * p + r))


def test_options_count_by_their_text_or_per_token_and_may_stand_in_the_question(tokenizer):
    """A model that knows nothing gives each token the same probability: the shortest option has the
    largest log-probability, and per token none is ahead of another."""
    model = Transformer(LMConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size, max_seq_len=64)).eval()
    torch.nn.init.zeros_(model.tok_embeddings.weight)
    row = {"question": "a?", "options": {"A": "long text", "B": "b"}, "answer_idx": "B"}
    asked = [([{"role": "user", "content": "a?"}], ["long text", "b"])]
    (long, short), = score_answers(model, tokenizer, asked)
    (each, same), = score_answers(model, tokenizer, asked, per_token=True)
    n = tokenizer.vocab_size
    assert (long, short) == pytest.approx((-10 * np.log(n), -2 * np.log(n))) and each == pytest.approx(same)
    tests = {"conversations": [], "choices": [row], "distributions": [], "texts": []}
    assert measure(model, tokenizer, tests)["multiple_choice"] == 100
    read = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(len(kwargs["tokens"])), with_kwargs=True)
    for listed in (False, True):
        measure(model, tokenizer, tests, listed=listed)
    assert read[1] - read[0] == 2 * len("\nA. long text\nB. b")      # bytes, for each of two options


def test_a_text_is_graded_by_its_token_f1_and_a_short_answer_by_equality():
    """Ten words are a short answer. In a mixed exam each metric is of its own questions."""
    ten, text = " ".join("abcdefghij"), "多喝水，注意休息，三天后复诊。"        # 12 characters
    questions = [question_of("?", ten, category="short"), question_of("?", text, category="long"),
                 question_of("?", text, [text, ten], "choice")]
    grades = grade([f"{ten} k", "多喝水休息", text], questions)
    assert grades.by_category == {"choice": 1.0, "long": pytest.approx(10 / 17), "short": 0.0}
    assert grades.metrics["accuracy"] == 1 / 2
    assert grades.metrics["token_f1"] == grades.by_category["long"]
    assert grades.score == pytest.approx((1 + 10 / 17) / 3)
    assert list(grade(["多喝水"], questions[1:2]).metrics) == ["token_f1"]


def test_each_category_has_a_score_of_its_own():
    questions = [question_of("?", category="sums"), question_of("?", category="days"),
                 question_of("?", category="sums")]
    grades = grade(["ok", "no", "no"], questions)
    assert grades.by_category == {"days": 0.0, "sums": 0.5}
    assert list(grades.by_category) == ["days", "sums"]


def test_an_exam_without_mistakes_has_nothing_but_ones():
    questions = [question_of("?", "a", ["a", "b"]), question_of("?", "b", ["a", "b"]),
                 question_of("?", "free", None, "other")]
    ones = dict.fromkeys(("accuracy", "precision", "recall", "f1"), 1.0)
    assert grade(["a", "b", "free"], questions) == (ones, 1.0, {"all": 1.0, "other": 1.0})


def test_answers_and_questions_of_unlike_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        grade(["ok"], [question_of("a"), question_of("b")])
