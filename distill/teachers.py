"""
教师：内存里的一个或几个模型，或它们事先写在磁盘上的输出。
Teachers: one or several models in memory, or their cached outputs on disk; and which combinations
are possible.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dataset.lm_dataset import sample_key
from distill.cache import TeacherCache
from distill.fused import Dense, TopK
from runtime.files import file_sha256


class Teacher(NamedTuple):
    source: Any                 # a model (Transformer, WithoutAdapters), or a TeacherCache
    weight: float = 1.0         # several teachers act as one: p = sum of weight * p of each
    tokenizer: Any = None       # of a model

    def __str__(self):
        name = self.source.described() if self.is_cached else f"teacher {self.source.config}"
        return name if self.weight == 1.0 else f"{self.weight:.2g} x ({name})"

    @property
    def is_cached(self) -> bool:
        return isinstance(self.source, TeacherCache)


class TeacherOutputs(NamedTuple):
    """The teachers' outputs for one micro-batch, at its S supervised positions."""

    predictions: list[Dense] | TopK     # next-token distributions
    matched: torch.Tensor | None        # (S,) with another tokenizer: where the teacher is used
    out: Any                            # the model's whole Output, for intermediate-layer losses


def path_and_weight(spec: str) -> tuple[str, float]:
    """'PATH=WEIGHT', or 'PATH' with weight 1."""
    path, _, weight = spec.rpartition("=")
    try:
        return (spec, 1.0) if not path or Path(spec).exists() else (path, float(weight))
    except ValueError:
        raise ValueError(f"{spec}: {weight!r} is not a number; write PATH=WEIGHT, or PATH "
                         "alone") from None


def make_teachers(models, caches, device, load) -> list[Teacher]:
    """From --teacher and --teacher_cache, each 'PATH=WEIGHT' or 'PATH'; their weights normalised to
    sum to 1.

    load    path -> (model, tokenizer)
    """
    teachers = []
    for path, weight in map(path_and_weight, models or []):
        model, tokenizer = load(path)
        teachers.append(Teacher(model, weight, tokenizer))
    for path, weight in map(path_and_weight, caches or []):
        teachers.append(Teacher(TeacherCache(path).to(device), weight))
    if min(teacher.weight for teacher in teachers) <= 0:
        raise ValueError("the weight of a teacher must be above 0; leave out a teacher that is not "
                         "wanted")
    total = sum(teacher.weight for teacher in teachers)
    return [teacher._replace(weight=teacher.weight / total) for teacher in teachers]


def teacher_outputs(teachers: list[Teacher], batch, vocab_size: int | None = None,
                    return_hidden: bool = False) -> TeacherOutputs:
    """Run each teacher on the batch, or look it up in its cache. vocab_size: see
    trim_padded_vocab."""
    inputs, predictions, out = batch.teacher or batch, [], None
    for source, weight, _ in teachers:
        if isinstance(source, TeacherCache):
            found = source.look_up(batch.keys)
            if isinstance(found, TopK):                     # the only teacher: check_teachers
                return TeacherOutputs(found, None, None)
        else:
            out = source(inputs.tokens, inputs.lengths, at=inputs.at, with_logits=False,
                         return_hidden=return_hidden)
            found = Dense(out.final, source.head)
        head = found.head if batch.match is not None else trim_padded_vocab(found.head, vocab_size)
        predictions.append(Dense(found.states, head, weight))
    if batch.match is None:
        return TeacherOutputs(predictions, None, out)
    # With another tokenizer: only positions where both have read the same text are used; the others
    # get weight 0.
    states = predictions[0].states[batch.match.clamp_min(0)]
    return TeacherOutputs([predictions[0]._replace(states=states)], batch.match >= 0, out)


def trim_padded_vocab(head, vocab_size: int | None):  # (V, D) -> (V, D)
    """The rows of the first vocab_size tokens, without the padding with which a model family rounds
    its vocabulary up. None: all rows."""
    return head[:vocab_size] if vocab_size and len(head) > vocab_size else head


def check_vocabulary(teachers, student_config, tokenizer, divergence="forward_kl", pad_vocab=False):
    """Column v must be the same token in all distributions, except for ULD. (A cache is checked
    with the data.)"""
    for source, _, its_tokenizer in teachers:
        if divergence == "uld" or its_tokenizer is None:
            continue
        sizes = (f"the teacher's vocabulary has {source.config.vocab_size} tokens, the student's "
                 f"{student_config.vocab_size}; ")
        if its_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"{sizes}they belong to {its_tokenizer.path} and {tokenizer.path}. "
                             "Train both with one tokenizer, or compare sorted probabilities: "
                             "train_distillation.py --divergence uld --alpha 0.5")
        if source.config.vocab_size != student_config.vocab_size and not pad_vocab:
            raise ValueError(f"{sizes}the tokenizer has {tokenizer.vocab_size}. If the rest is "
                             "padding: --pad_vocab")


def teacher_side(teachers, tokenizer, paths, teacher_paths, max_seq_len: int):
    """(paths, tokenizer, context length) of a teacher that reads its own tokens of the same
    samples: it has another tokenizer, or privileged context in its prompts. None: all read the
    same.

    Raises ValueError for samples longer than the context of a teacher that reads them.
    """
    models = [teacher for teacher in teachers if not teacher.is_cached]
    for source, _, its_tokenizer in models:
        if teacher_paths or its_tokenizer.sha256 != tokenizer.sha256:
            return teacher_paths or paths, its_tokenizer, source.config.max_seq_len
        if max_seq_len > source.config.max_seq_len:
            raise ValueError(f"samples of up to {max_seq_len} tokens exceed the teacher's context "
                             f"length of {source.config.max_seq_len}: --max_seq_len "
                             f"{source.config.max_seq_len}")


def check_caches(teachers, data, pad_vocab=False):
    """Each cache of the teachers against the training and validation data (or None)."""
    for teacher in teachers:
        for part in data:
            if teacher.is_cached and part is not None:
                check_cache(teacher.source, part, pad_vocab)


def check_cache(cache: TeacherCache, data, pad_vocab=False):
    """Refuse a cache that was not written for these samples and this tokenizer."""
    tokenizer = data.tokenizer
    if cache.vocab_size != tokenizer.vocab_size and (cache.top_k or not pad_vocab):
        raise ValueError(f"{cache} has a vocabulary of {cache.vocab_size}, the tokenizer has "
                         f"{tokenizer.vocab_size} tokens. "
                         + ("Padding cannot be removed from top-k tokens: write it without --top_k"
                            if pad_vocab else "If the rest is padding: --pad_vocab"))
    cache.check(tokenizer.sha256, tokenizer.path, data.max_seq_len,
                {path: file_sha256(path) for path in data.paths},
                (sample_key(data.sample(i)) for i in range(len(data))),
                lambda i: f"{data}, sample {data.origins[i] + 1}")


def progressive_distillation(large_model, medium_model, small_model, train_loader, epochs=5, *,
                             distill):
    """large -> medium -> small: each student becomes the teacher assistant of the next. Returns the
    small one.

    medium_model    one, or a list from large to small; it may be empty
    distill         distill(teacher, student, train_loader, epochs) trains one student

    Mirzadeh et al. 2019, https://arxiv.org/abs/1902.03393.
    """
    assistants = medium_model if isinstance(medium_model, list) else [medium_model]
    teacher = large_model
    for student in (*assistants, small_model):
        distill(teacher=teacher, student=student, train_loader=train_loader, epochs=epochs)
        teacher = student
    return small_model
