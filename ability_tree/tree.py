"""
能力树：学生会什么、不会什么，以及我们对此有多大把握。
The ability tree: what a student can do, what it cannot do, and how certain that is.

    python -m ability_tree.tree TREE.json                                       as text
    python -m ability_tree.tree TREE.json --compare BEFORE.json --png OUT.png   changes, picture
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.tables import aligned, markdown, wilson
from runtime.args import checking_input, did_you_mean, make_parser, parse_args
from runtime.files import write_text
from runtime.pictures import new_figure, save_picture

BAR = 20            # characters of a bar: 5 % each


def change(before: "AbilityTree", after: "AbilityTree") -> tuple[float, float, float]:
    """(difference of the accuracies, lower and upper end of its 95 % interval), in -1..1.

    For independent sets of questions; too wide, hence safe, if both exams have the same ones.
    Newcombe 1998, Statistics in Medicine 17, 873-890, method 10.
    """
    p, q = before.accuracy, after.accuracy
    (p_low, p_high), (q_low, q_high) = before.interval(), after.interval()
    low, high = math.hypot(q - q_low, p_high - p), math.hypot(q_high - q, p - p_low)
    return q - p, q - p - low, q - p + high


def key_of(path) -> tuple[str, ...]:
    """The same for all spellings: "Next number", "next  Number" and "nextnumber"."""
    return tuple("".join(name.split()).casefold() for name in path)


def clean(name: str) -> str:
    """Single spaces. Raises ValueError if nothing is left."""
    if not name.split():
        raise ValueError(f"an ability needs a name; this is {name!r}")
    return " ".join(name.split())


def spell(path) -> str:
    return " / ".join(path)


@dataclass
class AbilityTree:
    """A node and all below it. A path is the names from the root down, the root's included.
    `history` has {"round", "asked", "correct"} per round that tested the node as a leaf: the
    numbers of questions and of correct answers. The last round counts."""

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
        """The accuracy to expect: the mean of Beta(correct + smoothing, wrong + smoothing), which
        at 1 is Laplace's rule. An untested leaf has 1/2; 2 of 2 have 3/4, 20 of 20 have 0.95."""
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
        """The node at this path. ValueError if it is missing, or with `grow` added."""
        if key_of(path[:1]) != key_of([self.name]):
            raise ValueError(f"the path {spell(path)} belongs to the domain {path[0]!r}, "
                             f"the tree to {self.name!r}")
        node = self
        for depth, name in enumerate(path[1:], start=1):
            known = {key_of([child.name]): child for child in node.children}
            child = known.get(key_of([name]))
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

        Other leaves keep their counts; of these leaves, counts of this round and later ones are
        replaced. Raises ValueError, before any change, for a path that is no leaf.
        """
        answers = {}                        # {key of a leaf: (leaf, [whether correct, ...])}
        for path, is_correct in results:
            leaf = self.find(path)
            if leaf.children:
                raise ValueError(f"{spell(path)} is no leaf: it divides into "
                                 f"{', '.join(child.name for child in leaf.children)}; give each "
                                 "question the path of a leaf")
            answers.setdefault(key_of(path), (leaf, []))[1].append(bool(is_correct))
        for leaf, right in answers.values():
            row = {"round": round, "asked": len(right), "correct": sum(right)}
            leaf.history = [*(old for old in leaf.history if old["round"] < round), row]

    def weakest(self) -> tuple[str, ...]:
        """The path of the leaf of the lowest posterior mean."""
        leaves = self.leaves()
        return min(leaves, key=lambda path: (leaves[path].posterior(), path))

    def weights(self, floor: float = 0.02, power: float = 1.0) -> dict[tuple[str, ...], float]:
        """{path of a leaf: its share of the new questions}, which sum to 1:

            floor / n + (1 - floor) * weakness / sum(weakness)
            weakness = (1 - posterior mean) ** power

        The floor, in equal parts for all n leaves, tests strong leaves again, or nobody would
        notice that they are forgotten. power 0: equal shares; above 1: mostly the weakest leaves.
        """
        weakness = {path: 1 - leaf.posterior() for path, leaf in self.leaves().items()}
        weakness = {path: weak ** power for path, weak in weakness.items()}
        total = sum(weakness.values())
        return {path: floor / len(weakness) + (1 - floor) * weak / total
                for path, weak in weakness.items()}

    def save(self, path):
        """As JSON. Everything but names, children and history is there for people to read."""
        write_text(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")

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
        """Only the name is required."""
        children = [cls.from_json(child) for child in row.get("children", [])]
        if len({key_of([child.name]) for child in children}) < len(children):
            raise ValueError(f"two children of {row['name']} have the same name; join them")
        return cls(clean(row["name"]), children, row.get("history", []))

    def text(self) -> str:
        """A line per node. Its bar is full up to the lower end of the 95 % interval and shaded up
        to the upper end."""
        rows = []
        for path, node in self.walk():
            low, high = (round(bound * BAR) for bound in node.interval())
            rows.append(["  " * (len(path) - 1) + node.name, f"{node.correct}/{node.asked}",
                         percent(node.accuracy),
                         "█" * low + "▒" * (high - low) + "·" * (BAR - high)])
        return aligned(rows, "lrrl")

    def draw(self, png, before: "AbilityTree | None" = None):
        """A row per node: the 95 % interval, the accuracy as a dot, and as a ring that `before`."""
        nodes = list(self.walk())
        old = {key_of(path): node for path, node in before.walk()} if before else {}
        figure = new_figure(7, 0.26 * len(nodes) + 0.6)
        axis = figure.add_subplot()
        for y, (path, node) in enumerate(nodes):
            then = old.get(key_of(path))
            axis.hlines(y, *(100 * bound for bound in node.interval()), linewidth=5,
                        color="C5" if node.asked else "0.9")
            if then and then.asked:
                axis.plot(100 * then.accuracy, y, "o", color="C0", markerfacecolor="white")
            if node.asked:
                axis.plot(100 * node.accuracy, y, "o", color="C0")
            axis.text(104, y, f"{node.correct}/{node.asked}", va="center")
        axis.set(xlim=(-3, 122), ylim=(len(nodes) - 0.5, -0.5), xticks=range(0, 101, 25),
                 xlabel="● accuracy, %   " + "○ before   " * bool(before) + "▬ 95 % interval")
        axis.set_yticks(range(len(nodes)), [spell(path[1:]) or self.name for path, _ in nodes])
        save_picture(figure, png)


def percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy:.0f} %"


def compare(before: AbilityTree, after: AbilityTree) -> str:
    """A Markdown table: a row per branch and leaf of either tree, and one for all. A change has its
    95 % interval and is bold where that excludes 0."""
    old, new = ({key_of(path): (path, node) for path, node in tree.walk() if node is not tree}
                for tree in (before, after))
    pairs, untested = [], ((), AbilityTree(""))
    for key, (path, _) in (new | {key: old[key] for key in old if key not in new}).items():
        then, now = (nodes.get(key, untested)[1] for nodes in (old, new))
        pairs.append((spell(path[1:]).replace("|", "\\|"), then, now))
    rows = [["ability", "asked", "accuracy", "change, points (95 %)"]]
    for name, then, now in [*pairs, ("all", before, after)]:
        points = "–"
        if then.asked and now.asked:
            difference, low, high = (100 * value for value in change(then, now))
            points = f"{difference:+.0f} ({low:+.0f} .. {high:+.0f})"
            points = f"**{points}**" if low > 0 or high < 0 else points
        rows.append([name, f"{then.asked} → {now.asked}",
                     f"{percent(then.accuracy)} → {percent(now.accuracy)}", points])
    return markdown(rows)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("tree", metavar="TREE.json", help="the ability tree to show")
    add("--compare", metavar="BEFORE.json", help="an earlier tree: adds a table of the changes")
    add("--png", metavar="FILE.png", help="file of a picture; with --compare, of both trees")
    args = parse_args(parser)

    with checking_input():
        tree = AbilityTree.load(args.tree)
        before = AbilityTree.load(args.compare) if args.compare else None
    print(tree.text())
    if before:
        print(f"\n{args.compare} → {args.tree}\n\n{compare(before, tree)}")
    if args.png:
        tree.draw(args.png, before)
        print(f"\n{args.png}: {len(tree.leaves())} leaves")


if __name__ == "__main__":
    main()
