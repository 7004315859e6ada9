"""
经验成对的规律：两份文件逐行同答；示范同类而不同组；留出的组在训练里见不到；同一种子，同样的字节。
Laws of pairs for context distillation: row by row the same answers, a demonstration of the same
kind from another group, no held-out group in the training files, the same bytes for the same seed.
"""

import json
import re
import sys

import pytest

from scripts.pair_experience import main

NAMES = [f"{part}_{side}" for part in ("train", "test") for side in ("student", "teacher")]


def row(kind: str, room: int, trial: int = 0) -> dict:
    turns = (["user", f"room {room}, {kind} a mug"], ["assistant", f"go to {kind}er {trial}"],
             ["user", "done"])
    return {"id": f"{kind}-{room}/{trial}", "kind": kind,
            "conversations": [{"role": role, "content": content} for role, content in turns]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """run(train=3) is `python scripts/pair_experience.py --train 3`, in this process. Returns its
    exit status and what it printed."""
    def run_it(**flags):
        argv = [[f"--{name}", *([] if value is True else [str(value)])]
                for name, value in flags.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["pair_experience.py", *sum(argv, [])])
        try:
            main()
        except SystemExit as ended:
            printed = capsys.readouterr()
            if isinstance(ended.code, int):
                return ended.code, printed.err
            return 1, f"{printed.out}{ended.code}"
        return 0, capsys.readouterr().out

    return run_it


@pytest.fixture
def succeed(run):
    def succeeded(**flags):
        code, printed = run(**flags)
        assert code == 0, printed
        return printed

    return succeeded


@pytest.fixture
def flags(tmp_path):
    """Two kinds of tasks in five rooms, two trials of each: 20 rows, one room of four held out."""
    rows = [row(kind, room, trial)
            for room in range(5) for kind in ("wash", "heat") for trial in range(2)]
    return {"data_path": write(tmp_path / "data.jsonl", rows), "same": "kind", "apart": r"(\d+)/",
            "out_dir": tmp_path / "out"}


def files(folder) -> dict[str, list[dict]]:
    return {name: [json.loads(line)
                   for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in NAMES}


def contents(row: dict, role: str) -> list[str]:
    return [turn["content"] for turn in row["conversations"] if turn["role"] == role]


def room(name: str) -> str:
    return re.search(r"(\d+)/", name)[1]


# ---- pairs ---------------------------------------------------------------------------------------


def test_the_teacher_reads_a_demonstration_before_the_first_question(flags, succeed):
    """The user's last turn, which no one answers, is in the demonstration only: it shows how the
    task ended. A system turn stays first, and is not in the demonstration."""
    system = {"role": "system", "content": "Be brief."}
    rows = [row("wash", number, number) | {"note": "kept"} for number in range(5)]
    write(flags["data_path"], [each | {"conversations": [system, *each["conversations"]]}
                               for each in rows])
    succeed(**flags)
    made = files(flags["out_dir"])
    for student, teacher in zip(made["train_student"], made["train_teacher"]):
        mine, shown = room(student["id"]), room(teacher["demonstration"])
        assert contents(student, "user") == [f"room {mine}, wash a mug"]
        assert teacher["conversations"][0] == student["conversations"][0] == system
        assert contents(teacher, "user") == [
            f"Here is how such a task is done:\n\nroom {shown}, wash a mug\n> go to washer {shown}"
            f"\ndone\n\nNow it is your turn.\n\nroom {mine}, wash a mug"]
        assert student["note"] == teacher["note"] == "kept" and "demonstration" not in student


def test_pairs_have_equal_answers_and_a_demonstration_of_the_same_kind_and_another_group(
        flags, succeed):
    """Nothing held out is trained on or demonstrates. test_share 0.4 of five rooms: two."""
    succeed(**flags, test_share=0.4)
    made = files(flags["out_dir"])
    for part, n_rows in (("train", 12), ("test", 8)):
        students, teachers = made[f"{part}_student"], made[f"{part}_teacher"]
        assert len(students) == len(teachers) == n_rows
        for student, teacher in zip(students, teachers):
            assert student["id"] == teacher["id"]
            assert contents(student, "assistant") == contents(teacher, "assistant")
            assert contents(teacher, "user")[0].endswith("\n\n" + contents(student, "user")[0])
            assert teacher["demonstration"].split("-")[0] == teacher["kind"]
            assert room(teacher["demonstration"]) != room(teacher["id"])
    held_out, trained = ({room(row["id"]) for row in made[f"{part}_student"]}
                         for part in ("test", "train"))
    shown = {room(row["demonstration"]) for row in made["train_teacher"] + made["test_teacher"]}
    assert len(held_out) == 2 and len(trained) == 3
    assert not held_out & trained and shown <= trained


def test_each_row_of_another_group_may_demonstrate(flags, succeed):
    """Of five rooms one is held out. The 20 rows of a room are shown rows of each of the three
    others."""
    seen = {"wash": set(), "heat": set()}
    write(flags["data_path"], [row(kind, room, trial) for room in range(5) for kind in seen
                               for trial in range(20)])
    succeed(**flags)
    for teacher in files(flags["out_dir"])["train_teacher"]:
        seen[teacher["kind"]].add((room(teacher["id"]), room(teacher["demonstration"])))
    assert [len(pairs) for pairs in seen.values()] == [4 * 3, 4 * 3]


def test_without_apart_only_copies_of_a_row_are_its_group(flags, succeed):
    """Four texts, each five times: the copies of one are held out, and no text is shown before
    itself."""
    write(flags["data_path"], [{"kind": 1, "question": f"{word}?", "answer": word}
                               for word in "abcd" * 5])
    succeed(**flags | {"apart": None})
    made = files(flags["out_dir"])
    assert (len(made["train_student"]), len(made["test_student"])) == (15, 5)
    assert len({contents(row, "user")[0] for row in made["test_student"]}) == 1
    for student, teacher in zip(made["train_student"], made["train_teacher"]):
        assert contents(teacher, "user")[0].count(contents(student, "user")[0]) == 1


# ---- how many, how long --------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_bytes_and_another_seed_does_not(flags, tmp_path, succeed):
    def bytes_of(name, seed):
        succeed(**flags | {"out_dir": tmp_path / name}, seed=seed)
        return [(tmp_path / name / f"{each}.jsonl").read_bytes() for each in NAMES]

    first = bytes_of("first", seed=1)
    assert first == bytes_of("again", seed=1) and first != bytes_of("other", seed=2)


def test_fewer_pairs_are_the_first_of_all_pairs(flags, tmp_path, succeed):
    succeed(**flags)
    printed = succeed(**flags | {"out_dir": tmp_path / "few"}, train=3, test=2)
    everything, few = files(flags["out_dir"]), files(tmp_path / "few")
    assert all(few[name] == everything[name][:3 if "train" in name else 2] for name in NAMES)
    assert "train: 3 pairs of 16 rows; left out: 13 more than requested" in printed


def test_a_text_may_be_as_long_as_max_chars(flags, tmp_path, succeed):
    """"room 0, wash a mug", "> go to washer 0" and "done" are 18 + 1 + 16 + 1 + 4 = 40 characters;
    trial 10 makes 41."""
    write(flags["data_path"], [row("wash", room, trial) for room in range(5) for trial in (0, 10)])
    printed = succeed(**flags, max_chars=40)
    assert "train: 4 pairs of 8 rows; left out: 4 longer than --max_chars" in printed
    printed = succeed(**flags | {"out_dir": tmp_path / "shown"}, max_demonstration_chars=40)
    assert "train: 8 pairs of 8 rows\n" in printed
    made = files(tmp_path / "shown")
    assert all(teacher["demonstration"].endswith("/0")
               for teacher in made["train_teacher"] + made["test_teacher"])


def test_a_row_that_nothing_demonstrates_is_left_out_and_counted(flags, succeed):
    """Of kind dry there is one row, of kind heat two in one room: neither has a demonstration."""
    write(flags["data_path"], [*(row("wash", room) for room in range(8)), row("dry", 8),
                               row("heat", 9, 0), row("heat", 9, 1)])
    printed = succeed(**flags)
    assert sum(map(int, re.findall(r"(\d+) without a demonstration", printed))) == 3
    made = files(flags["out_dir"])
    assert {row["kind"] for name in NAMES for row in made[name]} == {"wash"}


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, reason", [
    ({"id": "wash-1/0"}, "no 'kind', the key of --same (keys found: question, answer, id)"),
    ({"id": "wash", "kind": "wash"}, r"--apart '(\\d+)/' finds no group in the id 'wash'"),
    ({"kind": "wash"}, r"--apart '(\\d+)/' finds no group in the id None"),
    ({"id": "wash-1/0", "kind": "wash", "answer": 5}, "answer is 5, not a string"),
])
def test_a_row_that_lacks_something_is_named_or_skipped(bad, reason, flags, run):
    with open(flags["data_path"], "a") as file:
        file.write(json.dumps({"question": "a", "answer": "b"} | bad) + "\n")
    code, printed = run(**flags)
    place = f"{flags['data_path']}, line 21: {reason}. Fix the line, or pass --skip_bad_lines"
    assert code == 1 and place in printed and not flags["out_dir"].exists()
    code, printed = run(**flags, skip_bad_lines=True)
    assert code == 0 and "20 rows in 5 groups" in printed
    assert f"{flags['data_path']}: left out 1 of 21 lines. line 21: {reason}" in printed


@pytest.mark.parametrize("rows, reason", [
    ([], "is empty"),
    ([row("wash", 1, 0), row("wash", 1, 1)],
     "all 2 rows are of one group, '1': none can be held out"),
    ([row("wash", 1), row("heat", 2), row("dry", 3)],
     "nothing to write. train: 0 pairs of 2 rows; left out: 2 without a demonstration"),
])
def test_rows_of_which_no_pair_can_be_made_say_why(rows, reason, flags, run):
    write(flags["data_path"], rows)
    code, printed = run(**flags)
    assert code == 1 and reason in printed and not flags["out_dir"].exists()


def test_files_that_are_there_already_stay(flags, run):
    flags["out_dir"].mkdir()
    mine = write(flags["out_dir"] / "test_teacher.jsonl", [])
    code, printed = run(**flags)
    assert code == 1 and f"{mine} exists already. Give another --out_dir, or remove it" in printed
    assert [*flags["out_dir"].iterdir()] == [mine] and mine.read_text() == ""


@pytest.mark.parametrize("more, reason", [
    ({"apart": r"\d+/"}, r"--apart '\\d+/' has no group"), ({"train": -1}, "--train -1"),
    ({"test_share": 1}, "--test_share 1.0 must lie in (0, 1)")])
def test_a_flag_out_of_range_is_refused(more, reason, flags, run):
    code, printed = run(**flags | more)
    assert code == 2 and reason in printed


def test_strip_takes_back_what_pairing_put_before_the_question(succeed, run, tmp_path):
    rows = [row("take", room) | {"level": room} for room in range(6)]
    rows[0]["conversations"].insert(0, {"role": "system", "content": "Be brief."})
    succeed(data_path=write(tmp_path / "rows.jsonl", rows), same="kind", out_dir=tmp_path)
    stripped = "Here is .*Now it is your turn.\n\n"
    printed = succeed(data_path=tmp_path / "train_teacher.jsonl", strip=stripped, out_dir=tmp_path / "q")
    found = [json.loads(line) for line in (tmp_path / "q/student.jsonl").read_text().splitlines()]
    paired = [json.loads(line) for line in (tmp_path / "train_student.jsonl").read_text().splitlines()]
    assert [each | {"demonstration": None} for each in found] == [
        each | {"demonstration": None} for each in paired] and "rows without the experience" in printed

    system = {"role": "system", "content": "Experience: look first."}
    rows[1]["conversations"].insert(0, system)
    flags = {"data_path": write(tmp_path / "system.jsonl", rows[1:3]), "out_dir": tmp_path / "s",
             "strip": "Experience:.*"}
    code, printed = run(**flags)
    assert code and "system.jsonl, line 2: --strip 'Experience:.*' finds no experience in 'room 2" in printed
    succeed(**flags | {"data_path": write(tmp_path / "one.jsonl", rows[1:2])})
    (only,) = map(json.loads, (tmp_path / "s/student.jsonl").read_text().splitlines())
    assert only["conversations"] == rows[1]["conversations"][1:3]
    assert "exists already" in run(**flags)[1]
