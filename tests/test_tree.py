"""
能力树的规律：两道题说明不了什么；枝是叶之和；新题偏向弱叶，也不忘强叶；存下再读不变。
Laws of the ability tree: two questions tell nothing, a branch is its leaves, new questions go to the weak and do not
forget the strong, and a tree is read as it was saved.
"""

import json
import math

import pytest
from matplotlib.figure import Figure

from ability_tree.tree import AbilityTree, Node, change, compare, main, wilson

ADD, MUL, HERB = ("world", "math", "add"), ("world", "math", "mul"), ("world", "clinic", "herb")


def results(path, correct, asked):
    return [(path, i < correct) for i in range(asked)]


@pytest.fixture
def tree():
    """add 9 of 10, mul 1 of 2, herb never asked."""
    tree = AbilityTree.from_paths([ADD, MUL, HERB])
    tree.update(results(ADD, 9, 10) + results(MUL, 1, 2), round=1)
    return tree


# ------------------------------------------------------------------------------------------- how sure a count makes us


@pytest.mark.parametrize("correct, asked, low, high", [
    (0, 0, 0, 1),
    (0, 2, 0, 3.8415 / (2 + 3.8415)),           # z^2 / (n + z^2), with z = 1.96
    (2, 2, 2 / (2 + 3.8415), 1),
    (5, 10, 0.2366, 0.7634),                    # 1/2 -+ z / (2 sqrt(n + z^2))
])
def test_the_interval_is_wilsons(correct, asked, low, high):
    assert wilson(correct, asked) == pytest.approx((low, high), abs=1e-4)


def test_two_questions_cannot_tell_the_best_from_the_worst_and_twenty_can():
    assert wilson(0, 2)[1] > wilson(2, 2)[0]
    assert wilson(0, 20)[1] < wilson(20, 20)[0]


@pytest.mark.parametrize("asked", [1, 7, 1000])
def test_right_and_wrong_mirror_each_other_and_the_interval_holds_the_accuracy(asked):
    for correct in (0, asked // 3, asked):
        low, high = wilson(correct, asked)
        assert wilson(asked - correct, asked) == pytest.approx((1 - high, 1 - low))
        assert 0 <= low <= correct / asked + 1e-12 and correct / asked - 1e-12 <= high <= 1


def test_the_posterior_mean_comes_from_a_half_and_goes_to_the_accuracy():
    def posterior(correct, asked):
        return Node("leaf", history=[{"round": 1, "asked": asked, "correct": correct}]).posterior()

    assert Node("leaf").posterior() == 1 / 2
    assert (posterior(0, 2), posterior(2, 2)) == (1 / 4, 3 / 4)
    assert posterior(0, 998) == 1 / 1000


# --------------------------------------------------------------------------------------------------- leaves and branches


def test_a_branch_is_the_sum_of_its_leaves(tree):
    math_branch = tree.find(ADD[:2])
    assert (math_branch.asked, math_branch.correct, math_branch.accuracy) == (12, 10, 10 / 12)
    assert (tree.root.asked, tree.root.correct) == (12, 10)
    assert tree.find(HERB).accuracy is None and tree.find(HERB).interval() == (0, 1)


def test_leaves_come_with_their_whole_paths_in_the_order_of_the_tree(tree):
    assert list(tree.leaves()) == [ADD, MUL, HERB]
    assert list(AbilityTree.from_paths([["world"]]).leaves()) == [("world",)]


def test_names_are_one_whatever_their_case_and_spaces_and_the_first_spelling_stays():
    tree = AbilityTree.from_paths([("World", "Next number"), ("world ", "next  NUMBER"), ("WORLD", "nextnumber\u200b", "x")])
    assert list(tree.leaves()) == [("World", "Next number", "x")]
    assert tree.find(("world", "NEXTNUMBER", "x\u200b")) is tree.leaves()["World", "Next number", "x"]


def test_a_leaf_that_grows_leaves_of_its_own_is_counted_by_them(tree):
    tree.add((*ADD, "carry"))
    assert tree.find(ADD).asked == 0 and tree.find(ADD).history == [{"round": 1, "asked": 10, "correct": 9}]


@pytest.mark.parametrize("path, why", [
    (("world", "math", "ad"), "no world / math / ad: nothing is called 'ad' below world / math (nearest: add)"),
    ((*ADD, "carry"), "it is a leaf"),
    (("moon", "math"), "of the domain 'moon', the tree of 'world'"),
    ("world", "a path is a list of names"),
    ([], "a path is a list of names"),
])
def test_a_path_that_is_not_in_the_tree_is_named_with_the_way_out(tree, path, why):
    with pytest.raises(ValueError) as error:
        tree.find(path)
    assert why in str(error.value)


@pytest.mark.parametrize("paths, why", [
    ([], "a tree of no paths"),
    ([ADD, ("moon", "math")], "of the domain 'moon', the tree of 'world'"),
    ([("world", " \u200b")], "an ability needs a name"),
])
def test_no_tree_is_made_of_no_paths_two_domains_or_nameless_abilities(paths, why):
    with pytest.raises(ValueError, match=why):
        AbilityTree.from_paths(paths)


# ---------------------------------------------------------------------------------------------------------------- rounds


def test_a_round_replaces_the_counts_of_what_it_asked_and_the_history_keeps_them(tree):
    tree.update(results(ADD, 3, 4), round=2)
    add, mul = tree.find(ADD), tree.find(MUL)
    assert (add.asked, add.correct) == (4, 3)
    assert add.history == [{"round": 1, "asked": 10, "correct": 9}, {"round": 2, "asked": 4, "correct": 3}]
    assert (mul.asked, mul.correct) == (2, 1) and len(mul.history) == 1


def test_a_round_told_twice_counts_once(tree):
    once = tree.text()
    tree.update(results(ADD, 9, 10), round=1)
    assert tree.text() == once and len(tree.find(ADD).history) == 1


def test_two_spellings_of_a_path_are_counted_as_one_leaf(tree):
    tree.update([(ADD, True), (("World", "Math", "Add"), False)], round=2)
    assert (tree.find(ADD).asked, tree.find(ADD).correct) == (2, 1)


@pytest.mark.parametrize("path, round, why", [
    (ADD[:2], 2, "world / math is no leaf: its questions are those of add, mul"),
    (("world", "art"), 2, "nothing is called 'art'"),
    (MUL, 0, "was asked in round 1, after round 0"),
])
def test_results_that_do_not_fit_change_nothing(tree, path, round, why):
    before = tree.text()
    with pytest.raises(ValueError, match=why):
        tree.update([(HERB, True), (path, True)], round)
    assert tree.text() == before


def test_two_halves_of_a_round_merged_are_the_whole_round():
    def tree_of(answers):
        tree = AbilityTree.from_paths([ADD, MUL])
        tree.update(answers, round=1)
        return tree

    answers = results(ADD, 3, 5) + results(MUL, 1, 4)
    halves = tree_of(answers[::2])
    halves.merge(tree_of(answers[1::2]))
    assert halves.root == tree_of(answers).root


def test_merging_joins_names_takes_what_is_new_and_leaves_the_other_alone(tree):
    other = AbilityTree.from_paths([("WORLD", "Math", "sub"), ("WORLD", "art")])
    tree.merge(other)
    assert list(tree.leaves()) == [ADD, MUL, ("world", "math", "sub"), HERB, ("world", "art")]
    tree.update([(("world", "art"), True)], round=2)
    assert other.root.asked == 0
    with pytest.raises(ValueError, match="domain 'moon'"):
        tree.merge(AbilityTree.from_paths([["moon"]]))


# -------------------------------------------------------------------------------------------------------- new questions


def test_the_weakest_come_first_and_ties_go_by_path(tree):
    # posterior means: add 10/12, mul 2/4, herb 1/2; clinic stands before math
    assert tree.weakest(9) == [HERB, MUL, ADD]
    assert tree.weakest(1) == [HERB]


def test_shares_are_proportional_to_weakness_with_a_part_for_all_alike(tree):
    # weakness: add 1/6, mul 1/2, herb 1/2, in sum 7/6
    assert tree.weights(floor=0) == pytest.approx({ADD: 1 / 7, MUL: 3 / 7, HERB: 3 / 7})
    assert tree.weights(floor=0.3) == pytest.approx({ADD: 0.1 + 0.1, MUL: 0.1 + 0.3, HERB: 0.1 + 0.3})
    assert tree.weights(power=2, floor=0) == pytest.approx({ADD: 1 / 19, MUL: 9 / 19, HERB: 9 / 19})
    # smoothing 4: 13/18, 5/10, 1/2, so that add's weakness is 5/18
    assert tree.weights(smoothing=4, floor=0)[ADD] == pytest.approx(5 / 23)


@pytest.mark.parametrize("power", [0, 1, 2, 1e4])
@pytest.mark.parametrize("floor", [0, 0.02, 1])
def test_shares_sum_to_one_and_none_is_below_its_floor(tree, power, floor):
    tree.find(ADD).history.append({"round": 2, "asked": 10**6, "correct": 10**6})
    shares = tree.weights(power=power, floor=floor)
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= floor / 3
    if power == 0 or floor == 1:
        assert list(shares.values()) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("wrong", [{"smoothing": 0}, {"power": -1}, {"floor": 1.5}])
def test_shares_out_of_range_are_refused(tree, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        tree.weights(**wrong)


# ----------------------------------------------------------------------------------------------------------------- files


def test_a_tree_is_read_as_it_was_saved_and_saved_again_to_the_same_bytes(tree, tmp_path):
    tree.update(results(ADD, 1, 2), round=2)
    tree.add(("world", "内科学", "\"heart\" \\ lungs"))
    tree.save(tmp_path / "new" / "tree.json")
    again = AbilityTree.load(tmp_path / "new" / "tree.json")
    again.save(tmp_path / "again.json")
    assert again.root == tree.root
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "tree.json").read_bytes()


def test_the_file_is_plain_json_that_says_what_is_known_of_every_node(tree, tmp_path):
    tree.save(tmp_path / "tree.json")
    text = (tmp_path / "tree.json").read_text(encoding="utf-8")
    root = json.loads(text)
    assert {key: root[key] for key in ("name", "asked", "correct", "accuracy")} == {
        "name": "world", "asked": 12, "correct": 10, "accuracy": 0.8333}
    herb = root["children"][1]["children"][0]
    assert herb == {"name": "herb", "asked": 0, "correct": 0, "accuracy": None, "interval": [0, 1]}
    assert max(len(line) for line in text.splitlines()) < 120
    assert len(text.splitlines()) == 2 * 5 + 1             # a node is a line, and one for its history or its children


def test_a_tree_written_by_hand_needs_names_only(tmp_path):
    (tmp_path / "tree.json").write_text('{"name": "world", "children": [{"name": "art"}, {"name": "math"}]}')
    assert list(AbilityTree.load(tmp_path / "tree.json").leaves()) == [("world", "art"), ("world", "math")]


@pytest.mark.parametrize("text, why", [
    ("{", "Expecting property name"),
    ("[]", "a node is an object with a name, not []"),
    ('{"name": 3}', "an ability has a text for a name, not 3"),
    ('{"name": "w", "asked": 5}', "w says asked 5, the last round of its history 0"),
    ('{"name": "w", "correct": 5, "children": [{"name": "a"}]}', "w says correct 5, its leaves 0"),
    ('{"name": "w", "children": [{"name": "a"}, {"name": "A "}]}', "w has two children called 'A'"),
    ('{"name": "w", "children": [{}]}', "below w: a node is an object with a name"),
    ('{"name": "w", "children": {}}', "history and children are lists"),
    ('{"name": "w", "history": [{"round": 1, "asked": 2, "correct": 3}]}', "w: its history has"),
    ('{"name": "w", "history": [{"round": 2, "asked": 2, "correct": 1}, {"round": 1, "asked": 2, "correct": 1}]}',
     "round after round"),
])
def test_a_file_that_is_no_tree_is_refused_by_name_with_the_node(text, why, tmp_path):
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(ValueError) as error:
        AbilityTree.load(tmp_path / "tree.json")
    assert why in str(error.value) and str(tmp_path / "tree.json") in str(error.value)


# -------------------------------------------------------------------------------------------------- what a reader is shown


def test_a_bar_is_full_where_the_interval_leaves_no_doubt(tree):
    # herb 0..1; mul 1 of 2: 0.09..0.91, in twentieths 2 and 18
    lines = {line.split()[0]: line for line in tree.text().splitlines()}
    assert lines["herb"].endswith(f"0/0      –  {'▒' * 20}")
    assert lines["mul"].endswith(f"1/2   50 %  {'█' * 2}{'▒' * 16}{'·' * 2}")


def test_columns_are_straight_beside_chinese_names(tree):
    tree.add(("world", "内科学"))
    chinese, other = (next(line for line in tree.text().splitlines() if name in line) for name in ("内科学", "herb"))
    assert chinese.index("0/0") + 3 == other.index("0/0")               # three characters of two columns each


def test_a_change_of_two_questions_is_no_news_and_one_of_fifty_is():
    def node(correct, asked):
        return Node("leaf", history=[{"round": 1, "asked": asked, "correct": correct}])

    difference, low, high = change(node(0, 2), node(1, 2))
    assert difference == 0.5 and low < 0 < high
    difference, low, high = change(node(0, 50), node(25, 50))
    assert difference == 0.5 and 0 < low < 0.5 < high
    # Newcombe 1998, Table II, row (a): 56 of 70 against 48 of 80
    assert change(node(48, 80), node(56, 70)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_the_comparison_has_a_row_per_leaf_of_either_tree_and_bold_where_something_changed(tree):
    after = AbilityTree.from_paths([("World", "Math", "Add"), ("world", "art | craft")])
    after.update(results(ADD, 2, 50), round=1)
    assert compare(tree, after).splitlines() == [
        "| ability | asked | accuracy | change, points (95 %) |",
        "|---|---:|---:|---:|",
        "| Math / Add | 10 → 50 | 90 % → 4 % | **-86 (-95 .. -54)** |",
        "| art \\| craft | 0 → 0 | – → – | – |",
        "| math / mul | 2 → 0 | 50 % → – | – |",
        "| clinic / herb | 0 → 0 | – → – | – |",
        "| all | 12 → 50 | 83 % → 4 % | **-79 (-92 .. -50)** |",
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_the_picture_names_every_node_and_has_a_dot_per_leaf_asked_and_a_ring_where_it_was(tree, drawn, tmp_path):
    after = AbilityTree.from_paths([ADD, MUL, HERB])
    after.update(results(ADD, 1, 4), round=2)
    after.draw(tmp_path / "tree.png", before=tree)
    boxes, intervals, _ = drawn[0].axes
    assert {text.get_text() for text in boxes.texts} == {"world", "math", "clinic", "add", "mul", "herb", "1/4", "0/0"}
    points = {(*line.get_xdata(), *line.get_ydata()): line.get_markerfacecolor() for line in intervals.lines
              if len(line.get_xdata()) == 1}
    assert {point for point, inside in points.items() if inside == "white"} == {(90, 0), (50, 1)}
    assert {point for point, inside in points.items() if inside != "white"} == {(25, 0)}


def test_a_hundred_leaves_keep_the_size_of_their_text_and_no_name_runs_into_its_counts(drawn, tmp_path):
    long = "an ability that has the long and winding name of number"
    AbilityTree.from_paths([("world", f"branch {i // 10}", f"{long} {i}") for i in range(100)]).draw(tmp_path / "tree.png")
    texts = drawn[0].axes[0].texts
    assert min(text.get_size() for text in texts) >= 8
    rows = {}
    for text in texts:
        if not text.get_rotation():
            rows.setdefault(text.get_position()[1], []).append(text.get_window_extent())
    assert len(rows) == 100
    for name, counts in rows.values():
        assert name.x1 < counts.x0 and name.height < 0.21 * drawn[0].dpi


@pytest.mark.parametrize("paths", [[["world"]], [["world", "内科学"], ["world", "$x$", "a", "b", "c"]]])
def test_any_tree_can_be_drawn(paths, tmp_path):
    AbilityTree.from_paths(paths).draw(tmp_path / "new" / "tree.png")
    assert (tmp_path / "new" / "tree.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_shows_the_tree_what_is_weakest_and_what_has_changed(tree, tmp_path, monkeypatch, capsys):
    tree.save(tmp_path / "before.json")
    tree.update(results(ADD, 0, 20), round=2)
    tree.save(tmp_path / "after.json")
    before, after, png = (str(tmp_path / name) for name in ("before.json", "after.json", "tree.png"))
    monkeypatch.setattr("sys.argv", ["tree", after, "--compare", before, "--png", png, "--weakest", "1"])
    main()
    printed = capsys.readouterr().out
    assert tree.text() in printed and compare(AbilityTree.load(before), tree) in printed
    assert "world / math / add\n" in printed and "world / math / mul\n" not in printed
    assert (tmp_path / "tree.png").exists()


def test_a_tree_that_is_not_there_is_named_with_the_command_that_makes_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tree", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert f"no ability tree at {tmp_path}/none.json. Make one: python -m ability_tree.create" in str(ended.value)
