"""
曲线的规律：训练曲线与评测的图画什么、不画什么。
Laws of the pictures of a run and of an evaluation: what they show and what they leave out.
"""

import json
import signal

import pytest
from matplotlib.figure import Figure

from helpers_run import TINY, start, wait_until
from scripts.evaluate import draw
from scripts.plot import main as plot_main
from runtime.log import draw_curves


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def lines_of(axis) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


# ----------------------------------------------------------------------------------------------------- curves of a run


def test_training_and_validation_share_a_panel_each_at_its_own_steps(drawn, tmp_path):
    rows = [{"step": 10, "kd": 0.9, "lr": 3.0}, {"step": 20, "kd": 0.5, "lr": 2.0}, {"step": 20, "val_kl": 0.6},
            {"step": 30, "kd": 0.4, "lr": 1.0}, {"step": 30, "val_kl": 0.5, "val_agreement": 0.8}]
    draw_curves(rows, tmp_path / "full_dist_64.png")
    panels = {axis.get_title(): lines_of(axis) for axis in drawn[0].axes}
    assert panels == {
        "KL to the teacher": {"kd": ([10, 20, 30], [0.9, 0.5, 0.4]), "val_kl": ([20, 30], [0.6, 0.5])},
        "agreement with the teacher": {"val_agreement": ([30], [0.8])},
    }
    assert drawn[0].get_suptitle() == "full_dist_64"


def test_the_loss_has_a_panel_where_nothing_tells_its_terms(drawn, tmp_path):
    rows = [{"step": step, "loss": 1 / step, "temperature": 2.0, "tokens_per_s": 100.0 * step} for step in (1, 2, 3)]
    draw_curves(rows, tmp_path / "run.png")
    draw_curves([row | {"ce": 2.0, "val_teacher_ce": 0.3} for row in rows], tmp_path / "run.png")
    assert [[axis.get_title() for axis in figure.axes] for figure in drawn] == [["loss"], ["cross-entropy of the labels"]]


@pytest.mark.parametrize("rows", [
    [{"step": 1, "loss": 2.0}],
    [{"step": 1, "loss": 2.0, "grad_norm": float("inf")}, {"step": 2, "loss": float("nan"), "grad_norm": 1.0}],
])
def test_one_row_is_enough_and_broken_numbers_do_no_harm(rows, tmp_path):
    draw_curves(rows, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_row_there_is_no_picture(tmp_path):
    draw_curves([], tmp_path / "run.png")
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_curves_beside_its_rows_also_when_it_is_stopped(data, tmp_path):
    flags = {**TINY, "data_path": data / "sft_data.jsonl", "weights": "none", "dim": 32,
             "n_layers": 1, "n_heads": 2, "log_interval": 1, "eval_interval": 0, "val_path": "none"}
    log = tmp_path / "full_sft_32.jsonl"
    stopped = start("train_sft.py", **flags, out_dir=tmp_path, max_steps=100_000,
                    variables={"DRAW": 1})
    wait_until(lambda: log.exists() and log.read_text())
    stopped.send(signal.SIGINT)
    assert stopped.wait().code == 130
    assert log.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------ the picture of a report


RESULTS = {
    "teacher": [{"parameters": 9, "exact_match": 100.0, "questions": 4}],
    "students": [{"parameters": 3, "exact_match": score, "questions": 4} for score in (25.0, 75.0)],
    "other words": [{"parameters": 3, "exact_match": 0.0, "questions": 4}],
}


def test_the_picture_has_a_dot_for_each_model_and_a_line_for_the_reference(drawn, tmp_path):
    draw(RESULTS, "teacher", tmp_path / "report.png")
    (scores,) = drawn[0].axes
    assert [label.get_text() for label in scores.get_yticklabels()] == ["students", "other words"]     # the best on top
    assert lines_of(scores)["teacher"][0] == [100.0, 100.0]
    draw({"teacher": RESULTS["teacher"]}, "teacher", tmp_path / "report.png")
    assert [axis.get_title() for axis in drawn[1].axes] == ["4 held-out questions"]


def test_habits_are_clouds_around_the_truth(drawn, tmp_path):
    """Two questions of two answers, and one model."""
    habits = [[(0.75, 0.5), (0.25, 0.4)], [(0.75, 0.9), (0.25, 0.1)]]
    draw({"student": [{"parameters": 3, "habits": habits}]}, "student", tmp_path / "report.png")
    (axis,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[0.5, 0.9], [0.4, 0.1]]
    assert [bar.get_segments()[0][0][1] for bar in axis.collections] == [0.75, 0.25]


# ------------------------------------------------------------------------------------------------ several runs in one picture


def logs(folder):
    """Two logs, whose validations have val_ce in common."""
    for name, rows in (("a", [{"step": 1, "loss": 3.0}, {"step": 2, "val_ce": 2.0, "val_kl": 1.0}]),
                       ("b", [{"step": 2, "val_ce": 2.5}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"distilled={folder}/a.jsonl", f"alone={folder}/b.jsonl"]


@pytest.fixture
def plot(monkeypatch, capsys):
    """plot(logs=[...], out=path) is scripts/plot.py in this process. Returns what it printed."""
    def run(logs, out, **more):
        flags = [word for name, values in more.items() for word in (f"--{name}", *values)]
        monkeypatch.setattr("sys.argv", ["plot.py", "--logs", *logs, "--out", str(out), *flags])
        try:
            plot_main()
        except SystemExit as ended:
            return f"{capsys.readouterr().err}{ended.code}"
        return capsys.readouterr().out

    return run


def test_plot_draws_what_the_validations_of_all_runs_have_in_common(plot, tmp_path):
    picture = tmp_path / "curves.png"
    assert "val_ce of distilled, alone" in plot(logs(tmp_path), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_quantity_is_drawn_against_others_of_the_same_steps(plot, drawn, tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "val_ce": 2.0, "tokens": 50},
            {"step": 4, "val_ce": 1.0, "tokens": 90}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot([f"a={tmp_path}/a.jsonl"], tmp_path / "c.png", only=["val_ce"], against=["step", "tokens"])
    panels = {axis.get_xlabel(): lines_of(axis) for axis in drawn[0].axes}
    assert panels == {"step": {"a": ([2, 4], [2.0, 1.0])}, "tokens": {"a": ([50, 90], [2.0, 1.0])}}


@pytest.mark.parametrize("more, reason", [
    ({"only": ["val_ce"], "against": ["seconds"]}, "none of these logs has seconds"),
    ({"only": ["val_x"]},
     "none of these logs has val_x; name some of these with --only: loss, val_ce, val_kl"),
    ({"logs": ["nowhere.jsonl"]},
     "no log at nowhere.jsonl; a run writes NAME.jsonl beside its NAME.pth"),
    ({"logs": [__file__]}, "is no log; a run writes NAME.jsonl"),
    ({"out": "curves.txt"}, "--out curves.txt: a picture is written as FILE.png"),
])
def test_plot_says_what_it_cannot_draw(more, reason, plot, tmp_path):
    assert reason in plot(**{"logs": logs(tmp_path), "out": tmp_path / "curves.png"} | more)
