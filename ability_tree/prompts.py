"""
提示与回复：每个请求怎样措辞，每条回复怎样解析；读不懂就说明原因，绝不猜。
Prompts and replies: the wording of each request and the parsing of each reply. The read_... methods
raise ValueError for a reply that cannot be read: the kind of problem, a colon, the case. A path is
a tuple of names from the root, which is the domain.
"""

import json
import re
import string
from collections.abc import Iterator
from contextlib import suppress

from ability_tree.tree import clean, key_of
from dataset.formats import to_question

LETTERS = string.ascii_uppercase        # names of the options
N_OPTIONS = 4                           # of a new question
MAX_OPENINGS = 32                       # brackets of a reply at which JSON may begin
NO_PARTS = "none"                       # miniworld: the parts of a leaf
ARROW = " => "                          # miniworld: between a question and its answer

THOUGHT = "</think>"                                                        # the reply follows it
OPENING = re.compile(r"[{\[]")                                              # of a JSON value
OWN_LETTER = re.compile(r"\(?([A-Z])[.):：、]\s*(?=\S)")                     # "B. heart", "(B) ..."
NAMED_LETTER = re.compile(                                                  # "The answer is B"
    r"(?:(?i:answer)|答案)(?:\W|(?i:is\b|option\b)|应|选|是|为)*([A-Z])(?![A-Za-z])")


def folded(text: str) -> str:
    """Options and questions are compared without case and extra spaces."""
    return " ".join(text.split()).casefold()


def name_of(path: tuple[str, ...]) -> str:
    """("miniworld", "general", "math") -> "general/math"; of the root its own name."""
    return "/".join(path[1:]) or path[0]


def short(value) -> str:
    return f"{value!r:.80}"


def nonempty(reply: str) -> str:
    if not reply.strip():
        raise ValueError("no reply: the prompt may be too long, or the endpoint failed")
    return reply


def values_in(reply: str) -> Iterator[dict | list]:
    """The outermost JSON objects and lists of a reply, in order."""
    text, start = reply.rpartition(THOUGHT)[2], 0
    decoder = json.JSONDecoder(strict=False)                # texts may have line breaks
    for _ in range(MAX_OPENINGS):
        opening = OPENING.search(text, start)
        if opening is None:
            return
        try:
            value, start = decoder.raw_decode(text, opening.start())
            yield value
        except (ValueError, RecursionError):
            start = opening.end()


def checked_names(names) -> list[str]:
    """Names of abilities, each once."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip()
                                              for name in names):
        raise ValueError(f"no list of names: {short(names)}")
    unique = {}
    for name in names:
        unique.setdefault(key_of([name]), clean(name))
    return list(unique.values())


def checked_question(question, options, answer) -> dict:
    """The row {"question", "options", "answer_idx"}. The options may be a list; the answer is read
    by letter_of."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question: {short(question)}")
    if isinstance(options, list):
        options = dict(zip(LETTERS, options))
    if not isinstance(options, dict) or len(options) < 2 or (
            "".join(options).upper() != LETTERS[:len(options)]):
        raise ValueError(f"no options: {short(options)}")
    texts = [str(text).strip() for text in options.values() if isinstance(text, (str, int, float))]
    if len(texts) < len(options) or "" in texts:
        raise ValueError(f"an option is no text: {short(options)}")
    if len(set(map(folded, texts))) < len(texts):
        raise ValueError(f"an option occurs twice: {short(options)}")
    options = dict(zip(LETTERS, texts))
    return checked_row(question, options, letter_of(str(answer), options))


def checked_row(question: str, options: dict[str, str], answer: str) -> dict:
    row = {"question": question.strip(), "options": options, "answer_idx": answer}
    to_question(row)            # raises ValueError for what training cannot read
    if "\ufffd" in "".join([question, *options.values()]):
        raise ValueError(f"half a character: {short(question)}")
    return row


def letter_of(answer: str, options: dict[str, str]) -> str:
    """The option that a short answer names: "B", "(B)", "b.", "B. heart", or its text."""
    bare = answer.strip().strip("*_`'\"().:：。").strip()
    same_text = [letter for letter, text in options.items()
                 if folded(text) in (folded(answer), folded(bare))]
    own = OWN_LETTER.match(answer.strip())
    # A text goes before its upper case: "b" is the option "b", if there is one, and else B.
    for letter in (bare, *same_text, bare.upper(), own and own[1]):
        if letter in options:
            return letter
    raise ValueError(f"the answer is none of the options: {short(answer)}, not "
                     f"{', '.join(options)} or their texts")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def with_options(row: dict) -> str:
    """The question and its options on lettered lines."""
    return to_question(row).messages[-1]["content"]


class Json:
    """JSON is found anywhere in a reply, after thoughts and in code fences."""

    writes_wrong_options = True         # a new question comes with its wrong options

    def expand(self, path: tuple[str, ...], breadth: int) -> list[dict]:
        return user(
            f"We divide a domain into a tree of abilities. Domain: {path[0]}. "
            f"Ability: {' > '.join(path)}.\n"
            f"Divide this ability into at most {breadth} narrower ones. They must not overlap, "
            "cover it together, and be testable by multiple-choice questions. Names are short, in "
            "the language of the domain's name.\nReply with a JSON list of names and nothing else, "
            'like ["first", "second"]. If it cannot be divided: []')

    def read_names(self, reply: str) -> list[str]:
        for value in values_in(reply):
            with suppress(ValueError):
                return checked_names(value)
        raise ValueError(f"no list of names: {short(reply)}")

    def classify(self, row: dict, leaves: list[tuple[str, ...]]) -> list[dict]:
        lines = "\n".join(f"{n}. {' > '.join(leaf)}" for n, leaf in enumerate(leaves, start=1))
        return user(f"Which of these abilities does the question below test most?\n\n{lines}\n\n"
                    f"Question: {with_options(row)}\n\n"
                    'Reply with its number as JSON and nothing else, like {"leaf": 1}')

    def read_leaf(self, reply: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
        number = re.search(r"\d{1,9}", reply.rpartition(THOUGHT)[2])
        if not number or not 1 <= int(number[0]) <= len(leaves):
            raise ValueError(f"no leaf of the tree: {short(reply)}")
        return leaves[int(number[0]) - 1]

    def write(self, leaf: tuple[str, ...], seeds: list[dict]) -> list[dict]:
        keys = "question", "options", "answer_idx"
        examples = "".join(json.dumps({key: seed[key] for key in keys}, ensure_ascii=False) + "\n"
                           for seed in seeds)
        form = dict(zip(keys, ("...", {letter: "..." for letter in LETTERS[:N_OPTIONS]}, "A")))
        return user(
            f"Write one new multiple-choice question that tests this ability: {' > '.join(leaf)}.\n"
            + (f"Real questions of this ability:\n{examples}Yours asks for something else than "
               "they do, and is as hard.\n" if examples else "")
            + f"Of its {N_OPTIONS} options exactly one is right; the others are plausible, and "
            "wrong beyond doubt. It can be understood by itself. Use the language of the ability "
            f"and its questions.\nReply with one JSON object and nothing else: {json.dumps(form)}")

    def read_question(self, reply: str) -> dict:
        for value in values_in(reply):
            if isinstance(value, dict) and "question" in value:
                return checked_question(value["question"], value.get("options"),
                                        value.get("answer_idx"))
        raise ValueError(f"no JSON object with a question: {short(reply)}")

    def solve(self, row: dict) -> list[dict]:
        return user(f"{with_options(row)}\n\nExactly one option is right. Reply with its letter as "
                    'JSON, like {"answer": "A"}')

    def read_letter(self, reply: str, row: dict) -> str:
        reply = reply.rpartition(THOUGHT)[2].strip()
        for value in values_in(reply):
            if isinstance(value, dict) and "answer" in value:
                return letter_of(str(value["answer"]), row["options"])
        named = [letter for letter in NAMED_LETTER.findall(reply) if letter in row["options"]]
        return named[-1] if named else letter_of(reply, row["options"])


class Miniworld:
    """Short lines, on which a tiny teacher can be trained:

        parts of: general/math               -> add, sub, mul
        parts of: general/math/add           -> none
        leaf of: what is 3 plus 4?           -> general/math/add
        new question: general/math/add       -> what is 3 plus 4? => 7
        what is 3 plus 4?                    -> 7
    """

    writes_wrong_options = False        # a new question comes with its answer alone

    def expand(self, path: tuple[str, ...], breadth: int) -> list[dict]:
        return user(f"parts of: {name_of(path)}")

    def read_names(self, reply: str) -> list[str]:
        if "\n" in reply.strip():
            raise ValueError(f"no list of names: {short(reply)}")
        return checked_names([] if folded(reply) == NO_PARTS else reply.split(","))

    def classify(self, row: dict, leaves: list[tuple[str, ...]]) -> list[dict]:
        return user(f"leaf of: {row['question']}")

    def read_leaf(self, reply: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
        for leaf in leaves:
            if key_of([reply]) == key_of([name_of(leaf)]):
                return leaf
        raise ValueError(f"no leaf of the tree: {short(reply)}")

    def write(self, leaf: tuple[str, ...], seeds: list[dict]) -> list[dict]:
        """Without the seeds: a tiny teacher has learned the leaf's questions and samples one."""
        return user(f"new question: {name_of(leaf)}")

    def read_question(self, reply: str) -> dict:
        """The row has the correct option only."""
        question, *answer = reply.split(ARROW.rstrip())
        if len(answer) != 1 or not question.strip() or not answer[0].strip():
            raise ValueError(f"no question => answer: {short(reply)}")
        return checked_row(question, {"A": answer[0].strip()}, "A")

    def solve(self, row: dict) -> list[dict]:
        return user(row["question"])

    def read_letter(self, reply: str, row: dict) -> str:
        """The option whose text the reply is."""
        for letter, text in row["options"].items():
            if folded(text) == folded(reply):
                return letter
        raise ValueError(f"the answer is none of the options: {short(reply)}")


PROMPTS = {"json": Json(), "miniworld": Miniworld()}
