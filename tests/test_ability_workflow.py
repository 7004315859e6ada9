"""
能力树流程的规律：做完的不再做；输入变了，只重做用到它的；写了一半的不算做完；中断后接着做，结果相同。
Laws of the workflow of the ability tree: what has finished is skipped, a changed input redoes what
depends on it, half-written files are not finished, and an interrupted run ends as an unbroken one.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_ability_tree
from ability_tree.prompts import ARROW
from ability_tree.tree import AbilityTree
from ability_tree.workflow import Workflow, flags_of, sha256_of
from helpers_run import ROOT, TINY, complaint, load, pad, same, start, succeed, wait_until
from interop.checkpoint import new_model, save_model
from runtime.files import write_jsonl
from model.config import LMConfig

ALL = ["inference", "analyze", "generate_distill_data", "validate", "cache_teacher",
       "train_distillation"]
START = "start: create_initial_tree"
STEPS = [START, *(f"round 1: {name}" for name in ALL), *(f"round 2: {name}" for name in ALL[:2])]
A, C, D = (f"iteration_1/{name}" for name in ("A_student_reply", "C_distill_data",
                                              "D_validated_data"))
STUDENT = "models/iteration_1_student_model/final_model"


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows) -> Path:
    write_jsonl(path, rows)
    return path


def steps_of(output: str) -> dict[str, bool]:
    """{title: whether it ran, since it had not finished}"""
    titles = re.findall(r"^== (.*)", output, re.MULTILINE)
    return {title.partition(": finished")[0]: ": finished" not in title for title in titles}


def files_in(folder) -> dict[str, tuple]:
    """{name: (when it was written, its bytes)}"""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- which steps run: none is real ---------------------------------------------------------------

class Pretended(Workflow):
    """Steps whose outputs depend on their command and on the bytes of its files alone. Like real
    ones, they overwrite no file."""

    done = None                                                         # {title: command} of a run

    def __init__(self, gpus):
        self.gpus, self.child, self.signal = gpus, None, None           # pytest keeps its Ctrl-C

    def run(self, title, command, log):
        self.done[title] = command
        flags = re.findall(r"--(\w+)((?: [^- ]\S*)*)", " ".join(command))
        flags = {name: values.split() for name, values in flags}
        read = [word for name in flags if name not in ("out", "out_dir", "cache_dir", "png")
                for word in [name, *flags[name]]]
        made_of = [sha256_of(Path(word))[:8] if Path(word).exists() else word for word in read]
        out = Path(*flags.get("out") or flags.get("cache_dir")
                   or (*flags["out_dir"], "full_dist_32.pth"))
        assert not out.exists(), f"{out} exists already"
        if out.suffix == ".json":
            AbilityTree.from_paths([("world", " ".join(made_of))]).save(out)
        else:
            write(out, [{"made of": made_of}])
        if out.name == "distill.jsonl":
            write(out.with_name("distill_ability.jsonl"), [])


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """pretend(rounds=2) -> {title: command} of the steps that this run of the workflow did."""
    files = {"teacher": "teacher", "student": "student", "agent_b": "agent",
             "dataset_files": ["dev_1", "dev_2"], "ability_files": ["paths"],
             "seed_questions": ["seeds"], "seed_abilities": ["seed_paths"], "exclude": ["exam"],
             "old_data": ["old.jsonl"]}
    for flag, names in files.items():
        names = names if isinstance(names, list) else [names]
        files[flag] = [write(tmp_path / name, [{"is": name}]) for name in names]
    where = {"workflow_dir": tmp_path / "workflow", "models_dir": tmp_path / "models"}
    monkeypatch.setattr(AbilityTree, "draw", lambda *_: None)
    for name, stand_in in (
            ("Workflow", Pretended), ("check_inputs", lambda *_: None),     # these files are empty
            ("read_choices", lambda _: [{"id": 1}]),
            ("read_abilities", lambda files: {"1": "x"} if files else {})):
        monkeypatch.setattr(train_ability_tree, name, stand_in)

    def pretend(**changed) -> dict[str, list[str]]:
        Pretended.done = {}
        none = [f"--{name}" for name, value in changed.items() if value == []]
        argv = ["train_ability_tree.py", *flags_of(**files | where | changed), *none]
        monkeypatch.setattr(sys, "argv", argv)
        train_ability_tree.main()
        return Pretended.done

    return pretend


def titles(*rounds: list[str]) -> list[str]:
    """titles(ALL, ALL[:2]) -> those of a whole round 1, and of the exam at the end."""
    return [f"round {number}: {name}" for number, names in enumerate(rounds, start=1)
            for name in names]


def test_a_changed_file_redoes_what_depends_on_it_and_nothing_else(pretend, tmp_path):
    assert list(pretend()) == [START, *titles(ALL, ALL, ALL[:2])]
    for changed, redone in [
            ("paths", [START, *titles(ALL[1:], ALL, ALL[:2])]),    # the replies stay
            ("dev_1", titles(ALL, ALL, ALL[:2])),
            ("dev_2", titles([], ALL, ALL[:2])),                    # round 1 does not read it
            ("seeds", titles(ALL[2:], ALL, ALL[:2])),
            ("seed_paths", titles(ALL[2:], ALL, ALL[:2])),
            ("exam", titles(ALL[2:], ALL, ALL[:2])),
            ("teacher", titles(ALL[2:], ALL, ALL[:2])),
            ("agent", titles(ALL[3:], ALL, ALL[:2])),
            ("old.jsonl", titles(ALL[4:], ALL, ALL[:2]))]:
        write(tmp_path / changed, [{"is": "another"}])
        assert list(pretend()) == redone, changed
    assert list(pretend()) == []


@pytest.mark.parametrize("flag, value, first", [
    ("n_samples", 5, ALL[2]), ("prompts", "miniworld", ALL[2]),
    ("learning_rate", 1e-4, ALL[5])])
def test_a_changed_flag_redoes_its_step_and_what_follows_and_keeps_the_old_as_previous(
        flag, value, first, pretend, tmp_path):
    student, previous = (tmp_path / folder / "full_dist_32.pth"
                         for folder in (STUDENT, f"{STUDENT}.previous"))
    pretend()
    old = student.read_bytes()
    assert list(pretend(**{flag: value})) == titles(ALL[ALL.index(first):], ALL, ALL[:2])
    assert previous.read_bytes() == old != student.read_bytes()


def test_more_rounds_continue_where_fewer_ended(pretend, tmp_path):
    once = {"dataset_files": tmp_path / "dev_1"}
    pretend(**once, rounds=1)
    assert list(pretend(**once, rounds=2)) == titles([], ALL[2:], ALL[:2])


def flag(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_the_student_of_a_round_is_examined_and_trained_in_the_next(pretend, tmp_path):
    done = pretend()
    weights = [tmp_path / "student", *(
        tmp_path / f"models/iteration_{n}_student_model/final_model/full_dist_32.pth" for n in (1, 2))]
    exams = [done[f"round {number}: inference"] for number in (1, 2, 3)]
    assert [flag(exam, "weights") for exam in exams] == list(map(str, weights))
    assert [Path(flag(exam, "questions")).name for exam in exams] == ["dev_1", "dev_2", "dev_2"]
    students = [flag(done[f"round {number}: train_distillation"], "student") for number in (1, 2)]
    assert students == list(map(str, weights[:2]))


def test_the_next_round_trains_on_old_rows_of_earlier_rounds_too(pretend, tmp_path):
    kept = tmp_path / "workflow" / D / "valid.jsonl"
    pretend(replay_share=0.9)           # all there are: the old row, then also that of round 1
    rows = [read(tmp_path / f"workflow/iteration_{n}/training.jsonl")[1:] for n in (1, 2)]
    old = read(tmp_path / "old.jsonl")
    assert rows[0] == old and sorted(rows[1], key=str) == sorted(old + read(kept), key=str)
    pretend(old_data=[], replay_share=0.9)
    assert read(tmp_path / "workflow/iteration_1/training.jsonl") == read(kept)


def test_a_given_tree_is_where_the_first_round_begins(pretend, tmp_path, capsys):
    mine = tmp_path / "mine.json"
    AbilityTree.from_paths([("world", "day")]).save(mine)
    done = pretend(initial_tree=mine)
    copy = tmp_path / "workflow/initial_ability_tree.json"
    assert START not in done and flag(done["round 1: analyze"], "tree") == str(copy)
    assert copy.read_bytes() == mine.read_bytes()
    # Without ability files, the teacher finds the leaves.
    analyze = pretend(initial_tree=mine, ability_files=[])["round 1: analyze"]
    assert "--abilities" not in analyze and flag(analyze, "agent") == str(tmp_path / "teacher")
    with pytest.raises(SystemExit):
        pretend(ability_files=[])
    assert "--ability_files [] must" in capsys.readouterr().err


def altered(path: Path):
    path.write_text(path.read_text() + " ")


def cut_short(path: Path):
    path.write_text(path.read_text()[:-7])


def killed_at_its_end(path: Path):
    """The step had written its files."""
    manifest = json.loads((path.parent / "manifest.json").read_text())
    del manifest["outputs"]
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_not_as_its_step_left_it_is_done_again(pretend, tmp_path):
    """And what follows is not, since the bytes are the same."""
    pretend()
    for file, title in ((f"workflow/{A}/replies.jsonl", "round 1: inference"),
                        (f"workflow/{C}/distill.jsonl", f"round 1: {ALL[2]}")):
        for damage in (altered, cut_short, Path.unlink, killed_at_its_end):
            before = (tmp_path / file).read_bytes()
            damage(tmp_path / file)
            assert list(pretend()) == [title] and (tmp_path / file).read_bytes() == before
    assert list(pretend()) == []


@pytest.mark.parametrize("flags, problem", [
    ({"rounds": 3}, "must be one file, or one per round"),
    ({"rounds": 0, "dataset_files": "dev_1"}, "--rounds 0 must be 1 or more"),
    ({"power": -1}, "--power -1.0 must be 0 or more"),
    ({"temperature": 0}, "--temperature 0.0 must be above 0"),
    ({"replay_share": 1}, "--replay_share 1.0 must lie in [0, 1)"),
    ({"alpha_ce": 2}, "--alpha_ce 2.0 must lie in [0, 1]"),
    ({"ability_files": ["a", "b", "c"]}, "must be one file, or one per round"),
])
def test_flags_that_do_not_fit_are_named(flags, problem, pretend, capsys):
    with pytest.raises(SystemExit):
        pretend(**flags)
    assert problem in capsys.readouterr().err and not Pretended.done


def test_who_writes_also_checks_and_the_teachers_weights_are_distilled(pretend, tmp_path):
    done = pretend(teacher_url="http://localhost:1/v1", teacher_model="big", teacher_budget=1000)
    generate, validate, logits = (" ".join(done[f"round 1: {step}"])
                                  for step in ALL[2:5])
    replies = f"{tmp_path}/workflow/teacher_replies.jsonl"          # one file, and so one budget
    assert f"--teacher {tmp_path}/teacher" in logits and "http" not in logits
    assert "--teacher_url http://localhost:1/v1 --teacher_model big" in generate
    assert f"--teacher_replies {replies} --teacher_budget 1000" in generate
    assert "--agent_a_url http://localhost:1/v1 --agent_a_model big" in validate
    assert f"--agent_a_replies {replies}" in validate and "--teacher " not in generate
    assert f"--agent_b {tmp_path}/agent" in validate and "--agent_b_url" not in validate


def test_the_flags_of_the_training_are_handed_on_and_their_defaults_are_the_documented_ones(pretend):
    default = " ".join(pretend()["round 1: train_distillation"])
    for given in ("temperature 2.0", "alpha 0.5", "epochs 3", "learning_rate 5e-06", "batch_size 2",
                  "accumulation_steps 16", "val_path none"):
        assert f"--{given}" in default
    changed = " ".join(pretend(alpha_ce=0, warmup_iters=5, more="--lora_rank 8")
                       ["round 1: train_distillation"])
    assert "--alpha 0.0" in changed and "--warmup_iters 5" in changed
    assert changed.endswith("--lora_rank 8")


def test_pace_and_budget_redo_nothing_and_the_number_of_processes_the_training(pretend):
    endpoint = {"teacher_url": "http://localhost:1/v1", "teacher_model": "big"}
    pretend(**endpoint, teacher_budget=1000)
    faster = {"teacher_budget": 9000, "teacher_replies": "there.jsonl"}
    assert list(pretend(**endpoint, **faster)) == []
    # These pretended students are the same, so that the rest is skipped.
    assert list(pretend(**endpoint, gpus=[0, 1])) == titles(ALL[5:], ALL[5:])


def test_a_missing_student_is_named_before_any_step_uses_it(pretend, tmp_path):
    with pytest.raises(SystemExit, match="no file at .*gone.pth"):
        pretend(student=tmp_path / "gone.pth")
    assert list(Pretended.done) == [START]


# ---- steps as processes --------------------------------------------------------------------------

@pytest.fixture
def workflow():
    """Of one process; afterwards pytest has its signal handlers again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Workflow([0])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_step_that_fails_ends_the_workflow_and_names_its_log(workflow, tmp_path, capsys):
    with pytest.raises(SystemExit, match="train ended with status 2; its log is .*train.log"):
        workflow.run("train", ["json.tool", "gone.json"], tmp_path / "train.log")
    log, printed = (tmp_path / "train.log").read_text(), capsys.readouterr().out
    assert "No such file" in log and log.strip() in printed and "== train" in printed


@pytest.mark.parametrize("at_its_end", [False, True])
def test_a_signal_reaches_the_step_and_then_the_workflow_ends(
        at_its_end, workflow, tmp_path, capsys):
    """Whether the step ends with an error or comes to its own end."""
    log, run = tmp_path / "step.log", workflow.run
    setup, statement = "import time", "time.sleep(60)"
    if at_its_end:
        setup += ", signal; stop = []; signal.signal(15, lambda *_: stop.append(print('saved')))"
        statement = "while not stop: time.sleep(0.01)"
    timeit = ["timeit", "-n1", "-r1", "-s", f"{setup}; print('up', flush=True)", statement]
    workflow.run = lambda title, command, log: run(title, timeit, log)

    def interrupt():
        wait_until(lambda: log.exists() and "up\n" in log.read_text())
        os.kill(os.getpid(), signal.SIGTERM)        # SIGINT may be ignored in a background job

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        workflow.step("exam", "inference", tmp_path / "A", log, out="x")
    thread.join()
    assert ended.value.code == 130 and "stopped at exam" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "A/manifest.json").read_text())
    assert ("outputs" in manifest) == ("saved" in log.read_text()) == at_its_end


def test_several_gpus_are_as_many_processes(workflow, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    workflow.gpus = [0, 1]
    workflow.run("exam", ["ability_tree.inference"], tmp_path / "log")
    typed, output = (tmp_path / "log").read_text().splitlines()
    assert typed == f"python {output}"
    assert output.endswith("--nproc_per_node 2 -m ability_tree.inference --ddp")


# ---- a real round --------------------------------------------------------------------------------

class Forked(Pretended):
    """Real steps, in forks of a process that has imported torch already."""

    stop_at = ""                # Ctrl-C reaches the step that prints this

    def run(self, title, command, log):
        print(f"== {title}")
        script, *flags = command
        script = f"{script.replace('.', '/')}.py"
        ended = start(str(ROOT / script), *flags)
        if self.stop_at:
            wait_until(lambda: self.stop_at in ended.output or not ended.processes[0].is_alive())
            if self.stop_at in ended.output:
                ended.send(signal.SIGINT)
        code, output = ended.wait(180)
        print(output)
        with open(log, "a") as file:
            file.write(output)
        if code:
            sys.exit(code)


@pytest.fixture(scope="module")
def world(data, models, tmp_path_factory):
    """A finished round: .folder, .flags and .output. The teacher has learned each writer row, and
    its question and answer, for two seconds: it writes questions, though poor ones, and both agents
    give the same answer to some of them."""
    folder = tmp_path_factory.mktemp("workflow")
    rows = read(data / "writer_data.jsonl")
    pairs = [row["conversations"][1]["content"].split(ARROW) for row in rows]
    answered = [{"conversations": [{"role": "user", "content": question},
                                   {"role": "assistant", "content": answer}]}
                for question, answer in pairs]
    lesson = write(folder / "lesson.jsonl", rows + answered)
    succeed("train_sft.py", **TINY | {"batch_size": 34}, weights="none", dim=64, n_layers=2,
            n_heads=2, max_steps=60, data_path=lesson, val_path="none", out_dir=folder / "teacher")
    # Both vocabularies are padded, as those of Qwen3-8B and Qwen3-0.6B are.
    teacher = pad(folder / "teacher/full_sft_64.pth", folder / "teacher/wide.pth", 1100)
    flags = {"teacher": teacher, "student": pad(models / "student.pth", folder / "wide.pth", 1050),
             "prompts": "miniworld", "hide_options": True,
             "dataset_files": data / "ability_dev.jsonl",
             "ability_files": data / "ability_paths.jsonl",
             "seed_questions": data / "ability_seeds.jsonl",
             "seed_abilities": data / "ability_paths.jsonl", "old_data": data / "ability_sft.jsonl",
             "rounds": 1, "n_samples": 100, "max_new_tokens": 24, "max_steps": 40,
             "learning_rate": 1e-2, "batch_size": 8, "accumulation_steps": 1, "temperature": 1,
             "more": "--log_interval 1",
             "workflow_dir": folder / "workflow", "models_dir": folder / "models"}
    output = run_real(flags)
    shutil.copytree(folder, folder.with_name("as it was"))
    return SimpleNamespace(folder=folder, flags=flags, output=output)


def run_real(flags, code=0, stop_at="") -> str:
    """The workflow with forked steps, in this process. Returns what it printed."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ability_tree, "Workflow", Forked)
        patch.setattr(Forked, "stop_at", stop_at)
        patch.setattr(sys, "argv", ["train_ability_tree.py", *flags_of(**flags)])
        for module in ("ability_tree.workflow", "train_ability_tree"):
            patch.setattr(f"{module}.Logger", lines.append)
        patch.setattr("builtins.print", lambda *texts, **_: lines.extend(texts))
        try:
            train_ability_tree.main()
            ended = 0
        except SystemExit as error:
            ended = error.code
    output = "\n".join(map(str, lines))
    assert ended == code, f"{ended}\n{output}"
    return output


@pytest.fixture
def round_1(world):
    """The same, as it was when it had finished."""
    shutil.rmtree(world.folder)
    shutil.copytree(world.folder.with_name("as it was"), world.folder)
    return world


def test_a_round_leaves_trees_questions_a_student_and_a_log_for_each_step(round_1):
    assert steps_of(round_1.output) == dict.fromkeys(STEPS, True)
    workflow = round_1.folder / "workflow"
    here = workflow / "iteration_1"
    exam, wrote = read(round_1.flags["dataset_files"]), read(workflow / C / "distill.jsonl")
    replies = read(workflow / A / "replies.jsonl")
    assert [reply["id"] for reply in replies] == [row["id"] for row in exam]

    trees = [AbilityTree.load(workflow / f"{name}.json") for name in (
        "initial_ability_tree", "iteration_1/B_student_tree/tree", "iteration_2/B_student_tree/tree")]
    assert [tree.asked for tree in trees] == [0, len(exam), len(exam)]
    for leaf in trees[2].leaves().values():
        assert [row["round"] for row in leaf.history] == [1, 2]

    log = (here / "validate.log").read_text()
    assert f"agent_a, {round_1.flags['teacher']}: " in log and "% " not in log.split("as written")[0]
    kept, rejected = (read(workflow / D / name) for name in ("valid.jsonl", "valid_rejected.jsonl"))
    ids = {row["id"] for row in kept}
    assert kept and rejected and len({row["id"] for row in wrote}) == len(wrote) <= 100
    assert ids | {row["id"] for row in rejected} == {row["id"] for row in wrote}
    assert [row for row in wrote if row["id"] in ids] == kept

    learned, old = read(here / "training.jsonl"), read(round_1.flags["old_data"])
    old = [row["conversations"] for row in old]
    assert len(learned) == 2 * len(kept)                                # half new, half old
    assert all(row["conversations"] in old for row in learned[len(kept):])
    assert learned[0]["conversations"] == [
        {"role": "user", "content": kept[0]["question"]},
        {"role": "assistant", "content": kept[0]["options"][kept[0]["answer_idx"]]}]

    models = round_1.folder / STUDENT
    assert {path.name for path in models.parent.iterdir()} == {"final_model", "checkpoint-40"}
    assert (models.parent / "checkpoint-40/full_dist_32.resume").exists()
    student = load(models / "full_dist_32.pth")
    assert not same(load(round_1.flags["student"]), student)
    logs = [path.read_text().strip() for path in workflow.rglob("*.log")]
    assert len(logs) == len(STEPS) and all(log and log in round_1.output for log in logs)
    assert "| all " in (workflow / "report.md").read_text()
    assert not [path for path in round_1.folder.rglob("*") if path.suffix in (".parts", ".tmp")]


def test_a_second_run_does_nothing(round_1):
    before = files_in(round_1.folder)
    assert steps_of(run_real(round_1.flags)) == dict.fromkeys(STEPS, False)
    after = files_in(round_1.folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {f"workflow/{name}" for name in (
        "report.md", "report.png", "iteration_1/training.jsonl")}


def test_an_interrupted_training_resumes_to_the_same_weights(round_1):
    whole = load(round_1.folder / STUDENT / "full_dist_32.pth")
    shutil.rmtree(round_1.folder / STUDENT)
    output = run_real(round_1.flags, code=130, stop_at="step 1/40")
    done = int(re.search(r"stopped after step (\d+) of 40", output).group(1))
    assert 0 < done < 40 and list(steps_of(output)) == STEPS[:7]

    output = run_real(round_1.flags)
    assert f"after step {done}" in output
    assert same(load(round_1.folder / STUDENT / "full_dist_32.pth"), whole)
    assert steps_of(output) == dict.fromkeys(STEPS, False) | {STEPS[6]: True}


@pytest.mark.parametrize("flag", ["dataset_files", "ability_files", "seed_questions",
                                  "seed_abilities", "old_data", "exclude"])
def test_a_mistake_in_a_file_is_reported_before_the_first_step(flag, world, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    flags = world.flags | {"exclude": world.flags["old_data"], "workflow_dir": tmp_path / "w"}
    wrong.write_text(Path(flags[flag]).read_text() + "{\n")
    output = complaint("train_ability_tree.py", **flags | {flag: wrong})
    assert f"{wrong}, line {len(wrong.read_text().splitlines())}" in output and "==" not in output


@pytest.mark.parametrize("wrong, reason", [
    ({"agent_b": "gone.pth"}, "--agent_b gone.pth: there is no such file"),
    ({"initial_tree": "gone.json"}, "no ability tree at gone.json"),
    ({"gpus": -1}, "--gpus -1 must be 0 or more"),
    ({"max_seq_len": 256}, "--max_seq_len 256 exceeds the context length of the models, 128"),
    # Known at the start, though step B or C would be the first to miss it
    ({"initial_tree": {"name": "miniworld", "children": [{"name": "sky"}]}},
     "the ability tree has no miniworld / "),
    ({"seed_abilities": {"id": "no question", "ability_path": ["miniworld"]}},
     "seed questions belong to no leaf"),
    ({"teacher_url": "http://localhost:1/v1"}, "--teacher_url needs the model's name"),
    ({"agent_a_url": "localhost", "agent_a_model": "big", "agent_a": None}, "must begin with http"),
])
def test_a_wrong_flag_too(wrong, reason, world, tmp_path):
    check_refusal(wrong, reason, world, tmp_path)


def test_a_student_whose_tokens_the_teacher_cannot_read_is_refused_before_a_question_is_written(
        world, byte_tokenizer, tmp_path):
    model, tokenizer = new_model(LMConfig(dim=16, n_layers=1, n_heads=2), byte_tokenizer())
    save_model(model, tokenizer, tmp_path / "bytes.pth")
    check_refusal({"student": tmp_path / "bytes.pth"}, "split texts into other tokens", world,
                  tmp_path)


def check_refusal(wrong, reason, world, tmp_path):
    wrong = {name: write(tmp_path / f"{name}.jsonl", [value]) if isinstance(value, dict) else value
             for name, value in wrong.items()}
    flags = world.flags | wrong | {"workflow_dir": tmp_path / "w"}
    output = complaint("train_ability_tree.py", **flags)
    assert reason in output and "==" not in output
