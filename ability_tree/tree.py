"""
能力树：学生会什么、不会什么，以及我们对此有多大把握。
The ability tree: what a student can do, what it cannot do, and how certain that is.

    python -m ability_tree.tree TREE.json                                       as text
    python -m ability_tree.tree TREE.json --compare BEFORE.json --png OUT.png   changes, picture

The root is a domain. A leaf is an ability that questions test; a branch is the sum of its leaves.
A leaf where k of n answers are correct has three numbers:

    accuracy         k / n                what happened
    posterior mean   (k + 1) / (n + 2)    what to expect: Laplace's rule, the mean of
                                          Beta(k + 1, n - k + 1)
    interval         Wilson's, 95 %       all rates that k of n do not contradict

Two questions say little about a leaf. At 0 of 2 its accuracy is 0 %, but its interval reaches up to
66 %; at 2 of 2 the interval reaches down to 34 %, and the two overlap. The posterior mean is 25 %
and 75 %, where 0 and 20 of 20 would give 5 % and 95 %. New questions are therefore allocated by the
posterior mean: an untested leaf (50 %) comes after one that is known to be weak, and before one
that is known to be strong.

Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22, 209-212.
The interval of a change: Newcombe 1998, Interval estimation for the difference between independent
proportions, Statistics in Medicine 17, 873-890, method 10.
"""

import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runtime.args import checking_input, did_you_mean, make_parser, parse_args
from runtime.files import write_atomic
from runtime.log import Logger

Z = 1.959964        # 95 % of a normal distribution lie within this many standard deviations
BAR = 20            # characters of a bar: 5 % each

# From weak to strong, distinct for colour-blind readers too; and fonts with Chinese characters.
COLOURS, UNTESTED, INK = ("#c8553d", "#f0dfb4", "#2b7a94"), "#e3e3e3", "#2f2f2f"
FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC",
         "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS")


# ---- 1. Counts and names -------------------------------------------------------------------------

def wilson(correct: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a rate, in 0..1; all of it for 0 questions."""
    if not asked:
        return 0.0, 1.0
    rate, z2_n = correct / asked, Z * Z / asked
    centre = (rate + z2_n / 2) / (1 + z2_n)
    half = math.sqrt(rate * (1 - rate) * z2_n + z2_n * z2_n / 4) / (1 + z2_n)
    return max(0.0, centre - half), min(1.0, centre + half)


def change(before: "AbilityTree", after: "AbilityTree") -> tuple[float, float, float]:
    """(difference of the accuracies, lower and upper end of its 95 % interval), in -1..1.

    For independent sets of questions. If both exams have the same questions, the interval is too
    wide, which errs on the safe side.
    """
    p, q = before.accuracy, after.accuracy
    (p_low, p_high), (q_low, q_high) = before.interval(), after.interval()
    low, high = math.hypot(q - q_low, p_high - p), math.hypot(q_high - q, p - p_low)
    return q - p, q - p - low, q - p + high


def key_of(path) -> tuple[str, ...]:
    """The same for all spellings: "Next number", "next  Number" and "nextnumber"."""
    return tuple("".join(char for char in name if char.isprintable() and char != " ").casefold()
                 for name in path)


def same(name: str, other: str) -> bool:
    return key_of([name]) == key_of([other])


def clean(name: str) -> str:
    """Single spaces, nothing unprintable. Raises ValueError if nothing is left."""
    words = "".join(char for char in name if char.isprintable() or char.isspace()).split()
    if not words:
        raise ValueError(f"an ability needs a name; this is {name!r}")
    return " ".join(words)


def spell(path) -> str:
    return " / ".join(path)


# ---- 2. The tree ---------------------------------------------------------------------------------

@dataclass
class AbilityTree:
    """A node and all below it. A path is the names from the root down, the root's included.

    history   {"round", "asked", "correct"} per round that tested the node as a leaf: the numbers of
              questions and of correct answers. The last round counts.
    """

    name: str
    children: list["AbilityTree"] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)

    def count(self, key: str) -> int:
        if self.children:
            return sum(child.count(key) for child in self.children)
        return self.history[-1][key] if self.history else 0

    @property
    def asked(self) -> int:
        return self.count("asked")

    @property
    def correct(self) -> int:
        return self.count("correct")

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.asked if self.asked else None

    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.asked)

    def posterior(self, smoothing: float = 1.0) -> float:
        """The accuracy with `smoothing` correct and `smoothing` wrong answers added."""
        return (self.correct + smoothing) / (self.asked + 2 * smoothing)

    def walk(self, above: tuple[str, ...] = ()):
        """(path, node) of this node and all below it, parents first."""
        path = (*above, self.name)
        yield path, self
        for child in self.children:
            yield from child.walk(path)

    def leaves(self) -> dict[tuple[str, ...], "AbilityTree"]:
        return {path: node for path, node in self.walk() if not node.children}

    @classmethod
    def from_paths(cls, paths) -> "AbilityTree":
        """Raises ValueError for paths of several domains."""
        paths = list(paths)
        tree = cls(clean(paths[0][0]))
        for path in paths:
            tree.find(path, grow=True)
        return tree

    def find(self, path, grow: bool = False) -> "AbilityTree":
        """The node at this path. A missing one is added with `grow`; without, ValueError names the
        nearest. Raises ValueError for another domain."""
        if not same(path[0], self.name):
            raise ValueError(f"the path {spell(path)} belongs to the domain {path[0]!r}, "
                             f"the tree to {self.name!r}")
        node = self
        for depth, name in enumerate(path[1:], start=1):
            child = next((each for each in node.children if same(each.name, name)), None)
            if child is None and not grow:
                names = [each.name for each in node.children]
                hint = f"did you mean {did_you_mean(name, names)}?" if names else "it is a leaf"
                raise ValueError(f"the ability tree has no {spell(path)}: there is no {name!r} "
                                 f"below {spell(path[:depth])} ({hint})")
            if child is None:
                child = AbilityTree(clean(name))
                node.children.append(child)
            node = child
        return node

    def update(self, results, round: int):
        """Count (path of a leaf, whether the answer is correct) of each question of a round.

        Other leaves keep their counts; the same round again replaces its counts. Raises ValueError,
        before any change, for a path that is no leaf and for a round before the last.
        """
        asked, correct, leaves = Counter(), Counter(), {}
        for path, is_correct in results:
            key = key_of(path)              # a path may have several spellings
            leaf = leaves.setdefault(key, self.find(path))
            if leaf.children:
                raise ValueError(f"{spell(path)} is no leaf: it divides into "
                                 f"{', '.join(child.name for child in leaf.children)}; give each "
                                 "question the path of a leaf")
            last = leaf.history[-1]["round"] if leaf.history else round
            if last > round:
                raise ValueError(f"{spell(path)} has counts of round {last}, after round {round}: "
                                 "take the tree from before that round, or give this one a higher "
                                 "number")
            asked[key] += 1
            correct[key] += bool(is_correct)
        for key, leaf in leaves.items():
            earlier = [row for row in leaf.history if row["round"] < round]
            counts = {"round": round, "asked": asked[key], "correct": correct[key]}
            leaf.history = [*earlier, counts]

    def weakest(self, n: int) -> list[tuple[str, ...]]:
        """The paths of the n leaves of the lowest posterior mean, the lowest first."""
        leaves = self.leaves()
        return sorted(leaves, key=lambda path: (leaves[path].posterior(), path))[:n]

    def weights(self, smoothing: float = 1.0, floor: float = 0.02,
                power: float = 1.0) -> dict[tuple[str, ...], float]:
        """{path of a leaf: its share of the new questions}, which sum to 1:

            floor / n + (1 - floor) * weakness / sum(weakness)
            weakness = (1 - posterior mean) ** power

        smoothing  answers added to the correct and to the wrong ones
        floor      share that all n leaves get in equal parts: strong leaves are tested again, or
                   nobody would notice that they are forgotten
        power      0: equal shares; 1: by weakness; above 1: mostly the weakest
        """
        if smoothing <= 0 or power < 0 or not 0 <= floor <= 1:
            raise ValueError(f"smoothing {smoothing:g} must be above 0, power {power:g} 0 or more, "
                             f"floor {floor:g} in 0..1")
        weakness = {path: 1 - leaf.posterior(smoothing) for path, leaf in self.leaves().items()}
        most = max(weakness.values())       # divided by it, one stays 1 where high powers underflow
        weakness = {path: (weak / most) ** power for path, weak in weakness.items()}
        total = sum(weakness.values())
        return {path: floor / len(weakness) + (1 - floor) * weak / total
                for path, weak in weakness.items()}

    # -- files, text, picture --

    def save(self, path):
        """As JSON. accuracy and interval are there for people; load does not read them."""
        # The innermost lists and objects on one line each. Names have single spaces only.
        text = re.sub(r"\{[^][{}]*\}|\[[^][{}]*\]", lambda found: " ".join(found.group().split()),
                      json.dumps(self.to_json(), ensure_ascii=False, indent=1))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), lambda file: file.write(f"{text}\n".encode()))

    def to_json(self) -> dict:
        row = {"name": self.name, "asked": self.asked, "correct": self.correct,
               "accuracy": None if self.accuracy is None else round(self.accuracy, 4),
               "interval": [round(bound, 4) for bound in self.interval()]}
        if self.history:
            row["history"] = self.history
        if self.children:
            row["children"] = [child.to_json() for child in self.children]
        return row

    @classmethod
    def load(cls, path) -> "AbilityTree":
        """Raises FileNotFoundError, or ValueError with file and node for what is no tree."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no ability tree at {path}. Make one: "
                                    "python -m ability_tree.create_initial_tree --help")
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no ability tree: {error}. A node is an object with a name "
                             "and lists of its children and its history") from error

    @classmethod
    def from_json(cls, row: dict) -> "AbilityTree":
        """Only the name is required. Raises ValueError for counts that contradict each other."""
        children = [cls.from_json(child) for child in row.get("children", [])]
        node = cls(clean(row["name"]), children, row.get("history", []))
        if len({key_of([child.name]) for child in children}) < len(children):
            raise ValueError(f"two children of {node.name} have the same name; join them")
        for key, counted in (("asked", node.asked), ("correct", node.correct)):
            if row.get(key, counted) != counted:
                source = "its leaves have" if children else "the last round of its history has"
                raise ValueError(f"{node.name} has {key} {row[key]}, but {source} {counted}; "
                                 f"correct one, or leave {key} out")
        return node

    def text(self) -> str:
        """A line per node. Its bar is full up to the lower end of the 95 % interval and shaded up
        to the upper end."""
        rows = []
        for path, node in self.walk():
            low, high = (round(bound * BAR) for bound in node.interval())
            bar = "█" * low + "▒" * (high - low) + "·" * (BAR - high)
            rows.append(("  " * (len(path) - 1) + node.name, f"{node.correct}/{node.asked}",
                         percent(node.accuracy), bar))
        names, counts = (max(width_of(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{padded(row[0], names)}  {row[1]:>{counts}}  {row[2]:>5}  {row[3]}"
                         for row in rows)

    def draw(self, png, before: "AbilityTree | None" = None):
        """A row per node: name and counts, the 95 % interval in the colour of the posterior mean,
        the accuracy as a dot, and as a ring the accuracy `before`."""
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(record=True) as missing:
            warnings.filterwarnings("always", message="Glyph")
            write_atomic(Path(png), lambda file: picture(self, before).savefig(
                file, format="png", dpi=120, bbox_inches="tight"))
        if missing:
            Logger(f"{png}: no font on this machine has all characters of these names; install "
                   f"{FONTS[0]} for Chinese")


# ---- 3. Text and picture -------------------------------------------------------------------------

def percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.0f} %"


def width_of(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def padded(text: str, width: int) -> str:
    return text + " " * (width - width_of(text))


def compare(before: AbilityTree, after: AbilityTree) -> str:
    """A Markdown table: a row per leaf of either tree, and one for all. The change has its 95 %
    interval and is bold where that excludes 0."""
    old, new = ({key_of(path): (path, leaf) for path, leaf in tree.leaves().items()}
                for tree in (before, after))
    rows = []
    for key, (path, _) in (new | {key: old[key] for key in old if key not in new}).items():
        then, now = (leaves[key][1] if key in leaves else AbilityTree("") for leaves in (old, new))
        rows.append((spell(path[1:] or path).replace("|", "\\|"), then, now))
    lines = ["| ability | asked | accuracy | change, points (95 %) |", "|---|---:|---:|---:|"]
    for name, then, now in [*rows, ("all", before, after)]:
        points = "–"
        if then.asked and now.asked:
            difference, low, high = (100 * value for value in change(then, now))
            points = f"{difference:+.0f} ({low:+.0f} .. {high:+.0f})"
            points = f"**{points}**" if low > 0 or high < 0 else points
        lines.append(f"| {name} | {then.asked} → {now.asked} "
                     f"| {percent(then.accuracy)} → {percent(now.accuracy)} | {points} |")
    return "\n".join(lines)


def picture(tree: AbilityTree, before: AbilityTree | None):
    """The figure of AbilityTree.draw; its height follows the number of nodes."""
    from matplotlib import font_manager, rc_context
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    nodes = list(tree.walk())
    names = ["    " * (len(path) - 1) + node.name for path, node in nodes]
    left = 6.5 * max(map(width_of, names)) + 8      # points that the names take, left of the axis
    old = {key_of(path): node for path, node in before.walk()} if before else {}
    colour = LinearSegmentedColormap.from_list("ability", COLOURS)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    with rc_context({"font.family": fonts, "text.parse_math": False}):
        figure = Figure(figsize=(5, 0.26 * len(nodes) + 0.6))
        axis = figure.add_subplot()
        for y, (path, node) in enumerate(nodes):
            then, style = old.get(key_of(path)), {"va": "center"}
            style["weight"] = "bold" if node.children else "normal"
            axis.plot([100 * bound for bound in node.interval()], [y, y], linewidth=5,
                      color=colour(node.posterior()) if node.asked else UNTESTED)
            if then and then.asked:
                axis.plot(100 * then.accuracy, y, "o", color=INK, markerfacecolor="white")
            if node.asked:
                axis.plot(100 * node.accuracy, y, "o", color=INK, markersize=5)
            axis.annotate(names[y], (-3, y), (-left, 0), textcoords="offset points", **style)
            axis.text(104, y, f"{node.correct}/{node.asked}", **style)
        axis.set(xlim=(-3, 103), ylim=(len(nodes) - 0.5, -0.5), yticks=[], xticks=range(0, 101, 25),
                 xlabel="● accuracy, %   " + "○ before   " * bool(before) + "▬ 95 % interval")
        axis.grid(axis="x", color=UNTESTED)
        axis.set_axisbelow(True)
        axis.spines[:].set_visible(False)
    return figure


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("tree", metavar="TREE.json", help="the ability tree to show")
    add("--compare", metavar="BEFORE.json", help="an earlier tree: adds a table of the changes")
    add("--png", metavar="FILE.png", help="file of a picture; with --compare, of both trees")
    add("--weakest", type=int, default=5, metavar="N",
        help="number of the weakest leaves to list with their shares of new questions; 0: none")
    args = parse_args(parser)

    with checking_input():
        tree = AbilityTree.load(args.tree)
        before = AbilityTree.load(args.compare) if args.compare else None
    print(tree.text())
    if args.weakest:
        print("\nweakest leaves and their shares of new questions:")
        for path in tree.weakest(args.weakest):
            print(f"{tree.weights()[path]:7.1%}  {spell(path)}")
    if before:
        print(f"\n{args.compare} → {args.tree}\n\n{compare(before, tree)}")
    if args.png:
        tree.draw(args.png, before)
        print(f"\n{args.png}: {len(tree.leaves())} leaves")


if __name__ == "__main__":
    main()
