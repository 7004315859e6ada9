"""
教师：内存里的一个或几个模型，或它们事先写在磁盘上的输出。
Who teaches: one or several models in memory, or what they said before, on disk. And what cannot be asked of them.
"""

from typing import NamedTuple

import torch

from dataset.lm_dataset import sample_key
from distill.fused import Dense, TopK
from distill.teacher_logits import TeacherCache, file_sha256
from model.lora import without_lora
from model.tokenizer import Tokenizer
from model.transformer import Output, Transformer


class Base:
    """A student with adapters, as it was without them: a teacher that has no weights of its own. (Given experience in its
    prompt it knows more than the student that it is.)"""

    def __init__(self, student: Transformer):
        self.student, self.config = student, student.config

    def __call__(self, *args, **how) -> Output:
        training = self.student.training
        if training:
            self.student.eval()
        with torch.no_grad(), without_lora(self.student):
            out = self.student(*args, **how)
        if training:
            self.student.train()
        return out

    @property
    def head(self):  # -> (V, D)
        return self.student.head


class Teacher(NamedTuple):
    source: Transformer | Base | TeacherCache       # a model in memory, or what one said, on disk
    weight: float                           # among several: they teach as one, p = sum of weight * p of each
    tokenizer: Tokenizer | None             # of a model


class Taught(NamedTuple):
    """What the teachers say of one micro-batch."""

    said: list[Dense] | TopK            # about the words at each position
    matched: torch.Tensor | None        # (S,) where they have a say, if they cut text into other tokens
    out: Output | None                  # and the whole output of a model: what losses below the logits look at


def ask(teachers, batch, tokenizer, args, return_hidden: bool = False) -> Taught:
    """What each teacher, a model in memory or its outputs on disk, says where the assistant speaks."""
    read, said, out, matched = batch.teacher or batch, [], None, None
    for source, weight, _ in teachers:
        if isinstance(source, TeacherCache):
            one = source.look_up(batch.keys)
            if isinstance(one, TopK):                       # it teaches alone: check_teachers
                return Taught(one, None, None)
        else:
            out = source(read.tokens, read.lengths, at=read.at, with_logits=False, return_hidden=return_hidden)
            one = Dense(out.final, source.head)
        head = one.head if batch.match is not None else only_words(one.head, tokenizer, args)
        said.append(Dense(one.states, head, weight))
    if batch.match is not None:
        # Where it has read other text than the student it has no say; what stands there instead counts nothing.
        matched = batch.match >= 0
        said = [said[0]._replace(states=said[0].states[batch.match.clamp_min(0)])]
    return Taught(said, matched, out)


def only_words(head, tokenizer, args):  # (V, D) -> (V, D)
    """An output matrix; with --pad_vocab without the columns of logits that are no word. What is left out of a softmax
    has the logit -inf, on both sides."""
    return head[:tokenizer.vocab_size] if args.pad_vocab and len(head) > tokenizer.vocab_size else head


def check_teachers(teachers, args):
    """What cannot go together."""
    alone = len(teachers) == 1
    live = not any(isinstance(teacher.source, TeacherCache) for teacher in teachers)
    below = [name for name in ("feature_weight", "attention_weight", "contrastive_weight") if vars(args)[name] > 0]
    if below and not (alone and live):
        raise ValueError(f"--{below[0]} looks inside one teacher that is in memory; give one --teacher and no --teacher_cache")
    if below and args.divergence == "uld":
        raise ValueError(f"--{below[0]} compares position by position, which --divergence uld does not")
    if args.plain_loss and not (alone and live and args.divergence != "uld"):
        raise ValueError("--plain_loss is the lesson's form, for one --teacher in memory and one vocabulary; leave it out")
    if args.teacher_data_path and not (alone and live):
        raise ValueError("--teacher_data_path is read by one --teacher that is in memory; leave out the others")
    if args.teacher_data_path and args.attention_weight > 0:
        raise ValueError("--attention_weight compares all tokens of a sample, and under --teacher_data_path only the "
                         "answer's are the same")
    if args.divergence == "uld" and not (alone and live):
        raise ValueError("--divergence uld needs one --teacher that is in memory")
    for teacher in teachers:
        if isinstance(teacher.source, TeacherCache) and teacher.source.top_k:
            if not alone:
                raise ValueError(f"{teacher.source} holds the top {teacher.source.top_k} words only, which cannot be mixed "
                                 "with other teachers; write it without --top_k")
            if (args.temperature, args.final_temperature) != (teacher.source.temperature, None):
                raise ValueError(f"{teacher.source} holds the top {teacher.source.top_k} words at temperature "
                                 f"{teacher.source.temperature:g}, and a tail's mass cannot be tempered anew: train at "
                                 "this --temperature, or write it for another one")


def check_vocabulary(teachers, student, tokenizer, args):
    """Column v of all distributions must be the same word, but for ULD. (A cache is checked with the data.)"""
    for source, _, its_tokenizer in teachers:
        if args.divergence == "uld" or its_tokenizer is None:
            continue
        sizes = (f"the teacher's vocabulary has {source.config.vocab_size} words, the student's "
                 f"{student.config.vocab_size}; ")
        if its_tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"{sizes}they are those of {its_tokenizer.path} and {tokenizer.path}. Train both with one "
                             "tokenizer, or compare only how sure the two are: train_distillation.py --divergence uld --alpha 0.5")
        if source.config.vocab_size != student.config.vocab_size and not args.pad_vocab:
            raise ValueError(f"{sizes}the tokenizer knows {tokenizer.vocab_size}. If the others are padding: --pad_vocab")


def check_cache(cache: TeacherCache, data, args):
    """Refuse a cache that was not written for these samples in these tokens."""
    words = data.tokenizer.vocab_size
    if cache.vocab_size != words and (cache.top_k or not args.pad_vocab):
        raise ValueError(f"{cache} is of a vocabulary of {cache.vocab_size} words, the student's tokenizer has {words}. "
                         + ("Of the top words those that are none cannot be left out: write it without --top_k"
                            if args.pad_vocab else "If the others are padding: --pad_vocab"))
    cache.check(data.tokenizer.sha256, data.tokenizer.path, data.max_seq_len,
                {path: file_sha256(path) for path in data.paths},
                (sample_key(data.sample(i)) for i in range(len(data))),
                lambda i: f"{data}, sample {data.rows[i] + 1}")
