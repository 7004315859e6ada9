"""
各步的规律：回复读得懂就读对、读不懂就说明原因；弱叶多出题；两个代理都同意才留下；几个进程都写出同样的字节。
Laws of the steps of the ability tree: a reply is read correctly or rejected with a reason, weak
leaves get more questions, a question is kept if two agents agree, and any number of processes
writes the same bytes.
"""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from ability_tree.agents import divided
from ability_tree.create_initial_tree import grow
from ability_tree.generate_distill_data import (Wanted, largest_remainder, new_question, plan,
                                                seeds_of_leaves, write_part)
from ability_tree.prompts import PROMPTS
from ability_tree.steps import read_abilities, table
from ability_tree.tree import AbilityTree
from ability_tree.validate import reason_to_reject, solve
from helpers_run import complaint, run, start, succeed
from runtime.files import write_jsonl
from runtime.processes import World

JSON, MINIWORLD = PROMPTS["json"], PROMPTS["miniworld"]
WHICH = "Which organ pumps blood?"
ROW = {"question": WHICH, "options": {"A": "liver", "B": "heart", "C": "skin", "D": "lung"},
       "answer_idx": "B"}
ADD, SUB = ("world", "math", "add"), ("world", "math", "sub")
ALONE = World(0, 1, "cpu")


class Scripted:
    """An agent whose request that holds a key gets the key's replies in turn, the last for ever."""

    name = "scripted"

    def __init__(self, replies: dict):
        self.replies = {key: [texts] if isinstance(texts, str) else list(texts)
                        for key, texts in replies.items()}
        self.requests = []

    def generate(self, conversations, max_new_tokens=8, temperature=0.0, seed=0):
        replies = []
        for [message] in conversations:
            self.requests.append(message["content"])
            texts = next(self.replies[key] for key in self.replies if key in message["content"])
            replies.append(texts.pop(0) if len(texts) > 1 else texts[0])
        return replies


def add_row(number, a, b):
    options = {"A": str(a + b), "B": str(a + b + 1)}
    return {"id": f"s{number}", "question": f"what is {a} plus {b}?", "options": options,
            "answer_idx": "A"}


def write(path, rows) -> Path:
    write_jsonl(path, rows)
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- replies ------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply", [
    json.dumps(ROW),
    f"Sure! Here it is:\n```json\n{json.dumps(ROW, indent=2)}\n```\nI hope it helps {{you}}.",
    f"<think>{{\"question\": \"no\", \"options\": [\"x\", \"y\"]}}</think>\n{json.dumps(ROW)}",
    json.dumps({"question": WHICH, "options": ["liver", "heart", "skin", "lung"],
                "answer_idx": "Heart."}),
], ids=["plain", "fenced", "thought", "list"])
def test_one_question_is_read_from_each_form_that_models_give_it(reply):
    assert JSON.read_question(reply) == ROW


@pytest.mark.parametrize("reply, reason", [
    ("I would rather not.", "no JSON object with a question"),
    (json.dumps(ROW)[:-20], "no JSON object with a question"),
    (json.dumps(ROW | {"question": " "}), "no question"),
    (json.dumps(ROW | {"options": {"A": "heart"}}), "no options"),
    (json.dumps(ROW | {"options": ["heart", "Heart "]}), "an option occurs twice"),
    (json.dumps(ROW | {"options": ["heart", ["lung"]]}), "an option is no text"),
    (json.dumps(ROW | {"answer_idx": "E"}), "the answer is none of the options"),
    ('{"question": "Which?", "options": ["x", "y"]}', "the answer is none of the options"),
    (json.dumps(ROW | {"options": {"1": "heart", "2": "lung"}}), "no options"),
    (json.dumps(ROW | {"question": "Which \ufffd?"}), "half a character"),
])
def test_a_question_that_cannot_be_used_is_refused_with_a_reason_to_count_by(reply, reason):
    with pytest.raises(ValueError) as refused:
        JSON.read_question(reply)
    assert str(refused.value).partition(":")[0] == reason


@pytest.mark.parametrize("reply", [
    '{"answer": "C"}', "C", "(c).", "**C**", "C. skin", "skin", "答案是C。", '{"answer": "Skin"}',
    "It is not A, so the answer is (C).", "<think>The answer is A</think> The answer is C",
    "The answer is A. No: Answer: C"])
def test_an_answer_is_read_from_each_form_that_models_give_it(reply):
    assert JSON.read_letter(reply, ROW) == "C"


def test_an_answer_that_names_no_option_is_refused_and_not_guessed():
    for reply in ("", "E", '{"answer": "E"}', "A heart or a lung", "The answer is a secret", "{"):
        with pytest.raises(ValueError, match="none of the options"):
            JSON.read_letter(reply, ROW)


def test_an_option_whose_text_is_a_small_letter_is_that_option():
    """"b" is the text of C; the letter B would be another answer."""
    row = {"question": "what comes next: z a", "options": {"A": "x", "B": "a", "C": "b"},
           "answer_idx": "C"}
    assert JSON.read_letter("b", row) == MINIWORLD.read_letter("b", row) == "C"
    assert JSON.read_letter("B", row) == "B"


def test_whatever_a_reply_is_it_is_read_or_refused():
    """Each beginning of a good reply, noise of its characters, and very deep brackets."""
    draw, whole = Random(0), json.dumps(ROW)
    replies = [whole[:size] for size in range(len(whole))] + ["[" * 10_000, '{"a":' * 5_000]
    replies += ["".join(draw.choices('{}[]":,\\ABa1\n', k=30)) for _ in range(200)]
    readers = [prompts_of for prompts in (JSON, MINIWORLD) for prompts_of in (
        prompts.read_names, prompts.read_question,
        lambda reply, prompts=prompts: prompts.read_leaf(reply, [ADD, SUB]),
        lambda reply, prompts=prompts: prompts.read_letter(reply, ROW))]
    for reply in replies:
        for reader in readers:
            try:
                reader(reply)
            except ValueError as error:
                assert 0 < len(str(error).partition(":")[0]) < 40


def test_names_are_read_once_each():
    for reply in ('["heart",  "lung ", "Heart"]', '[1] says: ["heart", "lung"]'):
        assert JSON.read_names(reply) == ["heart", "lung"]


def test_an_empty_list_means_that_an_ability_has_no_parts_and_an_empty_reply_means_nothing():
    assert JSON.read_names("[]") == MINIWORLD.read_names("none") == []
    assert MINIWORLD.read_names("add, sub,mul") == ["add", "sub", "mul"]
    for prompts in (JSON, MINIWORLD):
        with pytest.raises(ValueError, match="no list of names"):
            prompts.read_names("")


def test_a_leaf_is_named_by_its_number_and_by_the_tiny_teacher_by_its_path():
    for reply in ('{"leaf": 2}', "2"):
        assert JSON.read_leaf(reply, [ADD, SUB]) == SUB
    assert MINIWORLD.read_leaf("math/sub", [ADD, SUB]) == SUB
    for reply in ('{"leaf": 0}', "3", "math"):
        with pytest.raises(ValueError, match="no leaf of the tree"):
            JSON.read_leaf(reply, [ADD, SUB])


def test_the_tiny_teachers_lines_are_those_it_is_trained_on():
    assert MINIWORLD.write(ADD, [ROW])[0]["content"] == "new question: math/add"
    row = MINIWORLD.read_question("what is 3 plus 4? => 7")
    assert row == {"question": "what is 3 plus 4?", "options": {"A": "7"}, "answer_idx": "A"}
    assert MINIWORLD.solve(row) == [{"role": "user", "content": "what is 3 plus 4?"}]
    for reply in ("what is 3 plus 4? 7", "3 => 4 => 7", "=> 7", "what? =>"):
        with pytest.raises(ValueError, match="no question => answer"):
            MINIWORLD.read_question(reply)


# ---- first tree ---------------------------------------------------------------------------------

def grown(agent) -> tuple[list, list]:
    """(leaves of "world" after two levels of at most two parts, rejected replies)"""
    tree = AbilityTree.from_paths([("world",)])
    generate = divided(agent, ALONE, 16, 64, 0.7)
    rejected = grow(tree, generate, JSON, depth=2, breadth=2, max_tries=2, seed=0)
    return list(tree.leaves()), rejected


def test_a_domain_is_divided_level_by_level():
    """A third part is one too many; "World" would be a part of itself; "words" has no parts."""
    agent = Scripted({"> math": '["add", "ADD", "World", "sub"]', "> words": "[]",
                      "Ability: world": '["math", "words", "more"]'})
    assert grown(agent) == ([ADD, SUB, ("world", "words")], []) and len(agent.requests) == 3


def test_an_ability_whose_replies_cannot_be_read_is_requested_again_and_then_stays_a_leaf():
    leaves, rejected = grown(Scripted({"> math": ["sorry", '["add", "sub"]'], "> words": "sorry",
                                       "Ability: world": '["math", "words"]'}))
    assert leaves == [ADD, SUB, ("world", "words")]
    assert [(each["leaf"], each["reply"]) for each in rejected] == [
        ("world / math", "sorry"), ("world / words", "sorry"), ("world / words", "sorry")]


def test_a_tree_of_ability_files_has_their_paths(tmp_path):
    rows = [{"id": i, "ability_path": list(path)} for i, path in enumerate((ADD, SUB))]
    files, out = write(tmp_path / "a.jsonl", rows), tmp_path / "tree.json"
    output = succeed("ability_tree/create_initial_tree.py", ability_files=files, out=out)
    assert "2 leaves" in output
    assert list(AbilityTree.load(out).leaves()) == [ADD, SUB]
    assert "exists already" in complaint("ability_tree/create_initial_tree.py", out=out,
                                         ability_files=files)


# ---- new questions ------------------------------------------------------------------------------

def test_what_is_left_of_a_division_goes_to_the_largest_remainders():
    # 2.0, 1.2, 0.8
    assert largest_remainder({"a": 0.5, "b": 0.3, "c": 0.2}, 4) == {"a": 2, "b": 1, "c": 1}
    assert largest_remainder({"a": 1, "b": 1, "c": 1}, 2) == {"a": 1, "b": 1, "c": 0}
    for n in range(50):
        assert sum(largest_remainder({leaf: 1 / (leaf + 1) for leaf in range(7)}, n).values()) == n


def counts(tree, seeds, floor=0.0, writes_wrong_options=False):
    planned = plan(tree.weights(floor=floor), seeds, 10, writes_wrong_options)
    return {each.leaf: each.n for each in planned}


def test_a_leaf_gets_questions_by_its_weakness():
    """0 of 8: posterior (0 + 1) / (8 + 2) = 0.1, weakness 0.9; 8 of 8: 0.1; so nine to one."""
    tree = AbilityTree.from_paths([ADD, SUB])
    tree.update([(ADD, False)] * 8 + [(SUB, True)] * 8, round=0)
    seeds = {leaf: [add_row(n, n, n) for n in range(4)] for leaf in (ADD, SUB)}
    assert counts(tree, seeds) == {ADD: 9, SUB: 1}
    assert counts(tree, seeds, floor=1.0) == {ADD: 5, SUB: 5}


def test_a_leaf_without_answers_to_complete_options_gets_no_share_unless_the_teacher_writes_them():
    tree = AbilityTree.from_paths([ADD, SUB])
    seeds = {ADD: [add_row(n, n, n) for n in range(4)], SUB: [add_row(4, 4, 4)]}
    assert counts(tree, seeds) == {ADD: 10}
    assert counts(tree, seeds, writes_wrong_options=True) == {ADD: 5, SUB: 5}
    with pytest.raises(ValueError, match="no leaf has seed questions with 4 different answers"):
        counts(tree, dict.fromkeys((ADD, SUB), seeds[SUB]))


def test_seed_questions_are_joined_to_leaves_on_their_ids():
    rows = [add_row(1, 1, 1), add_row(2, 2, 2), add_row(3, 3, 3)]
    abilities = {"s1": ADD, "s2": ("World", "math", "ADD"), "s3": ("world", "math")}
    seeds = seeds_of_leaves(rows, abilities, [ADD, SUB])
    assert seeds == {ADD: rows[:2], SUB: []}
    with pytest.raises(ValueError, match="2 of 2 seed questions belong to no leaf"):
        seeds_of_leaves(rows[1:], {"s3": ("world", "math")}, [ADD, SUB])


def test_wrong_options_are_answers_of_the_same_leaf_and_the_right_one_stands_anywhere():
    wanted, places = Wanted(ADD, 1, [], ["2", "4", "6", "7", "8"]), Counter()
    for seed in range(40):
        row = new_question("what is 3 plus 4? => 7", wanted, set(), MINIWORLD, Random(seed))
        assert row["options"][row["answer_idx"]] == "7" and list(row["options"]) == list("ABCD")
        wrong = set(row["options"].values()) - {"7"}
        assert len(wrong) == 3 and wrong < {"2", "4", "6", "8"}
        places[row["answer_idx"]] += 1
    assert set(places) == set("ABCD") and row["meta_info"] == "math/add"


def test_the_teachers_own_options_stay_and_too_few_are_refused():
    new = new_question(json.dumps(ROW), Wanted(ADD, 1, [], ["9"]), set(), JSON, Random(0))
    assert set(new["options"].values()) == set(ROW["options"].values())
    assert new["options"][new["answer_idx"]] == "heart"
    with pytest.raises(ValueError, match="too few options: 2 of 4"):
        new_question(json.dumps(ROW | {"options": {"A": "lung", "B": "heart"}}),
                     Wanted(ADD, 1, [], ["9"]), set(), JSON, Random(0))


def test_a_question_that_is_known_is_not_written_again_whatever_its_case_and_spaces():
    reply = "What is  3 plus 4? => 7"
    with pytest.raises(ValueError, match="^a repetition: What"):
        new_question(reply, Wanted(ADD, 1, [], ["7", "8"]), {"what is 3 plus 4?"}, MINIWORLD,
                     Random(0))


def test_what_is_missing_is_requested_again_but_no_more_than_max_tries_each():
    """Three wanted: "new 1", again, and nonsense; the second try gives "new 2" and nonsense."""
    agent = Scripted({"new question": ["new 1 => 2", "new 1 => 2", "?", "new 2 => 4", ""]})
    done = write_part(agent.generate, MINIWORLD, [Wanted(ADD, 3, [], list("2468"))], {"old"}, 0,
                      max_tries=2, seed=0)
    assert [row["question"] for row in done["rows"]["world / math / add"]] == ["new 1", "new 2"]
    assert [each["reason"].partition(":")[0] for each in done["rejected"]] == [
        "a repetition", "no question => answer", "no reply"]


def test_the_teacher_sees_real_questions_of_the_leaf_and_of_no_other():
    agent = Scripted({"Write": "no"})
    seeds, other = [add_row(n, n, n) for n in range(1, 6)], add_row(9, 50, 50)
    wanted = [Wanted(ADD, 2, seeds, []), Wanted(SUB, 1, [other], [])]
    write_part(agent.generate, JSON, wanted, set(), 0, max_tries=1, seed=0)
    shown = [{row["id"] for row in [*seeds, other] if row["question"] in text}
             for text in agent.requests]
    assert [len(ids) for ids in shown] == [3, 3, 1] and shown[2] == {"s9"}
    assert shown[0] | shown[1] <= {f"s{n}" for n in range(6)} and shown[0] != shown[1]


# ---- validation ---------------------------------------------------------------------------------

def test_a_question_is_kept_when_both_agents_give_its_answer():
    assert reason_to_reject("B", [("B", None), ("B", None)]) is None
    for a, b, reason in [("B", "C", "another answer of agent_b: C, not B"),
                         ("C", "B", "another answer of agent_a: C, not B"),
                         ("C", "D", "another answer of agent_a and agent_b: C and D, not B")]:
        assert reason_to_reject("B", [(a, None), (b, None)]) == reason
    gone = reason_to_reject("B", [("B", None), (None, "no reply: gone")])
    assert gone == "agent_b no reply: gone"


def test_an_empty_reply_and_nonsense_are_no_answer():
    agent = Scripted({"1?": "", "2?": "perhaps", "3?": '{"answer": "D"}'})
    rows = [ROW | {"question": f"{n}?"} for n in (1, 2, 3)]
    letters, problems = zip(*solve(agent, JSON, rows, max_new_tokens=8))
    assert letters == (None, None, "D")
    assert [text.partition(":")[0] for text in problems[:2]] == [
        "no reply", "the answer is none of the options"]


# ---- runs ---------------------------------------------------------------------------------------

# A step with made-up agents, whose replies depend on the call's seed, as with weights. One that
# divides an ability names four parts, or in one of five cases writes two lines. A teacher writes a
# sum, in one of five cases without an arrow; one of ten is wrong. SPENT=sub: no budget for sub.
STEP = """
import os
from random import Random
from ability_tree import steps, {name} as step
from runtime.endpoint import OutOfBudget

class Fake:
    def __init__(self, role):
        self.name, self.role = role, role

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        if os.environ.get("SPENT", "never") in conversations[0][0]["content"]:
            raise OutOfBudget("the budget is used")
        random = Random(seed)
        return [self.reply(message["content"], random) for [message] in conversations]

    def reply(self, text, random):
        if text.startswith("parts of: "):
            names = ", ".join(f"part {{random.randint(1, 99)}}" for _ in range(4))
            return names if random.random() < 0.8 else "part 1\\npart 2"
        if text.startswith("new question: "):
            sign = {{"add": 1, "sub": -1}}[text.rpartition("/")[2]]
            a, b = random.randint(1, 99), random.randint(1, 99)
            answer = a + sign * b + (random.random() < 0.1)
            question = f"{{a}} {{'+' if sign > 0 else '-'}} {{b}} = ?"
            return question + (f" => {{answer}}" if random.random() < 0.8 else "")
        a, sign, b = text.split()[:3]
        answer = int(a) + int(b) if sign == "+" else int(a) - int(b)
        return str(answer + (self.role == "agent_b" and answer % 7 == 0))

step.make_agent = lambda flags, role, device: Fake(role)
steps.identity_of = lambda flags, role: role
step.main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tree of two leaves, add weaker than sub, their seed questions, and these steps."""
    folder = tmp_path_factory.mktemp("ability")
    tree = AbilityTree.from_paths([ADD, SUB])
    tree.update([(ADD, False)] * 4 + [(SUB, i < 2) for i in range(4)], round=0)
    tree.save(folder / "tree.json")
    texts = [f"{n} {sign} 1 = ?" for sign in "+-" for n in range(5)]
    write(folder / "seeds.jsonl", [
        {"id": f"s{n}", "question": text, "options": {"A": str(n % 5), "B": str(n % 5 + 100)},
         "answer_idx": "A"} for n, text in enumerate(texts)])
    write(folder / "abilities.jsonl", [{"id": f"s{n}", "ability_path": ADD if n < 5 else SUB}
                                       for n in range(10)])
    for name in ("create_initial_tree", "generate_distill_data", "validate"):
        (folder / f"{name}.py").write_text(STEP.format(name=name))
    return folder


def generate_flags(world, **flags):
    return dict(tree=world / "tree.json", questions=world / "seeds.jsonl", floor=0, seed=1,
                abilities=world / "abilities.jsonl", prompts="miniworld", n_samples=200,
                max_tries=6) | flags


def files_of(out) -> list[bytes]:
    names = (f"{out.stem}{end}.jsonl" for end in ("", "_ability", "_rejected"))
    return [out.with_name(name).read_bytes() for name in names]


def rejects_of(out) -> list[dict]:
    return read(out.with_name(f"{out.stem}_rejected.jsonl"))


def abilities_of(out) -> dict:
    return read_abilities([out.with_name(f"{out.stem}_ability.jsonl")])


@pytest.fixture(scope="module")
def written(world):
    out = world / "distill.jsonl"
    output = succeed(str(world / "generate_distill_data.py"), out=out, **generate_flags(world))
    return out, output


def test_new_questions_are_whole_rows_with_their_abilities(written):
    """Weakness 5/6 and 1/2: shares 0.625 and 0.375 of 200."""
    out, output = written
    rows, paths = read(out), abilities_of(out)
    assert Counter(paths.values()) == {ADD: 125, SUB: 75} and "wrote 200 questions" in output
    assert [row["id"] for row in rows] == [f"distill-{n:05d}" for n in range(200)] == list(paths)
    assert len({row["question"] for row in rows}) == 200
    for row in rows:
        assert (paths[row["id"]] == ADD) == ("+" in row["question"])
        assert len(set(row["options"].values())) == 4


def test_the_counts_of_each_leaf_are_printed_and_add_up(written):
    out, output = written
    rejected = rejects_of(out)
    for leaf, wanted in (("world / math / add", 125), ("world / math / sub", 75), ("all", 200)):
        line = next(line for line in output.splitlines() if line.startswith(leaf))
        planned, kept, *reasons = line.removeprefix(leaf).split(maxsplit=2)
        assert int(planned) == int(kept) == wanted
        n_rejected = sum(map(int, re.findall(r"\d+", " ".join(reasons))))
        assert n_rejected == sum(leaf in (each["leaf"], "all") for each in rejected)
    kinds = {each["reason"].partition(":")[0] for each in rejected}
    assert kinds <= {"no question => answer", "a repetition"}


def test_two_processes_write_the_bytes_of_one(world, written):
    out = world / "two" / "distill.jsonl"
    out.parent.mkdir()
    step = str(world / "generate_distill_data.py")
    ended = start(step, out=out, processes=2, **generate_flags(world)).wait()
    assert ended.code == 0, ended.output
    assert files_of(out) == files_of(written[0])


def test_a_run_whose_budget_was_used_resumes_to_the_same_bytes(world, written):
    out, step = world / "again" / "distill.jsonl", str(world / "generate_distill_data.py")
    out.parent.mkdir()
    stopped = run(step, out=out, variables={"SPENT": "math/sub"}, **generate_flags(world))
    assert stopped.code == 1 and not out.exists()
    assert "stopped; the budget is used. 1 of 2 parts are saved" in stopped.output
    assert "--seed was 1, is 2" in complaint(step, out=out, **generate_flags(world, seed=2))
    succeed(step, out=out, **generate_flags(world))
    assert files_of(out) == files_of(written[0]) and not Path(f"{out}.parts").exists()


def test_questions_of_an_exam_are_not_written(world, written):
    """In any format: here, as conversations."""
    exam, out = [row["question"] for row in read(written[0])[:50]], world / "clean.jsonl"
    files = write(world / "exam.jsonl", [
        {"conversations": [{"role": "user", "content": text},
                           {"role": "assistant", "content": "?"}]} for text in exam])
    flags = generate_flags(world, exclude=files)
    succeed(str(world / "generate_distill_data.py"), out=out, **flags)
    assert not {row["question"] for row in read(out)} & set(exam)


def test_two_processes_divide_a_domain_as_one_does(world):
    """1 + 4 + 16 + 64 requests at most: the last level is four calls of the agent."""
    one, two = (world / f"tree{processes}.json" for processes in (1, 2))
    for processes, out in ((1, one), (2, two)):
        ended = start(str(world / "create_initial_tree.py"), domain="world", depth=4, max_tries=2,
                      prompts="miniworld", out=out, processes=processes).wait()
        assert ended.code == 0, ended.output
    assert one.read_bytes() == two.read_bytes() and rejects_of(one) == rejects_of(two)
    assert len(AbilityTree.load(one).leaves()) > 40


def test_validation_keeps_what_both_agents_answer_with_any_number_of_processes(world, written):
    """agent_b is wrong about multiples of 7; about a tenth of the questions has a wrong answer."""
    questions, out = written[0], {}
    abilities = questions.with_name("distill_ability.jsonl")
    for processes in (1, 2):
        out[processes] = world / f"valid{processes}" / "valid.jsonl"
        out[processes].parent.mkdir()
        ended = start(str(world / "validate.py"), questions=questions, abilities=abilities,
                      prompts="miniworld", out=out[processes], processes=processes).wait()
        assert ended.code == 0, ended.output
    assert files_of(out[1]) == files_of(out[2])

    def is_kept(row):
        answer = eval(row["question"].removesuffix(" = ?"))
        return row["options"][row["answer_idx"]] == str(answer) and answer % 7 != 0

    rows, kept = read(questions), read(out[1])
    assert kept == [row for row in rows if is_kept(row)] and 0 < len(kept) < 200
    ids = [row["id"] for row in rejects_of(out[1])]
    assert ids == [row["id"] for row in rows if not is_kept(row)]
    assert list(abilities_of(out[1])) == [row["id"] for row in kept]
    assert f"kept {len(kept)} of 200 questions" in ended.output


def test_a_question_without_its_ability_is_named(world):
    one = write(world / "one.jsonl", [{"id": "s0", "ability_path": ADD}])
    output = complaint(str(world / "validate.py"), questions=world / "seeds.jsonl", abilities=one,
                       out=world / "none.jsonl")
    assert "the question 's1' has no row in" in output


def test_a_table_sums_its_columns_and_counts_reasons_by_their_kind():
    rejected = [{"leaf": "a", "reason": "bad: 1"}, {"leaf": "b", "reason": "bad: 2"},
                {"leaf": "b", "reason": "worse"}]
    assert table(["asked", "kept"], [("a", 3, 2), ("b", 4, 2)], rejected).splitlines() == [
        "leaf  asked  kept  rejected",
        "a         3     2  1 bad",
        "b         4     2  1 bad, 1 worse",
        "all       7     4  2 bad, 1 worse"]
