"""
提示与回复：每个请求怎样措辞，每条回复怎样读懂；读不懂就说明原因，绝不猜。
Prompts and replies: the wording of each request and the parsing of each reply. The read_... methods
raise ValueError for a reply that cannot be read: the kind of problem, a colon, the case. A path is
a tuple of names from the root, which is the domain.
"""

import json
import re
import string
from collections.abc import Iterator

from ability_tree.tree import clean, key_of, same
from dataset.formats import to_question

LETTERS = string.ascii_uppercase        # names of the options
MAX_OPENINGS = 32                       # brackets of a reply at which JSON may begin
NO_PARTS = "none"                       # miniworld: the parts of a leaf
ARROW = " => "                          # miniworld: between a question and its answer

THOUGHT = "</think>"                                                        # the reply follows it
BARE_BACKSLASH = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt])|\\')          # \alpha is not JSON
EXTRA_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)   # or a string, unchanged
UNUSABLE = re.compile("[\x00-\x08\x0b-\x1f\ufffd]")                         # or invalid UTF-8
OWN_LETTER = re.compile(r"\(?([A-Z])[.):：、]\s*(?=\S)")                     # "B. heart", "(B) ..."
NAMED_LETTER = re.compile(                                                  # "The answer is B"
    r"(?:(?i:answer(?:_idx)?)|答案)(?:\W|(?i:is\b|option\b)|应|选|是|为)*([A-Z])(?![A-Za-z])")


def folded(text: str) -> str:
    """Options and questions are compared without case and extra spaces."""
    return " ".join(text.split()).casefold()


def name_of(path: tuple[str, ...]) -> str:
    """("miniworld", "general", "math") -> "general/math"; of the root its own name."""
    return "/".join(path[1:]) or path[0]


def short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def nonempty(reply: str) -> str:
    if not reply.strip():
        raise ValueError("no reply: the prompt may be too long, or the endpoint failed")
    return reply


def values_in(reply: str) -> Iterator[dict | list]:
    """The outermost JSON objects and lists of a reply, in order. Commas before closing brackets and
    the single backslashes of formulas are repaired."""
    text = reply.rpartition(THOUGHT)[2]
    for _ in range(MAX_OPENINGS):
        opening = re.search(r"[{\[]", text)
        if opening is None:
            return
        text = text[opening.start():]
        mended = BARE_BACKSLASH.sub(lambda found: found[0] if found[1] else "\\\\", text)
        mended = EXTRA_COMMA.sub(lambda found: found[1] or "", mended)
        for candidate in (text, mended):
            try:                                            # strict=False allows line breaks
                value, end = json.JSONDecoder(strict=False).raw_decode(candidate)
            except (ValueError, RecursionError):
                continue
            yield value
            text = candidate[end:]
            break
        else:
            text = text[1:]


def checked_names(names) -> list[str]:
    """Names of abilities, each once."""
    if isinstance(names, list):
        names = [name.get("name") if isinstance(name, dict) else name for name in names]
        if all(isinstance(name, str) and name.strip() for name in names):
            return [clean(name) for i, name in enumerate(names)
                    if not any(same(name, other) for other in names[:i])]
    raise ValueError(f"no list of names: {short(names)}")


def checked_question(question, options, answer) -> dict:
    """The row {"question", "options", "answer_idx"}. The options are a list or have letters or
    numbers, or letters in their texts; the answer is a key, or as letter_of reads it."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question: {short(question)}")
    if isinstance(options, list):
        options = dict(zip(LETTERS, options))
    if not isinstance(options, dict) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"no options: {short(options)}")
    texts = [str(text) if isinstance(text, (int, float)) else text for text in options.values()]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"an option is no text: {short(options)}")
    texts = [text.strip() for text in texts]
    own = [OWN_LETTER.match(text) for text in texts]
    if all(found and found[1] == letter for found, letter in zip(own, LETTERS)):
        texts = [text[found.end():] for found, text in zip(own, texts)]
    if len(set(map(folded, texts))) < len(texts):
        raise ValueError(f"an option occurs twice: {short(options)}")
    letters = {str(key).strip().upper(): letter for key, letter in zip(options, LETTERS)}
    options = dict(zip(LETTERS, texts))
    answer = str(answer).strip() if isinstance(answer, (str, int, float)) else ""
    return checked_row({"question": question.strip(), "options": options,
                        "answer_idx": letters.get(answer) or letter_of(answer, options)})


def checked_row(row: dict) -> dict:
    """The row, if training can use it."""
    to_question(row)
    for text in (row["question"], *row["options"].values()):
        if UNUSABLE.search(text):
            raise ValueError(f"a control or half a character: {short(text)}")
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


def leaf_called(name: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The leaf of this name, with its root or without."""
    for leaf in leaves:
        if key_of([name.replace(">", "/")]) in (key_of([name_of(leaf)]), key_of(["/".join(leaf)])):
            return leaf
    raise ValueError(f"no leaf of the tree: {short(name)}")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


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
            if isinstance(value, dict):
                lists = [each for each in value.values() if isinstance(each, list)]
                value = lists[0] if len(lists) == 1 else None
            try:
                return checked_names(value)
            except ValueError:
                continue
        raise ValueError(f"no list of names: {short(reply)}")

    def classify(self, question: str, leaves: list[tuple[str, ...]]) -> list[dict]:
        lines = "\n".join(f"{n}. {' > '.join(leaf)}" for n, leaf in enumerate(leaves, start=1))
        return user(f"Which of these abilities does the question below test most?\n\n{lines}\n\n"
                    f"Question: {question}\n\n"
                    'Reply with its number as JSON and nothing else, like {"leaf": 1}')

    def read_leaf(self, reply: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
        name = next((value["leaf"] for value in values_in(reply) if isinstance(value, dict)
                     and "leaf" in value), reply.rpartition(THOUGHT)[2])
        name = " > ".join(map(str, name)) if isinstance(name, list) else str(name).strip()
        number = re.match(r"(\d{1,9})\b", name)
        if number and 1 <= int(number[1]) <= len(leaves):
            return leaves[int(number[1]) - 1]
        return leaf_called(name, leaves)

    def write(self, leaf: tuple[str, ...], seeds: list[dict], n_options: int = 4) -> list[dict]:
        keys = "question", "options", "answer_idx"
        examples = "".join(json.dumps({key: seed[key] for key in keys}, ensure_ascii=False) + "\n"
                           for seed in seeds)
        form = dict(zip(keys, ("...", {letter: "..." for letter in LETTERS[:n_options]}, "A")))
        return user(
            f"Write one new multiple-choice question that tests this ability: {' > '.join(leaf)}.\n"
            + (f"Real questions of this ability:\n{examples}Yours asks for something else than "
               "they do, and is as hard.\n" if examples else "")
            + f"Of its {n_options} options exactly one is right; the others are plausible, and "
            "wrong beyond doubt. It can be understood by itself. Use the language of the ability "
            f"and its questions.\nReply with one JSON object and nothing else: {json.dumps(form)}")

    def read_question(self, reply: str) -> dict:
        for value in values_in(reply):
            if isinstance(value, dict) and "question" in value:
                return checked_question(value["question"], value.get("options"),
                                        value.get("answer_idx", value.get("answer")))
        raise ValueError(f"no JSON object with a question: {short(reply)}")

    def solve(self, row: dict) -> list[dict]:
        options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
        return user(f"{row['question']}\n{options}\n\nExactly one option is right. Reply with its "
                    'letter as JSON, like {"answer": "A"}')

    def read_letter(self, reply: str, row: dict) -> str:
        reply = reply.rpartition(THOUGHT)[2].strip()
        for value in values_in(reply):
            if isinstance(value, dict) and ("answer" in value or "answer_idx" in value):
                return letter_of(str(value.get("answer", value.get("answer_idx"))), row["options"])
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
        return checked_names([] if same(reply, NO_PARTS) else reply.split(","))

    def classify(self, question: str, leaves: list[tuple[str, ...]]) -> list[dict]:
        return user(f"leaf of: {question}")

    def read_leaf(self, reply: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
        return leaf_called(reply, leaves)

    def write(self, leaf: tuple[str, ...], seeds: list[dict], n_options: int = 4) -> list[dict]:
        """Without the seeds: a tiny teacher has learned the leaf's questions and samples one."""
        return user(f"new question: {name_of(leaf)}")

    def read_question(self, reply: str) -> dict:
        """The row has the correct option only."""
        question, *answer = reply.split(ARROW.rstrip())
        if len(answer) != 1 or not question.strip() or not answer[0].strip():
            raise ValueError(f"no question => answer: {short(reply)}")
        return checked_row({"question": question.strip(), "options": {"A": answer[0].strip()},
                            "answer_idx": "A"})

    def solve(self, row: dict) -> list[dict]:
        return user(row["question"])

    def read_letter(self, reply: str, row: dict) -> str:
        """The option whose text the reply is."""
        for letter, text in row["options"].items():
            if folded(text) == folded(reply):
                return letter
        raise ValueError(f"the answer is none of the options: {short(reply)}")


PROMPTS = {"json": Json(), "miniworld": Miniworld()}
