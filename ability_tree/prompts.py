"""
提示与回复：每个请求怎样措辞，每条回复怎样读懂；读不懂就说明原因，绝不猜。
Prompts and replies: how each request is worded and each reply is read. What cannot be read is refused with a reason.

    prompts = PROMPTS["json"]
    reply = agent.ask([prompts.write(("medicine", "cardiology"), seeds)], max_new_tokens=512)[0]
    prompts.read_question(reply)        # {"question": ..., "options": {"A": ..., ...}, "answer_idx": "B"}, or ValueError

Two wordings with the same methods:

    json        for instruct models. Replies are JSON, wherever it stands in the reply; thoughts, code fences, extra commas,
                backslashes of formulas, options as a list and answers as a text are put right
    miniworld   short lines, on which a tiny teacher can be trained:
                parts of: general/math               -> add, sub, mul
                parts of: general/math/add           -> none
                leaf of: what is 3 plus 4?           -> general/math/add
                new question: general/math/add       -> what is 3 plus 4? => 7
                what is 3 plus 4?                    -> 7

A path is a tuple of names from the root, which is the domain. Every ValueError of the read_... methods says in a few words
what is wrong, then a colon, then the case: the words can be counted.
"""

import json
import re
import string
from collections.abc import Iterator

from ability_tree.tree import clean, key_of, same
from dataset.formats import to_question

LETTERS = string.ascii_uppercase        # options are called A, B, C, ...
MAX_OPENINGS = 32                       # brackets of a reply at which JSON is looked for
NO_PARTS = "none"                       # of a leaf, in the miniworld wording
ARROW = " => "                          # between a question and its answer, in the miniworld wording
SHOWN = 80                              # characters of a reply that a reason quotes

BRACKET = re.compile(r"[{\[]")
THOUGHT = "</think>"                                                        # what stands before it is not the reply
BARE_BACKSLASH = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt])|\\')          # JSON knows these; \alpha it does not
EXTRA_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)   # a comma before a bracket, or a string to skip
OWN_LETTER = re.compile(r"\(?([A-Z])[.):：、]\s*(?=\S)")                     # "B. heart", "(B) heart"
SAID_LETTER = re.compile(r"(?:(?i:answer(?:_idx)?)|答案)(?:\W|(?i:is\b|option\b)|应|选|是|为)*([A-Z])(?![A-Za-z])")


def folded(text: str) -> str:
    """What options and questions are compared by: neither their case counts nor how wide their spaces are."""
    return " ".join(text.split()).casefold()


def name_of(path: tuple[str, ...]) -> str:
    """("miniworld", "general", "math") -> "general/math"; of the root its own name."""
    return "/".join(path[1:]) or path[0]


def short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


# ---- 1. JSON in a reply --------------------------------------------------------------------------

def values_in(reply: str) -> Iterator[dict | list]:
    """The JSON objects and lists of a reply, one after the other, none from within another; repaired where that is safe."""
    text, at = reply.rpartition(THOUGHT)[2], 0
    for _ in range(MAX_OPENINGS):
        opening = BRACKET.search(text, at)
        if opening is None:
            return
        at = opening.end()
        for rest in (text[opening.start():], mended(text[opening.start():])):
            try:
                value, end = json.JSONDecoder(strict=False).raw_decode(rest)    # not strict: line ends within strings
            except (ValueError, RecursionError):
                continue
            yield value
            text, at = rest, end
            break


def mended(text: str) -> str:
    """JSON without commas before closing brackets, and with the backslashes of formulas doubled."""
    text = BARE_BACKSLASH.sub(lambda found: found.group() if found.group(1) else "\\\\", text)
    return EXTRA_COMMA.sub(lambda found: found.group(1) or "", text)


# ---- 2. What a reply may say ---------------------------------------------------------------------

def checked_names(names) -> list[str]:
    """Names of abilities, each once. Raises ValueError for what is no list of names."""
    if isinstance(names, list):
        names = [name.get("name") if isinstance(name, dict) else name for name in names]
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"no list of names: {short(names)}")
    once = {}
    for name in map(clean, names):
        once.setdefault(key_of([name]), name)
    return list(once.values())


def checked_question(question, options, said) -> dict:
    """The row of a question: {"question", "options", "answer_idx"}.

    options     texts, as a list or under letters or numbers; numbers become texts, letters of their own are taken off
    said        the right one, as `letter_of` reads it; or the name under which it stands

    Raises ValueError for a part that is missing, an option that is there twice and an answer that is none of them.
    """
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
    if all(found and found.group(1) == letter for found, letter in zip(own, LETTERS)):
        texts = [text[found.end():] for found, text in zip(own, texts)]
    if len({folded(text) for text in texts}) < len(texts):
        raise ValueError(f"an option is there twice: {short(options)}")
    called = {str(name).strip().upper(): letter for name, letter in zip(options, LETTERS)}
    options = dict(zip(LETTERS, texts))
    said = str(said).strip() if isinstance(said, (str, int, float)) else ""
    answer = called.get(said) or letter_of(said, options)
    return checked_row({"question": question.strip(), "options": options, "answer_idx": answer})


def checked_row(row: dict) -> dict:
    """The row, if training can read it. Raises ValueError for characters that no text has."""
    to_question(row)
    for text in (row["question"], *row["options"].values()):
        if any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
            raise ValueError(f"a control character: {short(text)}")
        if "\ufffd" in text:        # bytes that are no UTF-8: half a Chinese character, say
            raise ValueError(f"half a character: {short(text)}")
    return row


def letter_of(said: str, options: dict[str, str]) -> str:
    """The option that a few words name: "B", "(B)", "b.", "B. heart", or its text. Raises ValueError if none."""
    bare = said.strip().strip("*_`'\"().:：。").strip()
    if bare in options:
        return bare
    same = [letter for letter, text in options.items() if folded(text) == folded(said) or folded(text) == folded(bare)]
    if same:
        return same[0]
    if bare.upper() in options:
        return bare.upper()
    found = OWN_LETTER.match(said.strip())
    if found and found.group(1) in options:
        return found.group(1)
    raise ValueError(f"the answer is none of the options: {short(said)}, not {', '.join(options)} or their texts")


def leaf_called(name: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The leaf of this name, with its root or without. Raises ValueError if there is none."""
    for leaf in leaves:
        if any(same(name.replace(">", "/"), called) for called in (name_of(leaf), "/".join(leaf))):
            return leaf
    raise ValueError(f"no leaf of the tree: {short(name)}")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# ---- 3. For instruct models ----------------------------------------------------------------------

class Json:
    writes_wrong_options = True         # with a new question come its wrong options

    def expand(self, path: tuple[str, ...], breadth: int) -> list[dict]:
        return user(
            f"We divide a domain into a tree of abilities. Domain: {path[0]}. Ability: {' > '.join(path)}.\n"
            f"Divide this ability into at most {breadth} narrower ones. They must not overlap, cover it together, and be "
            "testable by multiple-choice questions. Names are short, in the language of the domain's name.\n"
            'Reply with a JSON list of names and nothing else, like ["first", "second"]. If it cannot be divided: []')

    def read_names(self, reply: str) -> list[str]:
        """Raises ValueError if no list of names is in the reply."""
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
        lines = "\n".join(f"{number}. {' > '.join(leaf)}" for number, leaf in enumerate(leaves, start=1))
        return user(f"Which of these abilities does the question below test most?\n\n{lines}\n\nQuestion: {question}\n\n"
                    'Reply with its number as JSON and nothing else, like {"leaf": 1}')

    def read_leaf(self, reply: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
        """Raises ValueError if no leaf is named."""
        said = next((value["leaf"] for value in values_in(reply) if isinstance(value, dict) and "leaf" in value),
                    reply.rpartition(THOUGHT)[2].strip())
        said = " > ".join(map(str, said)) if isinstance(said, list) else str(said).strip()
        number = re.match(r"(\d{1,9})\b", said)
        if number:
            if not 1 <= int(number.group(1)) <= len(leaves):
                raise ValueError(f"no leaf of the tree: {short(said)}, they have the numbers 1 to {len(leaves)}")
            return leaves[int(number.group(1)) - 1]
        return leaf_called(said, leaves)

    def write(self, leaf: tuple[str, ...], seeds: list[dict], n_options: int = 4) -> list[dict]:
        shown = [{"question": seed["question"], "options": seed["options"], "answer_idx": seed["answer_idx"]}
                 for seed in seeds]
        examples = "".join(f"{json.dumps(seed, ensure_ascii=False)}\n" for seed in shown)
        form = {"question": "...", "options": {letter: "..." for letter in LETTERS[:n_options]}, "answer_idx": "A"}
        return user(
            f"Write one new multiple-choice question that tests this ability: {' > '.join(leaf)}.\n"
            + (f"Real questions of this ability:\n{examples}Yours asks for something else than they do, and is as hard.\n"
               if examples else "")
            + f"Of its {n_options} options exactly one is right; the others are plausible, and wrong beyond doubt. It can "
            "be understood by itself. Use the language of the ability and its questions.\n"
            f"Reply with one JSON object and nothing else: {json.dumps(form)}")

    def read_question(self, reply: str) -> dict:
        """Raises ValueError with the reason if there is no whole question in the reply."""
        for value in values_in(reply):
            if isinstance(value, dict) and "question" in value:
                said = value.get("answer_idx", value.get("answer"))
                return checked_question(value["question"], value.get("options"), said)
        raise ValueError(f"no JSON object with a question: {short(reply)}")

    def solve(self, row: dict) -> list[dict]:
        options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
        return user(f"{row['question']}\n{options}\n\nExactly one option is right. Reply with its letter as JSON, like "
                    '{"answer": "A"}')

    def read_letter(self, reply: str, row: dict) -> str:
        """Raises ValueError if none of the options is named."""
        reply = reply.rpartition(THOUGHT)[2].strip()
        for value in values_in(reply):
            if isinstance(value, dict) and ("answer" in value or "answer_idx" in value):
                return letter_of(str(value.get("answer", value.get("answer_idx"))), row["options"])
        said = [letter for letter in SAID_LETTER.findall(reply) if letter in row["options"]]
        return said[-1] if said else letter_of(reply, row["options"])


# ---- 4. For a tiny teacher -----------------------------------------------------------------------

class Miniworld:
    writes_wrong_options = False        # a new question comes with its answer alone

    def expand(self, path: tuple[str, ...], breadth: int) -> list[dict]:
        return user(f"parts of: {name_of(path)}")

    def read_names(self, reply: str) -> list[str]:
        """Raises ValueError for a reply of several lines and for an empty name."""
        if "\n" in reply.strip():
            raise ValueError(f"no list of names: {short(reply)}")
        return checked_names([] if same(reply, NO_PARTS) else reply.split(","))

    def classify(self, question: str, leaves: list[tuple[str, ...]]) -> list[dict]:
        return user(f"leaf of: {question}")

    def read_leaf(self, reply: str, leaves: list[tuple[str, ...]]) -> tuple[str, ...]:
        """Raises ValueError if no leaf is named."""
        return leaf_called(reply, leaves)

    def write(self, leaf: tuple[str, ...], seeds: list[dict], n_options: int = 4) -> list[dict]:
        """The seeds are not shown: a tiny teacher has learned the leaf's questions, and draws one."""
        return user(f"new question: {name_of(leaf)}")

    def read_question(self, reply: str) -> dict:
        """The row has one option, the right one. Raises ValueError without one arrow between two texts."""
        question, *answer = reply.split(ARROW.rstrip())
        if len(answer) != 1 or not question.strip() or not answer[0].strip():
            raise ValueError(f"no question => answer: {short(reply)}")
        return checked_row({"question": question.strip(), "options": {"A": answer[0].strip()}, "answer_idx": "A"})

    def solve(self, row: dict) -> list[dict]:
        return user(row["question"])

    def read_letter(self, reply: str, row: dict) -> str:
        """The option that the reply spells. Raises ValueError if none."""
        for letter, text in row["options"].items():
            if folded(text) == folded(reply):
                return letter
        raise ValueError(f"the answer is none of the options: {short(reply)}")


PROMPTS = {"json": Json(), "miniworld": Miniworld()}
