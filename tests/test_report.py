"""
成绩单的规律：分数与评测、与损失里的同名量一致；费用来自训练的日志；页与图都写出。
Laws of scripts/report.py: its scores are those of evaluate.py and of validation, its costs those of the files and of the log.
"""

import json
import re

import pytest
import torch

from dataset.lm_dataset import SFTDataset, in_order
from distill.teachers import Teacher
from evaluation.metrics import measure, read_tests
from evaluation.samples import spread
from evaluation.validation import evaluate
from helpers_run import TINY, run, succeed
from interop.checkpoint import load_model
from runtime.files import read_rows
from scripts.report import draw

SCRIPT = "scripts/report.py"


def cells(page: str) -> dict[str, list[str]]:
    """{first cell: the others} of the table's rows."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {first: others for first, *others in found}


def test_scores_of_the_card_are_those_of_validation(models, data):
    """The two compute calibration, acceptance, KL and agreement independently."""
    (teacher, tokenizer), (student, _) = (load_model(models / f"{name}.pth") for name in ("teacher", "student"))
    found = measure(student, tokenizer, read_tests([str(data / "test.jsonl")]), teacher)
    batches = in_order(SFTDataset([data / "test.jsonl"], tokenizer, 128))
    with torch.no_grad():
        truth = evaluate(student, batches, torch.device("cpu"), teachers=[Teacher(teacher)])
    for name, other, unit in (("loss", "ce", 1), ("kl", "kl", 1), ("agreement", "agreement", 100), ("acceptance", "acceptance", 100),
                              ("calibration", "ece", 100)):
        assert found[name] == pytest.approx(unit * truth[f"val_{other}"], rel=1e-4), name
    alike = measure(teacher, tokenizer, read_tests([str(data / "test.jsonl")]), teacher)
    assert (alike["acceptance"], alike["agreement"]) == pytest.approx((100, 100))


def test_a_card_shows_sizes_speed_scores_and_answers_in_a_page_and_a_picture(models, data, tmp_path):
    student = tmp_path / "student.pth"
    for suffix in (".pth", ".json"):
        student.with_suffix(suffix).write_bytes((models / "student.pth").with_suffix(suffix).read_bytes())
    about = json.loads((models / "student.json").read_text())
    (tmp_path / about["tokenizer"]).write_bytes((models / about["tokenizer"]).read_bytes())
    student.with_suffix(".jsonl").write_text('{"step": 5, "total_cpu_seconds": 3.0}\n{"step": 9, "total_cpu_seconds": 41.6}\n')
    tests = [data / name for name in ("test.jsonl", "mcq_test.jsonl", "test_habits.jsonl")]
    printed = succeed(SCRIPT, teacher=f"T={models}/teacher.pth", student=[f"S={student}", f"M={models}/student_moe.pth"],
                      data=tests, limit=6, samples=2, max_new_tokens=5, out=tmp_path / "card.md")
    page = (tmp_path / "card.md").read_text()
    assert (tmp_path / "card.png").read_bytes()[:4] == b"\x89PNG" and "](card.png)" in page
    shown = cells(page)
    assert shown == cells(printed) and shown[""] == ["T", "S", "M"]
    n = [load_model(path)[0].n_parameters() for path in (models / "teacher.pth", student)]
    assert shown["parameters"][:2] == [f"{n[0]:,}", f"{n[1]:,} ({100 * n[1] / n[0]:.0f} %)"]
    assert shown["file, MB"][0] == f"{(models / 'teacher.pth').stat().st_size / 1e6:.2f}"
    assert shown["KL to the teacher, nats per token"][0] == "0.000" and shown["accepted as drafts of the teacher %"][0] == "100.0"
    assert shown["optimizer steps"] == ["", "9", ""] and shown["CPU seconds of its training"] == ["", "42", ""]
    for key in ("memory, 16 answers at once, MB", "ms per token, one answer", "ms per token, 16 answers at once", "ms to the first token"):
        assert all(float(re.match(r"[\d.,]+", cell)[0].replace(",", "")) > 0 for cell in shown[key])
    assert page.count("- **S**:") == 2 and page.count("\n> ") == 2


def test_a_card_of_texts_has_no_questions_and_no_log(models, data, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join((data / "pretrain_data.jsonl").read_text().splitlines(keepends=True)[:5]))
    succeed(SCRIPT, teacher=models / "teacher.pth", student=models / "student.pth", data=texts, max_new_tokens=4, out=tmp_path / "card.md")
    shown = cells((tmp_path / "card.md").read_text())
    assert "exact match %" not in shown and "optimizer steps" not in shown and len(shown["held-out loss, nats per token"]) == 2


def test_models_of_one_name_are_refused(models):
    ended = run(SCRIPT, teacher=models / "student.pth", student=models / "student.pth")
    assert ended.code == 1 and "two models have the name student, " in ended.output


def test_samples_are_spread_over_the_rows():
    assert spread({"conversations": [*range(10)], "texts": []}, 3) == [0, 3, 6]
    assert spread({"conversations": [], "texts": ["a", "b"]}, 4) == ["a", "b"]
    assert spread({"conversations": [], "texts": []}, 4) == []


def test_the_picture_has_the_students_bars_and_the_teachers_line(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("scripts.report.save_picture", lambda figure, path: figures.append(figure))
    costs = {"parameters": 100, "file": 4.0, "memory": 8.0, "first": 1.0, "single": 2.0, "batch": 1.0}
    results = {"T": costs | {"exact_match": 90.0, "agreement": 100.0},
               "S": {key: value / 4 for key, value in costs.items()} | {"exact_match": 81.0, "agreement": 95.0}}
    draw(results, "T", tmp_path / "card.png")
    left, right = figures[0].axes
    assert [bar.get_width() for bar in left.patches] == [25.0] * 6
    assert [text.get_text() for text in right.texts] == ["81", "95"]
    assert [bar.get_width() for bar in right.patches] == [81.0, 95.0]
    assert [line.get_segments()[0][0][0] for line in right.collections] == [90.0, 100.0]


def test_the_cpu_seconds_of_a_run_continue_after_a_resume(models, data, tmp_path):
    """As if it had stopped after step 2 of 4."""
    flags = TINY | {"data_path": data / "sft_data.jsonl", "weights": models / "student.pth", "max_steps": 4, "val_path": "none",
                    "save_interval": 2, "log_interval": 1, "out_dir": tmp_path}

    def seconds():
        return [row["total_cpu_seconds"] for row in read_rows(tmp_path / "full_sft_32.jsonl", "step")]

    succeed("train_sft.py", **flags)
    whole = seconds()
    (tmp_path / "full_sft_32.resume").unlink()
    succeed("train_sft.py", **flags, resume=True)
    assert seconds()[:2] == whole[:2] and 0 < whole[0] < whole[1] < seconds()[2] < seconds()[3]
