"""
练习的规律：每个答案守住规律，没填的、有错的、似是而非的都守不住。
Laws of the exercises: every solution keeps its laws; a blank, a fault and a plausible wrong answer
do not.
"""

import ast
import re

import pytest
from helpers_docs import blocks, commands, figures, stands_in
from helpers_run import ROOT, complaint, run, succeed

from exercises import laws
from exercises.check import contradiction, keeps_its_laws

HERE = ROOT / "exercises"
BLANKS = sorted(path.stem for path in HERE.glob("[0-9]*.py"))
FAULTS = sorted(f"faults/{path.stem}" for path in HERE.glob("faults/*.py"))
PAGES = "exercises/README.md", "exercises/README_zh.md"

# What a student may well write instead of a line of the solution.
WRONG = {
    "01_muon_update": [(" / gradient.norm()", ""),
                       ("range(5)", "range(0)")],                           # G / ||G||
    "02_masked_loss": [("is_answer[1:]", "is_answer[:-1]"),
                       ("logits[:-1][learned], ids[1:][learned]", "logits[is_answer], ids[is_answer]"),
                       ("logits[:-1][learned], ids[1:][learned]", "logits[:-1], ids[1:]")],
    "02_accumulate": [('logits, targets, reduction="sum") / n_tokens', "logits, targets) / len(micro_batches)"),
                      (' / n_tokens', ""), ("/ n_tokens", "/ max(1, len(targets))")],
    "03_forward_kl": [("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)"),
                      ("log_p.exp() * (log_p - log_q)", "log_p.exp() * -log_q"),
                      (".sum(dim=-1)", ".sum(dim=-1).mean()"), (".sum(dim=-1)", ".mean(dim=-1)"),
                      ("log_p.exp() * (log_p - log_q)", "log_p.exp() * (log_p.exp() / log_q.exp()).log()")],
    "03_soft_loss": [("temperature ** 2 * ", ""), ("temperature ** 2", "temperature"),
                     ("teacher_logits / temperature", "teacher_logits"), ("kl.mean()", "kl.sum()")],
    "04_jsd": [("torch.logaddexp(log_p, log_q) - math.log(2)", "(log_p + log_q) / 2"),
               (" - math.log(2)", ""), ("(kl_p + kl_q) / 2", "kl_p + kl_q"),
               ("(kl_p + kl_q) / 2", "kl_p")],
    "07_top_k_buckets": [("others.logsumexp(dim=-1, keepdim=True)",
                          "(1 - log_p.exp().gather(-1, ids).sum(dim=-1, keepdim=True)).log()"),
                         ("torch.cat([log_p.gather(-1, ids), tail], dim=-1)",       # renormalised
                          "log_p.gather(-1, ids).log_softmax(dim=-1)"),
                         ("log_p.gather(-1, ids)", "log_p.topk(ids.shape[1]).values"),      # its own
                         ("others.logsumexp", "log_p.logsumexp")],
    "08_rollout_mask": [(" & after_prompt\n", "\n"), (" - is_end.long()\n", "\n"),
                        ("after_prompt & (ends_before == 0)", "after_prompt"),
                        ("after_prompt & (ends_before == 0)", "after_prompt & (ids != end)"),
                        (">= prompt", "> prompt")],
    "18_rejection": [("lacking / lacking.sum()", "p"), ("lacking / lacking.sum()", "lacking"),
                     ("return accept, lacking / lacking.sum()", "return 0 * q, p"),
                     (".clamp(max=1)", ""), ("(p / q)", "p")],
    "20_remove_head": [("// K != head", "% n_heads != head"), ("wo[:, kept]", "wo[kept]"),
                       ("wk[kept], wv[kept]", "wv[kept], wk[kept]"),
                       ("!= head", "!= n_heads - 1"), ("!= head", "== head")],
}


@pytest.mark.parametrize("name", BLANKS + FAULTS)
def test_every_solution_keeps_its_laws(name):
    assert keeps_its_laws(HERE / f"solutions/{name}.py")


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_breaks_a_law_until_it_is_repaired(name, capsys):
    assert not keeps_its_laws(HERE / f"{name}.py")
    assert "FAILS" in capsys.readouterr().out


@pytest.mark.parametrize("name, right, wrong", [(name, *pair) for name in WRONG for pair in WRONG[name]])
def test_a_plausible_wrong_answer_breaks_a_law(name, right, wrong, tmp_path, capsys):
    solution = (HERE / f"solutions/{name}.py").read_text(encoding="utf-8")
    assert solution.count(right) == 1
    answer = tmp_path / f"{name}.py"
    answer.write_text(solution.replace(right, wrong), encoding="utf-8")
    assert not keeps_its_laws(answer)
    assert re.search(r"FAILS .*: got .*, wanted ", capsys.readouterr().out)


def test_a_wrong_answer_is_tried_for_every_exercise():
    assert sorted(WRONG) == BLANKS


def test_a_blank_is_said_kindly_and_the_status_is_1():
    ended = run("exercises/check.py")
    assert ended.code == 1 and ended.output.count("not filled in yet") == len(BLANKS)
    assert "Traceback" not in ended.output and "FAILS" not in ended.output


def test_the_command_checks_the_exercises_that_it_names():
    output = succeed("exercises/check.py", "03", "--solutions")
    assert re.findall(r"== (.*)", output) == ["03_forward_kl.py", "03_soft_loss.py"]
    assert "FAILS" not in output and output.count("  ok  ") > 10
    ended = run("exercises/check.py", "faults/04")
    assert ended.code == 1 and "FAILS lesson 04" in ended.output
    assert "no exercise begins with 99" in complaint("exercises/check.py", "99")


def test_a_law_that_fails_shows_both_numbers():
    assert contradiction([1.0, 2.0], "=", [1.0, 2.5]) == "got 2.0000, wanted = 2.5000, entry 1"
    assert contradiction(float("nan"), "<=", 1) == "got nan, wanted <= 1.0000"
    assert contradiction([1.0], "=", [1.0, 1.0]) == "got shape (1,), wanted (2,)"
    assert contradiction([1.0, 2.0], ">=", 1) == contradiction(1.00005, "=", 1) == ""


# ------------------------------------------------------------------------------------ files and docs


def tree(name):
    return ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BLANKS + FAULTS)
def test_an_exercise_its_solution_and_its_laws_belong_together(name):
    """The same imports, of torch and math only, and the same function; the task in both languages."""
    asked, solved = tree(name), tree(f"solutions/{name}")
    function, answer = (next(node for node in each.body if isinstance(node, ast.FunctionDef))
                        for each in (asked, solved))
    assert function.name == answer.name == name.split("/")[-1][3:] and hasattr(laws, function.name)
    assert ast.dump(function.args) == ast.dump(answer.args)
    imports = [[ast.unparse(node) for node in each.body if isinstance(node, (ast.Import, ast.ImportFrom))]
               for each in (asked, solved)]
    assert imports[0] == imports[1]
    assert set(imports[0]) <= {"import math", "import torch", "import torch.nn.functional as F"}

    task = ast.get_docstring(asked)
    assert re.match(r"[练找]", task) and re.search(r"^(Exercise|Find the fault): ", task, flags=re.MULTILINE)
    assert re.search(r"^课 · lesson  (.*)$", task, flags=re.MULTILINE)[1] in lessons_of(name)
    checked = re.search(r"check\.py (\S+)$", task, flags=re.MULTILINE)[1]
    assert name.startswith(checked)
    assert len((HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 50


def lessons_of(name) -> list[str]:
    number = name.split("/")[-1][:2]
    return [path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"docs/lessons/{number}_*.md")]


@pytest.mark.parametrize("name", BLANKS + FAULTS)
def test_the_lesson_and_the_page_of_exercises_name_it_in_both_languages(name):
    assert len(lessons_of(name)) == 2
    number = name[:name.rindex("/") + 3] if "/" in name else name[:2]
    for lesson in lessons_of(name):
        text = (ROOT / lesson).read_text(encoding="utf-8")
        assert f"`python exercises/check.py {number}`" in text, lesson
        assert "/" in name or f"`exercises/{name}.py`" in text, lesson
    for page in PAGES:
        assert f"]({name}.py)" in (ROOT / page).read_text(encoding="utf-8")


def test_both_pages_have_the_same_commands_code_and_figures_and_their_links_lead_to_files():
    english, chinese = PAGES
    assert commands(english) == commands(chinese) and figures(english) == figures(chinese)
    [block], [same] = (blocks(page, "python") for page in PAGES)
    assert block == same
    file, *quoted = block.splitlines()
    assert stands_in(quoted, (ROOT / file.removeprefix("# ")).read_text(encoding="utf-8").splitlines())
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (HERE / link).exists(), link
