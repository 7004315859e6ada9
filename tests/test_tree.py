"""
能力树的规律：两道题说明不了什么；枝是叶之和；新题偏向弱叶，也不忘强叶；存下再读不变。
Laws of the ability tree: two questions say little, a branch is the sum of its leaves, new questions
go to weak leaves without forgetting strong ones, and a tree is loaded as it was saved.
"""

import json
import math
import shutil

import pytest
from matplotlib.figure import Figure

from ability_tree.tree import AbilityTree, change, compare, main
from evaluation.tables import wilson

ADD, MUL, HERB = ("world", "math", "add"), ("world", "math", "mul"), ("world", "clinic", "herb")


def results(path, correct, asked):
    return [(path, i < correct) for i in range(asked)]


def leaf(correct, asked):
    counts = {"round": 1, "asked": asked, "correct": correct}
    return AbilityTree("leaf", history=[counts])


@pytest.fixture
def tree():
    """add 9 of 10, mul 1 of 2, herb never tested."""
    tree = AbilityTree.from_paths([ADD, MUL, HERB])
    tree.update(results(ADD, 9, 10) + results(MUL, 1, 2), round=1)
    return tree


# ---- counts --------------------------------------------------------------------------------------

def test_the_interval_is_wilsons_and_contains_the_accuracy():
    for correct, asked, low, high in [
            (0, 0, 0, 1),
            (0, 2, 0, 3.8415 / (2 + 3.8415)),           # z^2 / (n + z^2), with z = 1.96
            (2, 2, 2 / (2 + 3.8415), 1),
            (5, 10, 0.2366, 0.7634)]:                   # 1/2 -+ z / (2 sqrt(n + z^2))
        assert wilson(correct, asked) == pytest.approx((low, high), abs=1e-4)
    for asked in (1, 7, 1000):
        for correct in (0, asked // 3, asked):
            low, high = wilson(correct, asked)
            assert wilson(asked - correct, asked) == pytest.approx((1 - high, 1 - low))
            assert 0 <= low <= correct / asked + 1e-12 and correct / asked - 1e-12 <= high <= 1


def test_two_questions_cannot_tell_the_best_from_the_worst_and_twenty_can():
    assert wilson(0, 2)[1] > wilson(2, 2)[0]
    assert wilson(0, 20)[1] < wilson(20, 20)[0]


def test_the_posterior_mean_goes_from_a_half_to_the_accuracy():
    assert AbilityTree("leaf").posterior() == 1 / 2
    assert (leaf(0, 2).posterior(), leaf(2, 2).posterior()) == (1 / 4, 3 / 4)
    assert leaf(0, 998).posterior() == 1 / 1000


def test_a_change_of_two_questions_is_not_significant_and_one_of_fifty_is():
    difference, low, high = change(leaf(0, 2), leaf(1, 2))
    assert difference == 0.5 and low < 0 < high
    difference, low, high = change(leaf(0, 50), leaf(25, 50))
    assert difference == 0.5 and 0 < low < 0.5 < high
    # Newcombe 1998, Table II, row (a): 56 of 70 against 48 of 80
    assert change(leaf(48, 80), leaf(56, 70)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


# ---- leaves and branches -------------------------------------------------------------------------

def test_a_branch_is_the_sum_of_its_leaves(tree):
    branch, herb = tree.find(ADD[:2]), tree.find(HERB)
    assert (branch.asked, branch.correct, branch.accuracy) == (12, 10, 10 / 12)
    assert (tree.asked, tree.correct) == (12, 10)
    assert herb.accuracy is None and herb.interval() == (0, 1)
    assert list(tree.leaves()) == [ADD, MUL, HERB]
    tree.find((*ADD, "carry"), grow=True)       # add is now counted by its own leaf
    assert tree.find(ADD).asked == 0 and len(tree.find(ADD).history) == 1


def test_names_are_equal_whatever_their_case_and_spaces_and_the_first_spelling_stays():
    tree = AbilityTree.from_paths([("World", "Next number"), ("world ", "next  NUMBER"),
                                   ("WORLD", "nextnumber", "x")])
    [(path, leaf)] = tree.leaves().items()
    assert path == ("World", "Next number", "x")
    assert tree.find(("world", "NEXTNUMBER", "X ")) is leaf


@pytest.mark.parametrize("path, why", [
    (("world", "math", "ad"),
     "no world / math / ad: there is no 'ad' below world / math (did you mean 'add'?)"),
    ((*ADD, "carry"), "it is a leaf"),
    (("moon", "math"), "belongs to the domain 'moon', the tree to 'world'"),
])
def test_a_path_that_the_tree_lacks_is_named_with_the_way_out(tree, path, why):
    with pytest.raises(ValueError) as error:
        tree.find(path)
    assert why in str(error.value)


@pytest.mark.parametrize("paths, why", [
    ([ADD, ("moon", "math")], "domain 'moon'"),
    ([("world", " ")], "an ability needs a name"),
])
def test_a_tree_has_one_domain_and_every_ability_a_name(paths, why):
    with pytest.raises(ValueError, match=why):
        AbilityTree.from_paths(paths)


# ---- rounds --------------------------------------------------------------------------------------

def test_a_round_replaces_the_counts_of_its_leaves_and_the_history_keeps_them(tree):
    tree.update(results(ADD, 3, 4), round=2)
    add, mul = tree.find(ADD), tree.find(MUL)
    assert (add.asked, add.correct) == (4, 3)
    assert add.history == [{"round": 1, "asked": 10, "correct": 9},
                           {"round": 2, "asked": 4, "correct": 3}]
    assert (mul.asked, mul.correct) == (2, 1) and len(mul.history) == 1


def test_the_same_round_twice_counts_once(tree):
    once = tree.text()
    tree.update(results(ADD, 9, 10), round=1)
    assert tree.text() == once and len(tree.find(ADD).history) == 1


def test_two_spellings_of_a_path_are_one_leaf(tree):
    tree.update([(ADD, True), (("World", "Math", "Add"), False)], round=2)
    assert (tree.find(ADD).asked, tree.find(ADD).correct) == (2, 1)


@pytest.mark.parametrize("path, round, why", [
    (ADD[:2], 2, "world / math is no leaf: it divides into add, mul"),
    (("world", "art"), 2, "there is no 'art'"),
])
def test_results_that_do_not_fit_change_nothing(tree, path, round, why):
    before = tree.text()
    with pytest.raises(ValueError, match=why):
        tree.update([(HERB, True), (path, True)], round)
    assert tree.text() == before


# ---- new questions -------------------------------------------------------------------------------

def test_the_weakest_has_the_lowest_mean_and_ties_go_by_path(tree):
    # posterior means: add 10/12, mul 2/4, herb 1/2; clinic stands before math
    assert tree.weakest() == HERB


def test_shares_are_proportional_to_weakness_with_an_equal_part_for_all(tree):
    # weakness: add 1/6, mul 1/2, herb 1/2, in sum 7/6
    assert tree.weights(floor=0) == pytest.approx({ADD: 1 / 7, MUL: 3 / 7, HERB: 3 / 7})
    assert tree.weights(floor=0.3) == pytest.approx({ADD: 0.2, MUL: 0.1 + 0.3, HERB: 0.1 + 0.3})
    assert tree.weights(power=2, floor=0) == pytest.approx({ADD: 1 / 19, MUL: 9 / 19, HERB: 9 / 19})


def test_shares_sum_to_one_and_none_is_below_its_floor(tree):
    tree.find(ADD).history.append({"round": 2, "asked": 10**6, "correct": 10**6})
    for power in (0, 1, 2, 10):
        for floor in (0, 0.02, 1):
            shares = tree.weights(power=power, floor=floor)
            assert math.fsum(shares.values()) == pytest.approx(1)
            assert min(shares.values()) >= floor / 3
            if power == 0 or floor == 1:
                assert list(shares.values()) == pytest.approx([1 / 3] * 3)


# ---- files ---------------------------------------------------------------------------------------

def test_a_tree_is_loaded_as_it_was_saved_and_saved_again_to_the_same_bytes(tree, tmp_path):
    tree.update(results(ADD, 1, 2), round=2)
    tree.find(("world", "内科学", "\"heart\" \\ [lungs] {x}"), grow=True)
    tree.save(tmp_path / "new" / "tree.json")
    again = AbilityTree.load(tmp_path / "new" / "tree.json")
    again.save(tmp_path / "again.json")
    assert again == tree
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new/tree.json").read_bytes()


def test_the_file_is_plain_json_with_the_numbers_of_every_node(tree, tmp_path):
    tree.save(tmp_path / "tree.json")
    root = json.loads((tmp_path / "tree.json").read_text(encoding="utf-8"))
    assert {key: root[key] for key in ("name", "asked", "correct", "accuracy")} == {
        "name": "world", "asked": 12, "correct": 10, "accuracy": 0.8333}
    assert root["children"][1]["children"][0] == {
        "name": "herb", "asked": 0, "correct": 0, "accuracy": None, "interval": [0, 1]}


def test_a_tree_written_by_hand_needs_names_only(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text('{"name": "world", "children": [{"name": "art"}, {"name": "math"}]}')
    assert list(AbilityTree.load(path).leaves()) == [("world", "art"), ("world", "math")]


@pytest.mark.parametrize("text, why", [
    ("{", "Expecting property name"),
    ("[]", "A node is an object with a name"),
    ('{"name": "w", "children": [{}]}', "A node is an object with a name"),
    ('{"name": "w", "children": [{"name": "a"}, {"name": "A "}]}', "two children of w have"),
])
def test_a_file_that_is_no_tree_is_named_with_the_node(text, why, tmp_path):
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(ValueError) as error:
        AbilityTree.load(tmp_path / "tree.json")
    assert why in str(error.value) and str(tmp_path / "tree.json") in str(error.value)


# ---- text and picture ----------------------------------------------------------------------------

def test_a_bar_is_full_where_the_interval_leaves_no_doubt_and_columns_are_straight(tree):
    tree.find(("world", "内科学"), grow=True)
    lines = {line.split()[0]: line for line in tree.text().splitlines()}
    # herb 0..1; mul 1 of 2: 0.09..0.91, in twentieths 2 and 18
    assert lines["herb"].endswith(f"0/0     –  {'▒' * 20}")
    assert lines["mul"].endswith(f"1/2  50 %  {'█' * 2}{'▒' * 16}{'·' * 2}")
    assert lines["内科学"].index("0/0") + 3 == lines["herb"].index("0/0")   # 3 of 2 columns each


def test_the_comparison_has_a_row_per_branch_and_leaf_of_either_tree_and_bold_changes(tree):
    after = AbilityTree.from_paths([("World", "Math", "Add"), ("world", "art | craft")])
    after.update(results(ADD, 2, 50), round=1)
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")]
             for line in compare(tree, after).splitlines()]
    assert table[2:] == [
        ["Math", "12 → 50", "83 % → 4 %", "**-79 (-92 .. -50)**"],
        ["Math / Add", "10 → 50", "90 % → 4 %", "**-86 (-95 .. -54)**"],
        ["art \\| craft", "0 → 0", "– → –", "–"],
        ["math / mul", "2 → 0", "50 % → –", "–"],
        ["clinic", "0 → 0", "– → –", "–"],
        ["clinic / herb", "0 → 0", "– → –", "–"],
        ["all", "12 → 50", "83 % → 4 %", "**-79 (-92 .. -50)**"]]


def test_the_picture_has_every_node_a_dot_where_it_is_and_a_ring_where_it_was(
        tree, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    after = AbilityTree.from_paths([ADD, MUL, HERB, ("world", "art")])
    after.update(results(ADD, 1, 4), round=2)
    after.draw(tmp_path / "tree.png", before=tree)
    [axis] = figures[0].axes
    assert {text.get_text() for text in axis.texts} == {"1/4", "0/0"}
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "world", "math", "math / add", "math / mul", "clinic", "clinic / herb", "art"]
    points = {(round(line.get_xdata()[0]), line.get_ydata()[0]): line.get_markerfacecolor()
              for line in axis.lines if len(line.get_xdata()) == 1}
    rings = {point for point, inside in points.items() if inside == "white"}
    assert rings == {(83, 0), (83, 1), (90, 2), (50, 3)}    # the branches too
    assert set(points) - rings == {(25, 0), (25, 1), (25, 2)}


def test_any_tree_can_be_drawn(tmp_path):
    for paths in ([["world"]], [["world", "内科学"], ["world", "$x$", "a", "b", "c"]]):
        AbilityTree.from_paths(paths).draw(tmp_path / "new" / "tree.png")
        assert (tmp_path / "new" / "tree.png").read_bytes()[:4] == b"\x89PNG"
        shutil.rmtree(tmp_path / "new")


def test_the_command_shows_the_tree_and_the_changes(
        tree, tmp_path, monkeypatch, capsys):
    before, after, png = (str(tmp_path / name) for name in ("old.json", "new.json", "tree.png"))
    tree.save(before)
    tree.update(results(ADD, 0, 20), round=2)
    tree.save(after)
    argv = ["tree", after, "--compare", before, "--png", png]
    monkeypatch.setattr("sys.argv", argv)
    main()
    printed = capsys.readouterr().out
    assert tree.text() in printed and compare(AbilityTree.load(before), tree) in printed
    assert (tmp_path / "tree.png").exists()

    monkeypatch.setattr("sys.argv", ["tree", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="no ability tree at .*none.json. Make one: python -m"):
        main()
