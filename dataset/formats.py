"""
数据格式：把各种公开格式读成同一种消息列表；坏行连同文件名、行号一起报告。
Data formats: the common public formats (dataset.md), read as one message list. A bad line stops
with its place. read_rows splits a file into numbered rows; to_messages, to_question or to_text
then converts a row.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import dropwhile, groupby, islice
from pathlib import Path
from typing import NamedTuple

from runtime.args import COLUMNS

CONVERSATION_KEYS = ("conversations", "messages")
PROMPT_KEYS = ("question", "instruction", "prompt", "ask")
RESPONSE_KEYS = ("output", "response", "answer", "completion")
SYSTEM_KEYS = ("system", "system_prompt")
COLUMN_KEYS = (*PROMPT_KEYS, *RESPONSE_KEYS, *SYSTEM_KEYS, "input", "history", "options",
               "answer_idx")
TARGET_KEYS = ("weight", "train", "loss")   # of a turn; 0 or false: context, not to be learned
TOOL_KEYS = {"tool_calls", "function_call", "tools", "functions"}       # refused
EXAM_COLUMNS = ("question", "a", "b", "c", "d")     # multiple-choice CSV; "answer" holds a letter
CATEGORY_KEYS = ("leaf", "category", "subject", "department", "meta_info")

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "developer": "system"}

MAX_CSV_CELL = 4_000_000            # characters; Python's 131,072 are too few for some answers
END_OF_TEXT = "<|endoftext|>"       # a line of a .txt file
FINAL_ANSWER = "####"               # GSM8K: separates the calculation from the final number
# Two bytes of one of the 6,763 characters that simplified Chinese has in GB 2312 and GB18030.
HANZI = re.compile(rb"[\xb0-\xf7][\xa1-\xfe]")


class BadLine(ValueError):
    """A row that cannot be trained on. The message names file, line, value and the way out."""


# ---- 1. A file becomes numbered rows -----------------------------------------------------------

def read_rows(path: str | Path) -> Iterator[tuple[int, dict | str]]:
    """Yields (number, row), counted from 1: the line, or the item of a .json list (dataset.md). A
    row is a dict, or a str with the reason why the line cannot be read.

    UTF-8, with or without a byte order mark. With --columns, keys have our names: see `_renamed`.
    Raises FileNotFoundError; BadLine for a file in GB18030, a .json list or a table that cannot be
    parsed; ValueError for another kind of file.
    """
    path = Path(path)
    check_exists(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is not a kind of file that is read here. Convert it to "
                         f"{', '.join(READERS)}")
    _refuse_gb18030(path)
    rows = READERS[path.suffix.lower()](path)
    if not (given := os.environ.get(COLUMNS)):
        return rows
    columns = dict(pair.split("=", 1) for pair in given.splitlines())
    return ((number, _renamed(row, columns, path)) for number, row in rows)


def _renamed(row, columns: dict[str, str], path: Path):
    """columns: {our name: theirs}, in any case. The row has these columns alone, under our names,
    or is unchanged if it has none of them: its file is in a format that is known. Raises BadLine
    for a table without one of them: all its rows are alike."""
    if isinstance(row, str):
        return row
    keys = {key.lower(): key for key in row}
    missing = [theirs for theirs in columns.values() if theirs.lower() not in keys]
    if len(missing) == len(columns):
        return row
    if missing:
        said = f"--columns names {missing[0]!r}, and the columns are {', '.join(row)}"
        if READERS[path.suffix.lower()] is _rows_of_table:
            raise BadLine(f"{path}: {said}")
        return said
    return {ours: row[keys[theirs.lower()]] for ours, theirs in columns.items()}


def check_exists(path: Path):
    """Raises FileNotFoundError, with the command that generates a file of dataset/."""
    if not path.exists():
        generated = Path(__file__).resolve().parent in path.resolve().parents
        name = "reasoning" if path.parent.name == "reasoning" else "miniworld"
        way_out = f"Make it: python dataset/{name}.py" if generated else "Check the path."
        raise FileNotFoundError(f"no file at {path}. {way_out}")


def _refuse_gb18030(path: Path):
    """Raises BadLine if most lines that are not ASCII are no UTF-8 and have Chinese in GB18030, as
    Chinese spreadsheets save a CSV file: each would be a bad line, to be skipped."""
    def is_in(encoding, line):
        return line.decode(encoding, "ignore").encode(encoding) == line

    with open(path, "rb") as file:
        lines = [line for line in file.read(1 << 20).splitlines() if not line.isascii()]
    chinese = [line for line in lines if not is_in("utf-8", line) and is_in("gb18030", line)
               and HANZI.search(line)]
    if len(chinese) > len(lines) / 2:
        raise BadLine(f"{path} is GB18030, not UTF-8. Convert it: "
                      f"iconv -f GB18030 -t UTF-8 {path} > utf8{path.suffix}")


def _open(path, newline=None):
    # A byte that is not UTF-8 becomes a lone surrogate, as "\ud800" in JSON does. _check_text finds
    # both in their row; a strict decoder would stop without a line number.
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _rows_of_lines(path):
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = _object_or_reason(DECODER.decode(line.rstrip()))
            except json.JSONDecodeError as error:
                around = _short(line.rstrip()[max(error.pos - 20, 0):error.pos + 20])
                row = f"not a whole JSON object: {error.msg} in column {error.colno}, at {around}"
            except (ValueError, RecursionError) as error:   # a key twice, 100,000 nested brackets
                row = f"JSON that is not read: {error}"
            yield number, row


def _rows_of_json(path):
    """One list of objects, also as {"data": [...]}, or JSON lines under this name."""
    with _open(path) as file:
        text = file.read()
    try:
        items = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _rows_of_lines(path)
            return
        raise BadLine(f"{path}: {error}. Fix it there: a .json list is read completely or not at "
                      "all.") from None
    if isinstance(items, dict):
        name = next(iter(items), None)
        is_list = len(items) == 1 and isinstance(items[name], list)
        items = items[name] if is_list and name not in (*CONVERSATION_KEYS, "prompt") else [items]
    yield from enumerate(map(_object_or_reason, items), start=1)


def _object(pairs):
    """A JSON object as a dict. A key that stands twice would lose its first value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_short(twice)} stands twice in {_short(row)}")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _object_or_reason(row):
    return row if isinstance(row, dict) else f"{_short(row)} is not a JSON object {{...}}"


def _rows_of_table(path):
    """CSV. The separator is the one that the first line has most of: comma, semicolon or tab."""
    csv.field_size_limit(MAX_CSV_CELL)
    with _open(path, newline="") as file:   # the csv module finds line ends inside quotes itself
        first = next((line for line in file if not line.isspace()), "")
        file.seek(0)
        records = csv.reader(file, strict=True, delimiter=max(",;\t", key=first.count))
        header, end = None, 0
        try:
            for cells in records:
                number, end = end + 1, records.line_num     # a quoted cell may span several lines
                if not any(cells):          # a blank line, or a spreadsheet's row of commas
                    continue
                if header is None:
                    header = [cell.strip().lower() for cell in cells]
                    twice = [name for name in header if name and header.count(name) > 1]
                    if twice:
                        raise BadLine(f"{path}, line {number}: two columns are called "
                                      f"{_short(twice[0])}. Rename one.")
                elif len(cells) != len(header):
                    yield number, (f"{len(cells)} cells {_short(cells)}, where the header has "
                                   f"{len(header)}")
                else:
                    yield number, _with_options(dict(zip(header, cells)))
        except csv.Error as error:          # what follows a wrong quote cannot be trusted
            raise BadLine(f"{path}, line {end + 1}: not a CSV record: {error}. Fix it "
                          "there.") from None


def _with_options(row):
    """An exam record as {"question", "options", "answer_idx"}; other records are unchanged.
    An empty answer is left out: C-Eval's test questions have none."""
    if not row.keys() >= set(EXAM_COLUMNS):
        return row
    letter = row.pop("answer", "").strip().upper()
    options = {option: row.pop(option.lower()) for option in "ABCD"}
    return row | {"options": options} | ({"answer_idx": letter} if letter else {})


def _rows_of_txt(path):
    """Paragraphs; with lines <|endoftext|>, as in TinyStories, texts of several paragraphs."""
    with _open(path) as file:
        marked = any(line.strip() == END_OF_TEXT for line in islice(file, 10_000))
        file.seek(0)
        blocks = groupby(enumerate(file, start=1), key=lambda pair: (
            pair[1].strip() == END_OF_TEXT if marked else pair[1].isspace()))
        for is_end, block in blocks:
            lines = list(dropwhile(lambda pair: pair[1].isspace(), block))
            if lines and not is_end:
                yield lines[0][0], {"text": "".join(line for _, line in lines).rstrip("\n")}


READERS = {".jsonl": _rows_of_lines, ".json": _rows_of_json, ".csv": _rows_of_table,
           ".tsv": _rows_of_table, ".txt": _rows_of_txt}


# ---- 2. A row becomes messages, or text --------------------------------------------------------

def to_messages(row: dict) -> list[dict]:
    """One row of any format as [{"role", "content"}, ...]: an optional system turn, then user and
    assistant alternating, the assistant last. A turn that is not to be learned has "train": False.
    Other keys (id, meta_info) are ignored.

        {"instruction": "Add.", "input": "2 + 3", "output": "5"}     user: "Add.\\n2 + 3"
        {"question": "2 + 3 =", "options": {"A": "4", "B": "5"}, "answer_idx": "B"}
                                       user: "2 + 3 =\\nA. 4\\nB. 5"     assistant: "5"

    Raises ValueError with the reason, and the value shortened.
    """
    messages = _alternating(_turns(row, needs_answer=True))
    if messages and messages[-1]["role"] == "user":
        messages.pop()                          # a question without an answer teaches nothing
    if not any(turn["role"] == "assistant" and "train" not in turn for turn in messages):
        raise ValueError("no turn of the assistant is to be learned")
    return messages


def to_prompts(row: dict) -> list[dict]:
    """The same, also of a row without any answer: it gets an empty one, for a student to write."""
    messages, answer, _ = to_question(row)
    if answer is not None or any(message["role"] == "assistant" for message in messages):
        return to_messages(row)
    return [*messages, {"role": "assistant", "content": ""}]


class Question(NamedTuple):
    """A conversation up to the answer that a model is to give."""
    messages: list[dict]        # as in to_messages; the user's turn is the last
    answer: str | None          # the reference answer, if the row has one
    others: dict                # the other keys of the row: id, leaf, ...


def to_question(row: dict) -> Question:
    """One row of any format of to_messages, without its last answer, which may also be missing, or
    an empty cell. Raises ValueError with the reason."""
    messages = _alternating(_turns(row, needs_answer=False))
    if not messages or messages[-1]["role"] == "system":
        raise ValueError("no turn of the user, so there is nothing to answer")
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    is_conversation = any(key in row for key in CONVERSATION_KEYS)
    read = (*CONVERSATION_KEYS, *SYSTEM_KEYS) if is_conversation else COLUMN_KEYS
    return Question(messages, answer, {key: row[key] for key in row if key not in read})


def bare_question(row: dict) -> list[dict]:
    """The messages of a multiple choice row without its options."""
    left_out = ("options", "answer_idx", *RESPONSE_KEYS)
    return to_question({key: row[key] for key in row if key not in left_out}).messages


def to_text(row: dict) -> str:
    """The text of a pretraining row {"text": ...}. Raises ValueError with the reason."""
    if "text" not in row:
        raise ValueError(f"no 'text' (keys found: {_short(list(row))}; "
                         "pretraining rows are {text})")
    _check_text(row["text"], "text")
    if not row["text"].strip():
        raise ValueError("text is empty")
    return row["text"]


def holds_texts(path) -> bool:
    """Whether a file is for pretraining: its first readable row is a text and no conversation."""
    first = next((row for _, row in read_rows(path) if isinstance(row, dict)), {})
    return "text" in first and not any(key in first for key in (*CONVERSATION_KEYS, *PROMPT_KEYS))


def category(row: dict, default: str) -> str:
    """The first text among a row's CATEGORY_KEYS; else `default`."""
    names = (row[key] for key in CATEGORY_KEYS if key in row)
    return next((name for name in names if isinstance(name, str) and name.strip()), default)


def final_answer(text: str) -> str:
    """The text after the last ####, else all of it: "2 + 3 = <<2+3=5>>5\\n#### 5" -> "5"; without
    the thought before it, with single spaces for white space. GSM8K, Cobbe et al. 2021,
    https://arxiv.org/abs/2110.14168."""
    text = text.rpartition("</think>")[2]
    return " ".join((text.rpartition(FINAL_ANSWER)[2].strip() or text).split())


def is_right(given: str, gold: str) -> bool:
    return final_answer(given) == final_answer(gold)


def _alternating(turns) -> list[dict]:
    """Turns (where, role, content, whether it is learned) as messages. Others are refused, not
    merged: a turn was lost there. A user turn after the first may be empty: ShareGPT users press
    Enter to read on."""
    messages, expected = [], "user"
    for where, role, content, is_learned in turns:
        _check_text(content, where)
        empty = not content or content.isspace()
        if role == "system" and messages:
            raise ValueError(f"{where} is a system turn, which may only come first")
        if role not in (expected, "system"):
            raise ValueError(f"{where} has role {role}, expected {expected} (user and assistant "
                             "alternate, user first)")
        if empty and (role == "assistant" or role == "user" and len(messages) < 2):
            raise ValueError(f"{where} is an empty {role} turn")
        context = {"train": False} if role == "assistant" and not is_learned else {}
        if not empty or role != "system":
            messages.append({"role": role, "content": content, **context})
            expected = "assistant" if role == "user" else "user"
    return messages


def _turns(row, needs_answer):
    """The turns of a row of any format; without `needs_answer` the answer may be missing."""
    _refuse_tools(row, "the row")
    for key in SYSTEM_KEYS:
        if row.get(key):
            yield key, "system", row[key], True
    if key := _only_one(row, CONVERSATION_KEYS):
        yield from _turns_of_list(row[key], key)
    elif "options" in row:
        yield from _turns_of_choice(row, needs_answer)
    else:
        yield from _turns_of_columns(row, needs_answer)


def _only_one(row, keys) -> str | None:
    found = [key for key in keys if key in row]
    if len(found) > 1:
        raise ValueError(f"both {found[0]!r} and {found[1]!r} are there; remove or rename one")
    return found[0] if found else None


def _refuse_tools(holder, where):
    for key in holder.keys() & TOOL_KEYS:
        if holder[key] not in (None, "", "[]", [], {}):
            raise ValueError(f"{where} has {key}, and calls of tools are not read; write them into "
                             "the contents, or leave the row out")


def _turns_of_list(turns, key, is_learned=True):
    if isinstance(turns, str):                                          # a column of a table
        with suppress(ValueError, RecursionError):
            turns = DECODER.decode(turns)
    if not isinstance(turns, list):
        raise ValueError(f"{key} is {_short(turns)}, not a list of turns")
    for i, turn in enumerate(turns):
        where, role, content, its_own = _turn(turn, f"{key}[{i}]")
        yield where, role, content, is_learned and its_own


def _turn(turn, where):
    try:
        names = ("role", "content") if "role" in turn else ("from", "value")
        role, content = turn[names[0]], turn[names[1]]
    except (TypeError, KeyError):               # not a dict, or without these keys
        raise ValueError(f"{where} is {_short(turn)}, not a turn (known keys: role and content, "
                         "or from and value)") from None
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where} has role {_short(role)} (known: {', '.join(ROLES)})")
    if len(turn) == 2 and isinstance(content, str):         # nearly all, and fast
        return where, ROLES[role], content, True
    _refuse_tools(turn, where)
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError(f"{where} has the part {_short(part)}, which is no text")
            _check_text(part.get("text"), f"{where}: a part")
        content = "".join(part["text"] for part in content)
    if thought := turn.get("reasoning_content"):
        _check_text(content, where)
        _check_text(thought, f"{where}: reasoning_content")
        content = "<think>\n" + thought.strip("\n") + f"\n</think>\n\n{content}"
    marks = [turn[key] for key in TARGET_KEYS if turn.get(key) is not None]
    if any(mark not in (0, 1) for mark in marks):
        raise ValueError(f"{where} has {_short(marks)} as {'/'.join(TARGET_KEYS)}; a turn is "
                         "context (0, false) or learned (1, true)")
    return where, ROLES[role], content, all(marks)


def _turns_of_columns(row, needs_answer):
    prompt, response = _only_one(row, PROMPT_KEYS), _only_one(row, RESPONSE_KEYS)
    if not prompt or needs_answer and not response:
        raise ValueError(f"no known format (keys found: {_short(list(row))}; dataset/dataset.md "
                         "shows what is read; other names: --columns question=NAME answer=NAME; a "
                         "row with only text is for train_pretrain.py)")
    if isinstance(row[prompt], list):       # TRL's: turns to read, turns to learn
        yield from _turns_of_list(row[prompt], prompt, is_learned=False)
    else:
        yield prompt, "user", _question(row, prompt), True
    if response and isinstance(row[response], list):
        yield from _turns_of_list(row[response], response)
    elif response and (needs_answer or row[response] != ""):
        yield response, "assistant", row[response], True


def _turns_of_choice(row, needs_answer):
    key, options = _only_one(row, PROMPT_KEYS) or "question", row["options"]
    has_answer = "answer_idx" in row
    if needs_answer and not has_answer:
        raise ValueError("options without 'answer_idx' (in CSV: with an empty answer, or without "
                         "that column), so there is nothing to learn")
    if not isinstance(options, dict):
        raise ValueError(f'options is {_short(options)}, not an object {{"A": ..., "B": ...}}')
    for letter, text in options.items():
        _check_text(text, f"options[{_short(letter)}]")
    if has_answer and row["answer_idx"] not in list(options):
        raise ValueError(f"answer_idx is {_short(row['answer_idx'])}, "
                         f"which is none of the options {_short(list(options))}")
    _check_text(row.get(key), key)
    if not row[key].strip():
        raise ValueError(f"{key} is empty")
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    yield key, "user", "\n".join([_question(row, key), *lines]), True
    if has_answer:
        yield f"options[{row['answer_idx']!r}]", "assistant", options[row["answer_idx"]], True


def _question(row, key) -> str:
    """A question and the input below it."""
    if row.get("history"):
        raise ValueError("history is not read; write the earlier turns as conversations")
    if not row.get("input"):
        return row[key]
    _check_text(row["input"], "input")
    return f"{row[key]}\n{row['input']}" if row[key] else row["input"]


def _check_text(value, where):
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_short(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {value[error.start]!r} at character {error.start}, which "
                         "is not UTF-8") from None


def _short(value) -> str:
    """repr(value) in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- 3. A whole file ---------------------------------------------------------------------------
# These raise FileNotFoundError with the command that makes the file; BadLine at the first bad line
# (skip_bad_lines counts them instead, and logs one line); ValueError if no line is good.

def read_routes(path, names, convert: Callable, skip_bad_lines=False) -> list[int]:
    """For each row that `convert` reads, the place among `names` of its teacher: its key `teacher`,
    else the longest name that its category equals or begins with ("roads" for "roads/red"; default:
    the file's name without extension). With skip_bad_lines -1 for a row without a teacher."""
    stem = Path(path).stem

    def route(row):
        convert(row)                                # what is bad here, the data has left out
        given, group = row.get("teacher"), category(row, stem)
        fit = [name for name in names if given == name
               or not given and f"{group}/".startswith(f"{name}/")]
        if not fit and not skip_bad_lines:
            found = f"teacher is {_short(given)}" if given else f"category is {_short(group)}"
            raise ValueError(f"its {found}, and --teacher names {', '.join(names)}")
        return names.index(max(fit, key=len)) if fit else -1

    return read_each(path, route, skip_bad_lines, log=str)


def read_questions(path, skip_bad_lines=False, log=print) -> list[Question | None]:
    """Every question of a file, as to_question gives it, and None for each skipped bad line, so
    that two files stay aligned row by row."""
    return list(read_one_by_one(path, to_question, skip_bad_lines, log))


def read_each(path, convert: Callable, skip_bad_lines=False, log=print) -> list:
    """convert(row) of every row; a ValueError makes it a bad line."""
    converted = read_one_by_one(path, convert, skip_bad_lines, log)
    return [value for value in converted if value is not None]


def read_one_by_one(path, convert: Callable, skip_bad_lines=False, log=print) -> Iterator:
    """The same while the file is read, and None for each skipped bad line."""
    unit = "item" if Path(path).suffix.lower() == ".json" else "line"
    n_found, bad = 0, []
    for n_found, (number, row) in enumerate(read_rows(path), start=1):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            value = convert(row)
        except ValueError as error:
            if not skip_bad_lines:
                raise BadLine(f"{path}, {unit} {number}: {error}. Fix the {unit}, or pass "
                              "--skip_bad_lines to leave it out.") from None
            value = None
            bad.append(f"{unit} {number}: {error}")
        yield value
    first_bad = "; ".join([*bad[:3], *["..."] * (len(bad) > 3)])
    if not n_found:
        raise ValueError(f"{path} is empty: there is no {unit} to learn from")
    if len(bad) == n_found:
        raise ValueError(f"{path}: none of its {len(bad):,} {unit}s is good. {first_bad}")
    if bad:
        log(f"{path}: left out {len(bad):,} of {n_found:,} {unit}s. {first_bad}")


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or a folder's data files by name, without hidden files and subfolders."""
    path = Path(path)
    check_exists(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS
                   and file.is_file() and not file.name.startswith("."))
    if not files:
        raise ValueError(f"no file in {path} is one of {', '.join(READERS)}. Subfolders are not "
                         "searched: name the one that holds the files")
    return files
