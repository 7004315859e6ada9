"""
教师：内存里的一个或几个模型，或它们的输出：每个样本只读一遍留在内存里，或事先写在磁盘上。
Teachers: one or several models in memory; or their outputs, kept in memory once they have read the
data, or cached on disk.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset.lm_dataset import in_order, sample_key
from distill.cache import TeacherCache
from distill.fused import Dense, TopK
from distill.served import ServedTeacher
from runtime.args import parse_teacher
from runtime.log import Logger
from runtime.precision import autocast
from runtime.processes import sum_over_processes

ROWS_AT_ONCE = 1 << 14          # of states that processes send each other


class Teacher(NamedTuple):
    source: Any                 # a model, StatesInMemory, TeacherCache or ServedTeacher
    weight: float = 1.0         # several teachers act as one: p = sum of weight * p of each
    tokenizer: Any = None       # of a model
    name: str = ""              # routed: it teaches the samples that name it, and no others

    def __str__(self):
        name = self.source.described() if self.is_cached else f"teacher {self.source.config}"
        name = f"{self.name} ({name})" if self.name else name
        return name if self.weight == 1.0 else f"{self.weight:.2g} x ({name})"

    @property
    def is_cached(self) -> bool:
        return isinstance(self.source, TeacherCache | ServedTeacher)


class StatesInMemory:
    """A frozen model that has read each sample of these datasets once: its final states at all
    supervised positions, looked up by sample. They have the dtype of the matrix products, to which
    the loss casts them anyway. Each process reads its share and holds all of them. The batches are
    always the same, so that a resumed run has the same states to the last bit."""

    @torch.no_grad()
    def __init__(self, model, datasets, world):
        self.model, self.config, self.device = model, model.config, world.device
        self.places, unread, n = {}, [], 0          # sample_key -> (begin, end); each sample once
        for data in datasets:
            new = []
            for i in range(len(data)):
                key, end = sample_key(data.sample(i)), n + int(data.n_targets[i])
                if key not in self.places:
                    self.places[key], n = (n, end), end
                    new.append(i)
            unread.append(data.view(np.array(new, dtype=int)))
        self.states = torch.zeros(n, self.config.dim, dtype=world.dtype)

        progress = tqdm(total=-(-len(self.places) // world.size), unit=" samples", mininterval=10,
                        disable=world.rank != 0)
        for data in unread:
            for batch in in_order(data, world.rank, world.size):
                batch = batch.to(world.device)
                with autocast(world.device, world.dtype):
                    out = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
                # The last batch of a process may be another's, without targets (in_order).
                places = [self.places[key] for key in batch.keys] if len(batch.at) else []
                sizes = [end - begin for begin, end in places]
                for (begin, end), states in zip(places, out.final.split(sizes)):
                    self.states[begin:end] = states
                progress.update(len(places))
        progress.close()
        for rows in self.states.split(ROWS_AT_ONCE) if world.size > 1 else ():
            rows.copy_(sum_over_processes(rows.to(world.device, torch.float32)))

    @property
    def head(self):  # -> (V, D)
        return self.model.head

    def look_up(self, keys) -> Dense:
        """The states of these samples, packed in the given order."""
        states = torch.cat([self.states[slice(*self.places[key])] for key in keys])
        return Dense(states.to(self.device), self.head)


class TeacherOutputs(NamedTuple):
    """The teachers' outputs for one micro-batch, at its S supervised positions."""

    predictions: list[Dense] | TopK     # next-token distributions
    matched: torch.Tensor | None        # (S,) with another tokenizer: where the teacher is used
    out: Any                            # the model's whole Output, for intermediate-layer losses


def make_teachers(models, caches, device, load, served=None) -> list[Teacher]:
    """Of --teacher and --teacher_cache, each as parse_teacher reads it, and a ServedTeacher. Their
    weights are normalised to sum to 1, unless each has a name. load: path -> (model, tokenizer)"""
    teachers = [Teacher(served.to(device))] if served else []
    for name, path, weight in map(parse_teacher, models or []):
        model, tokenizer = load(path)
        teachers.append(Teacher(model, weight, tokenizer, name))
    for name, path, weight in map(parse_teacher, caches or []):
        teachers.append(Teacher(TeacherCache(path).to(device), weight, None, name))
    if any(teacher.name for teacher in teachers):
        return teachers
    total = sum(teacher.weight for teacher in teachers)
    return [teacher._replace(weight=teacher.weight / total) for teacher in teachers]


def teacher_outputs(teachers: list[Teacher], batch, return_hidden: bool = False) -> TeacherOutputs:
    """Run each teacher on the batch, or on its part of it, or look it up in its cache."""
    whole = [(i, batch.teacher or batch) for i in range(len(teachers))]
    predictions, out, begin = [], None, 0
    for i, inputs in batch.parts or whole:
        source, weight, *_ = teachers[i]
        if isinstance(source, ServedTeacher):               # the only teacher
            return TeacherOutputs(source.look_up(batch), None, None)
        if isinstance(source, TeacherCache | StatesInMemory):
            found = source.look_up(inputs.keys)
            if isinstance(found, TopK):                     # the only teacher: check_teachers
                return TeacherOutputs(found, None, None)
        else:
            out = source(inputs.tokens, inputs.lengths, at=inputs.at, with_logits=False,
                         return_hidden=return_hidden)
            found = Dense(out.final, source.head)
        predictions.append(found._replace(weight=weight, begin=begin))
        begin += len(inputs.at) if batch.parts else 0
    if batch.match is None:
        return TeacherOutputs(predictions, None, out)
    # With another tokenizer: positions where the two have not read the same text get weight 0.
    return TeacherOutputs([predictions[0]._replace(batch=batch)], batch.span >= 0, out)


def share_vocabulary(teachers, students, divergence="forward_kl") -> bool:
    """Trim the logits of teachers and students, [(model, tokenizer), ...], to the tokens that all
    have, in place: the probability of a token that one of them lacks is left out, as padding is.

    Returns whether a teacher must read conversations in its own format, because it lacks a special
    token of the student's. Raises ValueError where an id is another token, except for gold.
    """
    for one in teachers:
        if isinstance(one.source, ServedTeacher):
            one.source.check(students[-1][1])
    everyone = [*teachers, *(Teacher(model, 1.0, tokenizer) for model, tokenizer in students)]
    vocabularies = [(each.source.about["ids"], each.source.about["tokenizer"]) if each.is_cached
                    else (each.tokenizer.ids, each.tokenizer.path) for each in everyone]
    own_format = across = False
    for (ids, path), teacher in zip(vocabularies, everyone):
        for _, tokenizer in students:
            conflict = tokenizer.conflict(ids)
            across |= conflict is not None
            if conflict and (teachers[1:] or teacher.is_cached or divergence != "gold"):
                raise ValueError(
                    f"the teacher's vocabulary has {teacher.source.n_tokens} tokens, the student's "
                    f"{tokenizer.vocab_size}, and {conflict}: {path}, {tokenizer.path}. Train both "
                    "with one tokenizer, or take one --teacher and --divergence gold")
            if not conflict and not teacher.is_cached and (reason := tokenizer.unreadable(ids)):
                own_format = True
                Logger(f"{path} cannot read the student's conversations, {reason}: as with "
                       "--teacher_data_path, the teacher reads its own tokens")
    if across:
        return own_format
    n = min(each.source.n_tokens for each in everyone)
    for (ids, path), (source, *_) in zip(vocabularies, everyone):
        if more := [name for name, i in ids["special_tokens"].items() if i >= n]:
            Logger(f"{path}: not all have {', '.join(more)}; its logits are left out")
        if source.n_tokens > n and isinstance(source, TeacherCache) and source.sparse:
            raise ValueError(f"{source} holds the {source.sparse} of {source.n_tokens}, of which "
                             f"the student has {n}. Write it again with --tokenizer "
                             f"{students[-1][1].path}")
        source.n_tokens = n
    return own_format


def teacher_side(teachers, tokenizer, paths, teacher_paths, max_seq_len: int):
    """(paths, tokenizer, context length) of a teacher that reads its own tokens of the same
    samples: it has another tokenizer, or privileged context in its prompts. None: all read the
    same, in the student's format.

    Raises ValueError for samples longer than the context of a teacher that reads them.
    """
    for source, _, its_tokenizer, _ in teachers:
        if isinstance(source, TeacherCache):
            continue
        its_tokenizer = its_tokenizer or tokenizer          # a ServedTeacher's is the student's
        if teacher_paths or tokenizer.conflict(its_tokenizer.ids):
            return teacher_paths or paths, its_tokenizer, source.config.max_seq_len
        if differ := [name for name in ("chat", "bos", "end_of_text")
                      if getattr(its_tokenizer, name) != getattr(tokenizer, name)]:
            Logger(f"the formats differ in {' and '.join(differ)}: teacher and student read that "
                   f"of {tokenizer.path}, not that of {its_tokenizer.path}")
        if max_seq_len > source.config.max_seq_len:
            limit = source.config.max_seq_len
            raise ValueError(f"samples of up to {max_seq_len} tokens exceed the teacher's context "
                             f"length of {limit}: --max_seq_len {limit}")


def read_once(teachers, data, limit_gb: float, world) -> list[Teacher]:
    """The same teachers after they have read training and validation data (or None), if their final
    states take at most limit_gb of memory. Caches on disk stay as they are."""
    data = [part.teacher or part for part in data if part is not None]
    data = [*dict.fromkeys(data)]           # what the teacher reads; two views may share it
    own = [[part.read_by(i) for part in data] for i in range(len(teachers))]
    n = [sum(int(part.n_targets.sum()) for part in parts) for parts in own]
    size = sum(n_own * teacher.source.config.dim * world.dtype.itemsize / 1e9
               for n_own, teacher in zip(n, teachers) if not teacher.is_cached)
    fits = size <= limit_gb
    if size:
        Logger(f"the teacher reads a sample {'once' if fits else 'in each epoch'}: its states need "
               f"{size:.3g} GB of memory in each process (--teacher_states_gb {limit_gb:g})")
    return [teacher if teacher.is_cached or not fits else
            teacher._replace(source=StatesInMemory(teacher.source, parts, world))
            for parts, teacher in zip(own, teachers)]


def check_caches(teachers, data):
    """Refuse caches that were not written for the training and validation data (or None)."""
    for cache in [one.source for one in teachers if isinstance(one.source, TeacherCache)]:
        for part in [part for part in data if part is not None]:
            cache.check(part)


def progressive_distillation(large_model, medium_model, small_model, train_loader, epochs=5, *,
                             distill):
    """large -> medium -> small: each student becomes the teacher assistant of the next. Returns the
    small one. Mirzadeh et al. 2019, https://arxiv.org/abs/1902.03393.

    medium_model    one, or a list from large to small; it may be empty
    distill         distill(teacher, student, train_loader, epochs) trains one student
    """
    assistants = medium_model if isinstance(medium_model, list) else [medium_model]
    teacher = large_model
    for student in (*assistants, small_model):
        distill(teacher=teacher, student=student, train_loader=train_loader, epochs=epochs)
        teacher = student
    return small_model
