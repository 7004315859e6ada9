"""
样例：各模型对同一批问题的回答，并排成文。
Samples: the answers of several models to the same questions, side by side.
"""

from evaluation.exam import write_answers
from model.generate import generate


def spread(tests: dict[str, list], n: int) -> list:
    """n of the conversations, or else of the texts, evenly spread (evaluation.metrics.read_tests).
    """
    rows = tests["conversations"] or tests["texts"]
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def sample_answers(model, tokenizer, rows: list, max_new_tokens: int) -> list[str]:
    """Greedy answers to conversations, or continuations of texts after 16 tokens."""
    if rows and isinstance(rows[0], dict):
        asked = [row["messages"][:-1] for row in rows]
        return write_answers(model, tokenizer, asked, max_new_tokens)
    answers = generate(model, openings(tokenizer, rows), max_new_tokens, tokenizer.end_of_text)
    return [tokenizer.decode(ids) for ids in answers]


def openings(tokenizer, rows: list) -> list[list[int]]:
    """The ids of the prompts: conversations up to the last answer, or the first 16 tokens."""
    if rows and isinstance(rows[0], dict):
        return [ids for ids, _ in tokenizer.encode_chats(
            (row["messages"][:-1] for row in rows), add_generation_prompt=True)]
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return [begin + tokenizer.encode(text)[:16] for text in rows]


def side_by_side(rows: list, answers: dict[str, list[str]]) -> str:
    """Markdown: questions, the answers of the test file, and those of each model."""
    blocks = []
    for row, *given in zip(rows, *answers.values()):
        question, gold = ([turn["content"] for turn in row["messages"][-2:]]
                          if isinstance(row, dict) else (row, ""))
        shown = ({"the file": gold} if gold else {}) | dict(zip(answers, given))
        lines = [f"- **{label}**: {' '.join(text.split()) or '(nothing)'}"
                 for label, text in shown.items()]
        blocks.append("\n".join([f"> {question}".replace("\n", "\n> "), "", *lines]))
    return "\n\n".join(blocks)
