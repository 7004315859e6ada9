"""
能力树：学生会什么、不会什么，以及我们对此有多大把握。
The ability tree: what a student can do, what it cannot, and how sure we are of that.

    python -m ability_tree.tree TREE.json                                     as text
    python -m ability_tree.tree TREE.json --compare BEFORE.json --png OUT.png  what a round has changed, and a picture

The root is a domain, a leaf an ability that questions can be asked about, and a branch the sum of its leaves. Of a leaf
where k of n questions were right, three numbers are told:

    accuracy         k / n                     what happened
    posterior mean   (k + 1) / (n + 2)         what to expect: Laplace's rule, the mean of Beta(k + 1, n - k + 1)
    interval         Wilson's, 95 %            what else it may be: all rates that k of n do not speak against

A leaf with two questions knows nothing. At 0 of 2 its accuracy is 0 %, but its interval goes up to 66 %; at 2 of 2 it
comes down to 34 %, and the two overlap. The posterior mean says 25 % and 75 %, where 0 and 20 of 20 would be 5 % and
95 %. New questions are therefore drawn by the posterior mean: a leaf never asked (50 %) comes before one that is known to
be good, and after one that is known to be weak.

Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22, 209-212. The interval of a
change: Newcombe 1998, Interval estimation for the difference between independent proportions, Statistics in Medicine 17,
873-890, method 10.
"""

import argparse
import difflib
import functools
import json
import math
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from runtime.args import checking_input, parse_args
from runtime.files import write_atomic
from runtime.log import Logger


Z = 1.959964                    # 95 % of a normal distribution lie within so many standard deviations
BAR = 20                        # characters of a bar: 5 % each

# Reddish is weak, bluish strong: a pair that the colour-blind can tell apart.
WEAK, MIDDLE, STRONG, NOT_ASKED, INK = "#c8553d", "#f0dfb4", "#2b7a94", "#e3e3e3", "#2f2f2f"
# Those of these that are installed draw Chinese, Japanese and Korean names.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
         "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS")


# ------------------------------------------------------------------------------------------------------------- counts


def wilson(correct: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a rate, in 0..1; all of it where nothing was asked."""
    if not asked:
        return 0.0, 1.0
    rate, z2_n = correct / asked, Z * Z / asked
    centre = (rate + z2_n / 2) / (1 + z2_n)
    half = math.sqrt(rate * (1 - rate) * z2_n + z2_n * z2_n / 4) / (1 + z2_n)
    return max(0.0, centre - half), min(1.0, centre + half)


def change(before: "Node", after: "Node") -> tuple[float, float, float]:
    """(difference of the accuracies, its 95 % interval from .. to), in -1..1. Both nodes were asked.

    For two sets of questions drawn apart from each other. Where the same ones were asked twice it is too wide: who calls a
    change real by it errs on the safe side.
    """
    p, q = before.accuracy, after.accuracy
    (p_low, p_high), (q_low, q_high) = before.interval(), after.interval()
    return q - p, q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)


@dataclass
class Node:
    """An ability. `history` has a row {"round", "asked", "correct"} for each round in which it was asked as a leaf; the
    last one counts."""

    name: str
    children: dict[str, "Node"] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return self.count("asked")

    @property
    def correct(self) -> int:
        return self.count("correct")

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.asked if self.asked else None

    def count(self, what: str) -> int:
        """Of a branch, the sum over its leaves."""
        if self.children:
            return sum(child.count(what) for child in self.children.values())
        return self.history[-1][what] if self.history else 0

    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.asked)

    def posterior(self, smoothing: float = 1.0) -> float:
        """The accuracy, as if `smoothing` more questions had been right, and as many wrong."""
        return (self.correct + smoothing) / (self.asked + 2 * smoothing)

    def child(self, name: str) -> "Node | None":
        """The one of this name, whatever its case and spaces."""
        if name in self.children:
            return self.children[name]
        return next((child for other, child in self.children.items() if same(other, name)), None)


# -------------------------------------------------------------------------------------------------------------- names


def key_of(path) -> tuple[str, ...]:
    """One for all spellings: "Next number" is "next  Number" and "nextnumber". Who lists abilities is not that careful."""
    return tuple("".join(char for char in name if char.isprintable() and char != " ").casefold() for name in path)


def same(name: str, other: str) -> bool:
    return key_of([name]) == key_of([other])


def clean(name: str) -> str:
    """Single spaces, nothing unprintable. Raises ValueError if nothing is left."""
    if not isinstance(name, str):
        raise ValueError(f"an ability has a text for a name, not {name!r}")
    cleaned = " ".join("".join(char for char in name if char.isprintable() or char.isspace()).split())
    if not cleaned:
        raise ValueError(f"an ability needs a name; this is {name!r}")
    return cleaned


def spell(path) -> str:
    return " / ".join(path)


# --------------------------------------------------------------------------------------------------------------- tree


class AbilityTree:
    """Abilities below a domain. A path is the names from the root down, the root's among them."""

    def __init__(self, root: Node):
        self.root = root

    @classmethod
    def from_paths(cls, paths) -> "AbilityTree":
        """Raises ValueError for no paths, and for paths of several domains."""
        paths = list(paths)
        if not paths:
            raise ValueError("a tree of no paths: give at least one, such as ['clinical medicine', 'cardiology']")
        tree = cls(Node(clean(names(paths[0])[0])))
        for path in paths:
            tree.add(path)
        return tree

    def add(self, path) -> Node:
        """The node at this path, made with all above it where it was not there. Raises ValueError for another domain."""
        node = self._root_of(path)
        for name in names(path)[1:]:
            below = node.child(name)
            if below is None:
                below = Node(clean(name))
                node.children[below.name] = below
            node = below
        return node

    def find(self, path) -> Node:
        """Raises ValueError for a path that is not in the tree, with the nearest that is."""
        node = self._root_of(path)
        for depth, name in enumerate(names(path)[1:], start=1):
            below = node.child(name)
            if below is None:
                near = difflib.get_close_matches(name, node.children, n=1, cutoff=0.0)
                instead = f"nearest: {near[0]}" if near else "it is a leaf"
                raise ValueError(f"the ability tree has no {spell(path)}: nothing is called {name!r} below "
                                 f"{spell(path[:depth])} ({instead})")
            node = below
        return node

    def _root_of(self, path) -> Node:
        if not same(names(path)[0], self.root.name):
            raise ValueError(f"the path {spell(path)} is of the domain {path[0]!r}, the tree of {self.root.name!r}")
        return self.root

    def leaves(self) -> dict[tuple[str, ...], Node]:
        """{full path: leaf}, in the order of the tree."""
        found = {}

        def visit(node, path):
            if not node.children:
                found[path] = node
            for child in node.children.values():
                visit(child, (*path, child.name))

        visit(self.root, (self.root.name,))
        return found

    def merge(self, other: "AbilityTree"):
        """What the other tree has, into this one. Rounds that both have are added up: they asked different questions.
        Raises ValueError for another domain."""

        def into(mine, theirs):
            rounds = {row["round"]: dict(row) for row in mine.history}
            for row in theirs.history:
                known = rounds.setdefault(row["round"], {"round": row["round"], "asked": 0, "correct": 0})
                known["asked"] += row["asked"]
                known["correct"] += row["correct"]
            mine.history = [rounds[number] for number in sorted(rounds)]
            for child in theirs.children.values():
                into(mine.child(child.name) or mine.children.setdefault(child.name, Node(child.name)), child)

        into(self._root_of((other.root.name,)), other.root)

    def update(self, results, round: int):
        """(path of a leaf, was it right) for each question of a round: the counts of the leaves asked, and a row of their
        histories. A leaf that was not asked keeps its counts; a round that is told again replaces what was told of it.

        Raises ValueError, before anything is changed, for a path that is no leaf of this tree, and for a round before the
        last one of a leaf.
        """
        asked, correct, leaves = Counter(), Counter(), {}
        for path, right in results:
            path = names(path)
            if path not in leaves:
                leaves[path] = self._leaf_before(path, round)
            leaf = id(leaves[path])             # of which there may be several spellings
            asked[leaf] += 1
            correct[leaf] += bool(right)
        for leaf in leaves.values():
            earlier = [row for row in leaf.history if row["round"] < round]
            leaf.history = [*earlier, {"round": round, "asked": asked[id(leaf)], "correct": correct[id(leaf)]}]

    def _leaf_before(self, path, round: int) -> Node:
        leaf = self.find(path)
        if leaf.children:
            raise ValueError(f"{spell(path)} is no leaf: its questions are those of {', '.join(leaf.children)}; give each "
                             "question the path of a leaf")
        if leaf.history and leaf.history[-1]["round"] > round:
            raise ValueError(f"{spell(path)} was asked in round {leaf.history[-1]['round']}, after round {round}: take the "
                             "tree from before that round, or give this one a higher number")
        return leaf

    def weakest(self, n: int) -> list[tuple[str, ...]]:
        """The paths of the n leaves of the lowest posterior mean, the lowest first."""
        leaves = self.leaves()
        return sorted(leaves, key=lambda path: (leaves[path].posterior(), path))[:n]

    def weights(self, smoothing: float = 1.0, floor: float = 0.02, power: float = 1.0) -> dict[tuple[str, ...], float]:
        """{path of a leaf: its share of the new questions}, which sum to 1:

            floor / n + (1 - floor) * weakness / sum(weakness)      weakness = (1 - posterior mean) ** power

        smoothing: added to the right and to the wrong answers; the more, the less a few questions decide.
        floor:     of the questions, the part that goes to all n leaves alike: what is known is asked again, or it would
                   be forgotten unnoticed.
        power:     0 asks all alike, 1 by weakness, above 1 mostly the weakest.

        Raises ValueError for smoothing <= 0, power < 0, and a floor outside 0..1.
        """
        if smoothing <= 0 or power < 0 or not 0 <= floor <= 1:
            raise ValueError(f"smoothing {smoothing:g} must be above 0, power {power:g} 0 or more, floor {floor:g} in 0..1")
        weakness = {path: 1 - leaf.posterior(smoothing) for path, leaf in self.leaves().items()}
        most = max(weakness.values())           # is 1 to any power, where all others may come to nothing
        weakness = {path: (weak / most) ** power for path, weak in weakness.items()}
        total = sum(weakness.values())
        return {path: floor / len(weakness) + (1 - floor) * weak / total for path, weak in weakness.items()}

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, path):
        """As JSON, a node a paragraph. accuracy and interval are there for people; load does not read them."""
        text = "\n".join(json_lines(self.root)) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path) -> "AbilityTree":
        """Raises FileNotFoundError, or ValueError for what is no ability tree, naming file and node."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no ability tree at {path}. Make one: "
                                    "python -m ability_tree.create_initial_tree --help")
        try:
            return cls(node_of(json.loads(Path(path).read_text(encoding="utf-8-sig"))))
        except ValueError as error:             # not UTF-8, not JSON, or not a tree
            raise ValueError(f"{path} is no ability tree: {error}") from error

    # ------------------------------------------------------------------------------------------------------- pictures

    def text(self) -> str:
        """A line per node. Of its bar, the full part is what the 95 % interval leaves no doubt of, the shaded part where
        the truth may end."""
        rows = []

        def visit(node, depth):
            low, high = (round(bound * BAR) for bound in node.interval())
            bar = "█" * low + "▒" * (high - low) + "·" * (BAR - high)
            rows.append(("  " * depth + node.name, f"{node.correct}/{node.asked}", percent(node.accuracy), bar))
            for child in node.children.values():
                visit(child, depth + 1)

        visit(self.root, 0)
        names_width, counts_width = (max(width_of(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{name}{' ' * (names_width - width_of(name))}  {counts:>{counts_width}}  {accuracy:>5}  {bar}"
                 for name, counts, accuracy, bar in rows]
        return "\n".join(lines)

    def draw(self, png, before: "AbilityTree | None" = None):
        """The tree from left to right, a row per leaf, coloured by posterior mean; beside each leaf its accuracy and
        interval, and as a ring where it stood `before`."""
        figure = picture(self, before)
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(record=True) as missing:
            warnings.filterwarnings("always", message="Glyph")
            write_atomic(Path(png), lambda file: figure.savefig(file, format="png", dpi=120))
        if missing:
            Logger(f"{png}: no font on this machine has all characters of these names; {FONTS[0]} has them for Chinese")


def names(path) -> tuple[str, ...]:
    """A path as a tuple. Raises ValueError for what is none."""
    if isinstance(path, str) or not path or not all(isinstance(name, str) for name in path):
        raise ValueError(f"a path is a list of names from the domain down, such as ['clinical medicine', 'cardiology'], "
                         f"not {path!r}")
    return tuple(path)


# --------------------------------------------------------------------------------------------------------------- JSON


def json_lines(node: Node, indent: str = "") -> list[str]:
    low, high = node.interval()
    known = {"name": node.name, "asked": node.asked, "correct": node.correct,
             "accuracy": None if node.accuracy is None else round(node.accuracy, 4),
             "interval": [round(low, 4), round(high, 4)]}
    lines = [indent + "{" + json.dumps(known, ensure_ascii=False)[1:-1]]
    if node.history:
        lines[-1] += ","
        rows = f",\n{indent}             ".join(json.dumps(row) for row in node.history)
        lines.append(f"{indent} \"history\": [{rows}]")
    if node.children:
        lines[-1] += ","
        below = [json_lines(child, indent + "   ") for child in node.children.values()]
        for child in below[:-1]:
            child[-1] += ","
        lines += [f"{indent} \"children\": [", *(line for child in below for line in child)]
        lines[-1] += "]"
    lines[-1] += "}"
    return lines


def node_of(value, above: tuple[str, ...] = ()) -> Node:
    """A node of a file. Only the name is needed; raises ValueError for what contradicts itself."""
    where = f"below {spell(above)}: " if above else ""
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"{where}a node is an object with a name, not {json.dumps(value, ensure_ascii=False)[:60]}")
    node = Node(clean(value["name"]))
    path = (*above, node.name)
    rows, children = value.get("history", []), value.get("children", [])
    if not isinstance(rows, list) or not isinstance(children, list):
        raise ValueError(f"{spell(path)}: history and children are lists")
    for row in rows:
        if not is_round(row) or node.history and row["round"] <= node.history[-1]["round"]:
            raise ValueError(f"{spell(path)}: its history has {json.dumps(row)}; rows have round, asked and correct, whole "
                             "numbers, round after round, asked 1 or more and correct no more than asked")
        node.history.append({key: row[key] for key in ("round", "asked", "correct")})
    for each in children:
        child = node_of(each, path)
        if node.child(child.name):
            raise ValueError(f"{spell(path)} has two children called {child.name!r}; join them")
        node.children[child.name] = child
    for key, counted in (("asked", node.asked), ("correct", node.correct)):
        if value.get(key, counted) != counted:
            of = "its leaves" if node.children else "the last round of its history"
            raise ValueError(f"{spell(path)} says {key} {value[key]}, {of} {counted}; correct one, or leave {key} out")
    return node


def is_round(row) -> bool:
    return (isinstance(row, dict) and all(type(row.get(key)) is int for key in ("round", "asked", "correct"))
            and row["asked"] >= 1 and 0 <= row["correct"] <= row["asked"])


# --------------------------------------------------------------------------------------------------------------- text


def percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.0f} %"


def width_of(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def compare(before: AbilityTree, after: AbilityTree) -> str:
    """A Markdown table, a row per leaf of either tree, and one for all. The change has its 95 % interval, and is bold where
    that leaves out 0."""
    then, now = before.leaves(), after.leaves()
    spelled = {key_of(path): path for path in [*then, *now]}           # the later spelling
    then, now = ({key_of(path): leaf for path, leaf in leaves.items()} for leaves in (then, now))
    nowhere = Node("nowhere")
    rows = ["| ability | asked | accuracy | change, points (95 %) |", "|---|---:|---:|---:|"]
    for key in [*now, *(key for key in then if key not in now)]:
        path = spelled[key]
        rows.append(compare_row(spell(path[1:] or path), then.get(key, nowhere), now.get(key, nowhere)))
    rows.append(compare_row("all", before.root, after.root))
    return "\n".join(rows)


def compare_row(name: str, before: Node, after: Node) -> str:
    told = "–"
    if before.asked and after.asked:
        difference, low, high = (100 * value for value in change(before, after))
        told = f"{difference:+.0f} ({low:+.0f} .. {high:+.0f})"
        told = f"**{told}**" if low > 0 or high < 0 else told
    name = name.replace("|", "\\|")
    return (f"| {name} | {before.asked} → {after.asked} | {percent(before.accuracy)} → {percent(after.accuracy)} "
            f"| {told} |")


# ------------------------------------------------------------------------------------------------------------ picture


ROW = 0.30                      # inches of a leaf; up to 40 leaves, then less
CHARACTER = 0.0087              # inches that a character is wide, per point of its size
GAP = 0.25                      # inches around and between what is drawn
KEY = 3.4                       # inches that the key to the colours takes, below the tree


@dataclass
class Box:
    """A node's place, in inches from the top."""

    node: Node
    depth: int
    top: float
    bottom: float


def picture(tree: AbilityTree, before: AbilityTree | None):
    """The figure of AbilityTree.draw. Its size follows the leaves, so that text is as legible for a hundred as for ten."""
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    leaves = tree.leaves()
    row = min(ROW if len(leaves) <= 40 else 0.21, 400 / len(leaves))    # a side of a PNG has 65,535 pixels at most
    size = min(9.5, 40 * row)                                           # of the text, in points
    boxes = boxes_of(tree.root, row)
    edges, upright = columns(boxes, size)
    tree_width, height, scale_width = edges[-1], row * len(leaves), 3.0
    width, whole_height, below, above = 3 * GAP + tree_width + scale_width, height + 1.3, 0.75, 0.55

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    with rc_context({"font.family": fonts, "font.size": size, "text.color": INK, "text.parse_math": False}):
        figure = Figure(figsize=(width, whole_height))

        def axes(left, bottom, wide, high):
            return figure.add_axes((left / width, bottom / whole_height, wide / width, high / whole_height))

        draw_boxes(axes(GAP, below, tree_width, height), boxes, edges, upright, size)
        draw_intervals(axes(2 * GAP + tree_width, below, scale_width, height), leaves, before)
        draw_colours(axes(GAP, 0.35, 1.2, 0.11))
        low, high = (100 * bound for bound in tree.root.interval())
        right = f"{tree.root.correct} of {tree.root.asked} right: {percent(tree.root.accuracy)} ({low:.0f} .. {high:.0f})"
        title_at = 1 - above / 2 / whole_height
        figure.text(GAP / width, title_at, tree.root.name, size=14, va="center")
        figure.text(1 - GAP / width, title_at, right, size=9.5, ha="right", va="center")
    return figure


def boxes_of(root: Node, row: float) -> list[Box]:
    """`row` is the height of a leaf; a branch is as high as its leaves together."""
    boxes = []

    def visit(node, depth, top) -> float:
        box = Box(node, depth, top, top + row)
        boxes.append(box)
        bottom = top
        for child in node.children.values():
            bottom = visit(child, depth + 1, bottom)
        box.bottom = max(box.bottom, bottom)
        return box.bottom

    visit(root, 0, 0.0)
    return boxes


def columns(boxes: list[Box], size: float) -> tuple[list[float], set[int]]:
    """(edges of the columns, the depths at which the names of branches stand upright, where all of them fit so)."""
    last = max(box.depth for box in boxes)
    edges, upright = [0.0], set()
    for depth in range(last):
        branches = [box for box in boxes if box.depth == depth and box.node.children]
        lengths = [length_of(box.node.name, size) for box in branches]
        if all(length + 0.1 < box.bottom - box.top for length, box in zip(lengths, branches)):
            upright.add(depth)
        edges.append(edges[-1] + (0.3 if depth in upright else min(2.2, max(lengths) + 0.2)))
    ends = [edges[box.depth] + min(3.2, length_of(label_of(box.node), size) + 0.3) for box in boxes if not box.node.children]
    return [*edges, max(*ends, edges[-1] + 0.8, KEY)], upright


def label_of(leaf: Node) -> str:
    return f"{leaf.name}   {leaf.correct}/{leaf.asked}"


def length_of(text: str, size: float) -> float:
    """Inches, about."""
    return width_of(text) * size * CHARACTER


def shortened(text: str, size: float, room: float) -> str:
    """With an ellipsis where it is longer than `room` inches."""
    if length_of(text, size) <= room:
        return text
    while text and length_of(text + "…", size) > room:
        text = text[:-1]
    return text.rstrip() + "…"


@functools.cache
def colours():
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("ability", [WEAK, MIDDLE, STRONG])


def colour_of(node: Node):
    return colours()(node.posterior()) if node.asked else NOT_ASKED


def ink_on(colour) -> str:
    """Dark on light, white on dark."""
    from matplotlib.colors import to_rgb
    red, green, blue = to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def draw_boxes(axis, boxes, edges, upright, size):
    from matplotlib.patches import Rectangle

    axis.set(xlim=(0, edges[-1]), ylim=(boxes[0].bottom, 0))
    axis.axis("off")
    for box in boxes:
        node, left = box.node, edges[box.depth]
        right = edges[box.depth + 1] if node.children else edges[-1]
        colour, middle = colour_of(node), (box.top + box.bottom) / 2
        axis.add_patch(Rectangle((left, box.top), right - left, box.bottom - box.top, facecolor=colour, edgecolor="white"))
        ink = {"color": ink_on(colour), "va": "center", "clip_on": True}
        if not node.children:
            counts = f"{node.correct}/{node.asked}"
            room = right - left - length_of(counts, size) - 0.3
            axis.text(left + 0.08, middle, shortened(node.name, size, room), **ink)
            axis.text(right - 0.08, middle, counts, ha="right", alpha=0.75, **ink)
        elif box.depth in upright:
            axis.text((left + right) / 2, middle, node.name, ha="center", rotation=90, **ink)
        else:
            axis.text(left + 0.08, middle, shortened(node.name, size, right - left - 0.12), **ink)


def draw_intervals(axis, leaves, before):
    """A row per leaf: its accuracy as a dot, its interval as a line, and as a ring what it was before."""
    then = {key_of(path): leaf for path, leaf in before.leaves().items()} if before else {}
    for y, (path, leaf) in enumerate(leaves.items()):
        low, high = leaf.interval()
        axis.plot([100 * low, 100 * high], [y, y], color=colour_of(leaf), linewidth=5, solid_capstyle="butt")
        was = then.get(key_of(path))
        if was and was.asked:
            axis.plot(100 * was.accuracy, y, "o", markersize=5, markerfacecolor="white", color=INK)
        if leaf.asked:
            axis.plot(100 * leaf.accuracy, y, "o", markersize=5, color=INK)
    axis.set(xlim=(-3, 103), ylim=(len(leaves) - 0.5, -0.5), yticks=[], xticks=range(0, 101, 25),
             xlabel="● accuracy, %" + ("    ○ before" if then else "") + "    ▬ 95 % interval")
    axis.tick_params(top=True, labeltop=True, length=0, labelcolor=INK)
    axis.xaxis.label.set_color(INK)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)


def draw_colours(axis):
    """What the colours mean."""
    axis.imshow([[i / 99 for i in range(100)]], cmap=colours(), aspect="auto", extent=(0, 100, 0, 1))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.text(0, -0.4, "0", ha="left", va="top", size=8)
    axis.text(100, -0.4, "100", ha="right", va="top", size=8)
    axis.text(106, 0.5, "posterior mean, %   (grey: never asked)", va="center", size=8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tree", metavar="TREE.json", help="the ability tree to be shown")
    add("--compare", default=None, metavar="BEFORE.json", help="the tree as it was: adds a table of what has changed since")
    add("--png", type=Path, default=None, metavar="FILE.png", help="draws the tree; with --compare, rings where it was")
    add("--weakest", type=int, default=5, metavar="N", help="names so many of the weakest leaves, and their share of new "
                                                            "questions; 0: none")
    args = parse_args(parser)
    if args.weakest < 0:
        parser.error(f"--weakest {args.weakest} must be 0 or more")
    if args.png and args.png.suffix != ".png":
        parser.error(f"--png {args.png}: a picture is written as FILE.png")

    with checking_input():
        tree = AbilityTree.load(args.tree)
        before = AbilityTree.load(args.compare) if args.compare else None
    print(tree.text())
    if args.weakest:
        weights = tree.weights()
        print("\nweakest, and their shares of new questions:")
        for path in tree.weakest(args.weakest):
            print(f"{weights[path]:7.1%}  {spell(path)}")
    if before:
        print(f"\n{args.compare} → {args.tree}\n\n{compare(before, tree)}")
    if args.png:
        tree.draw(args.png, before)
        print(f"\n{args.png}: {len(tree.leaves())} leaves")


if __name__ == "__main__":
    main()
