"""
蒸馏损失的命令行标志，三课共用。
The flags of the distillation loss that several lessons share, and what they build.
"""

from argparse import SUPPRESS

import torch

from distill.features import IntermediateLosses
from distill.losses import pick_divergence
from distill.teachers import Teacher, teacher_side

INTERMEDIATE = ("feature", "attention", "contrastive")


def add_divergence_args(parser):
    if parser.get_default("alpha") is not None:
        parser.add_argument_group("another form of --alpha").add_argument(
            "--kd_weight", type=lambda text: 1 - float(text), dest="alpha", default=SUPPRESS,
            help="weight of KD, 1 - alpha, in [0, 1]")
    add = parser.add_argument_group("divergence (distill/losses.py)").add_argument
    add("--beta", type=float, default=0.5,
        help="interpolation of jsd in [0, 1]: 0 forward KL, 1 reverse KL")
    add("--jsd_normalised", action="store_true",
        help="divide jsd by beta (1 - beta), so that its limits are the two KLs")
    add("--skew", type=float, default=0.1, help="mixing coefficient of the skew KLs, in (0, 1)")


def add_intermediate_args(parser, weights: bool = True):
    """Without weights: of a lesson that has them elsewhere."""
    add = parser.add_argument_group("intermediate-layer losses (distill/features.py)").add_argument
    if weights:
        add("--feature_weight", type=float, default=0.0,
            help="weight of the hidden-state loss; 0 disables it")
        add("--attention_weight", type=float, default=0.0,
            help="weight of MiniLM's attention relations; 0 disables them")
        add("--contrastive_weight", type=float, default=0.0,
            help="weight of InfoNCE on pooled states; 0 disables it")
    add("--feature_loss", default="mse", choices=["mse", "cosine"],
        help="distance between hidden states")
    add("--layer_map", default="uniform",
        help="matched layers: uniform, last, or STUDENT:TEACHER pairs like 1:2,2:4")
    add("--relation_heads", type=int, default=4,
        help="heads of the relations; must divide all widths of q, k and v")
    add("--contrastive_temperature", type=float, default=0.1,
        help="temperature of the InfoNCE similarities, above 0")


def check_loss_args(parser, args):
    """Exits with a message if the divergence cannot do without labels, or for a second teacher."""
    if args.teacher_url and (args.teacher or args.teacher_cache):
        parser.error("--teacher_url, --teacher or --teacher_cache: give one of them")
    if args.divergence == "uld" and args.alpha == 0:
        parser.error("--divergence uld must be combined with labels, --alpha 0.5: it compares how "
                     "sure the two are, not of what; gold can do without")


def make_intermediate(args, student_config, teachers) -> IntermediateLosses:
    teacher_config = None if teachers[0].is_cached else teachers[0].source.config
    weights = {name: vars(args)[f"{name}_weight"] for name in INTERMEDIATE}
    return IntermediateLosses(
        student_config, teacher_config, **weights, feature_loss=args.feature_loss,
        layer_map=args.layer_map, relation_heads=args.relation_heads,
        contrastive_temperature=args.contrastive_temperature)


def check_chain(students, args):
    """Whether each student can teach the next, before the first is trained."""
    with torch.random.fork_rng(devices=[]):         # as if no weight had been initialised here
        for (teacher, its_tokenizer), (student, tokenizer) in zip(students, students[1:]):
            teachers = [Teacher(teacher, 1.0, its_tokenizer)]
            make_intermediate(args, student.config, teachers)
            teacher_side(teachers, tokenizer, args.data_path, args.teacher_data_path,
                         student.context_length(args.max_seq_len))


def describe_loss(args, student_config) -> str:
    """0.50 CE + 0.50 * 4^2 * KL(teacher || student) at T=4"""
    _, divergence = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    weights = [vars(args)[f"{name}_weight"] for name in INTERMEDIATE]
    names = f"feature {args.feature_loss.upper()}", "attention relations", "InfoNCE"
    terms = [f"{weight:g} * {name}" for weight, name in zip(weights, names) if weight > 0]
    if student_config.use_moe:
        terms.append(f"{student_config.aux_loss_alpha:g} * balance")
    moving = f" moving to {args.final_temperature:g}" if args.final_temperature else ""
    T = f"{args.temperature:g}"
    kd = f"{1 - args.alpha:.2f} * {T}^2 * {divergence} at T={T}{moving}"
    return " + ".join([f"{args.alpha:.2f} CE", kd, *terms])


def check_routed(teachers, args):
    """Refuse what does not work with teachers of the form NAME=PATH."""
    names = {teacher.name for teacher in teachers}
    if names == {""}:
        return
    if ("" in names or len(names) < len(teachers) or any(one.is_cached for one in teachers)
            or args.teacher_data_path):
        raise ValueError("routed teachers, --teacher NAME=PATH ..., each need a name of their own, "
                         "and neither --teacher_cache nor --teacher_data_path")
    if args.shard == "zero3":
        raise ValueError("--shard zero3 needs every teacher in every batch, and a routed teacher, "
                         "NAME=PATH, only reads its own samples: --shard zero2")


def check_teachers(teachers, args):
    """Refuse combinations of teachers and losses that do not work."""
    names = {teacher.name for teacher in teachers}
    single = len(teachers) == 1 and names == {""}
    single_model = single and not teachers[0].is_cached
    intermediate = [f"--{name}_weight" for name in INTERMEDIATE if vars(args)[f"{name}_weight"] > 0]
    across = [f"--divergence {args.divergence}"] if args.divergence in ("uld", "gold") else []
    plain = ["--plain_loss"] if args.plain_loss else []
    context = ["--teacher_data_path"] if args.teacher_data_path else []
    for flag in (*intermediate, *across, *plain, *context):
        if not single_model and not (single and flag in context and args.teacher_url):
            raise ValueError(f"{flag} needs exactly one --teacher PATH in memory, without a name, "
                             "and no --teacher_cache")
    check_routed(teachers, args)
    if across and (intermediate or plain):
        raise ValueError(f"{across[0]} is for two tokenizers, {[*intermediate, *plain][0]} "
                         "compares position by position. Leave one of them out")
    if context and args.attention_weight > 0:
        raise ValueError("--attention_weight compares all tokens of a sample, but with "
                         "--teacher_data_path the prompts differ. Leave one of them out")
    caches = [teacher.source for teacher in teachers if teacher.is_cached]
    for cache in [cache for cache in caches if cache.sparse]:
        if len(teachers) > 1:
            raise ValueError(f"{cache} holds the {cache.sparse} only, which cannot be mixed with "
                             "other teachers; write it without --top_k and --sampled")
        if cache.about["sampled"] and args.divergence != "forward_kl":
            raise ValueError(f"{cache} holds the {cache.sparse}, which are unbiased only in a loss "
                             "that is linear in the teacher's probabilities: --divergence "
                             f"forward_kl, not {args.divergence}, or a cache without --sampled")
        if (args.temperature, args.final_temperature) != (cache.temperature, None):
            raise ValueError(f"{cache} holds the {cache.sparse} at temperature "
                             f"{cache.temperature:g}, which cannot be changed afterwards: "
                             f"train at --temperature {cache.temperature:g}, or write a cache for "
                             "another")
