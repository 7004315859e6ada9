"""
蒸馏损失的命令行标志：几课共用的，它们造出什么，怎样的组合不行。
The flags of the distillation losses: those that lessons share, what they build, and which
combinations do not work.
"""

from argparse import SUPPRESS

import torch

from distill.features import IntermediateLosses
from distill.losses import pick_divergence
from distill.teachers import Teacher, teacher_side
from runtime.log import Logger

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
    check_routed(teachers, args)
    single = len(teachers) == 1 and not teachers[0].name
    intermediate = [f"--{name}_weight" for name in INTERMEDIATE if vars(args)[f"{name}_weight"] > 0]
    across = ["--divergence gold"] * (args.divergence == "gold")
    plain = ["--plain_loss"] * args.plain_loss
    context = ["--teacher_data_path"] * bool(args.teacher_data_path)
    needing = [*intermediate, *across, *plain, *(context if not args.teacher_url else [])]
    if needing and not (single and not teachers[0].is_cached):
        raise ValueError(f"{needing[0]} needs exactly one --teacher PATH in memory, without a "
                         "name, and no --teacher_cache")
    if across and (intermediate or plain):
        raise ValueError(f"{across[0]} is for two tokenizers, {[*intermediate, *plain][0]} "
                         "compares position by position. Leave one of them out")
    if context and args.attention_weight > 0:
        raise ValueError("--attention_weight compares all tokens of a sample, but with "
                         "--teacher_data_path the prompts differ. Leave one of them out")
    for cache in [one.source for one in teachers if one.is_cached and one.source.sparse]:
        holds = f"{cache} holds the {cache.sparse}"
        if not single:
            raise ValueError(f"{holds} only, which cannot be mixed with other teachers; write it "
                             "without --top_k and --sampled")
        if cache.about["sampled"] and args.divergence != "forward_kl":
            raise ValueError(f"{holds}, unbiased only in a loss that is linear in the teacher's "
                             f"probabilities: --divergence forward_kl, not {args.divergence}")
        if (args.temperature, args.final_temperature) != (cache.temperature, None):
            raise ValueError(f"{holds} at temperature {cache.temperature:g}: train at "
                             f"--temperature {cache.temperature:g}, or write another cache")


# -- on-policy -----------------------------------------------------------------------------------

def describe_onpolicy(args) -> str:
    _, divergence = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    T, W = args.temperature, args.reward_weight
    loss = (f"-({1 - W:g} * (log p - log q) + {W:g} * reward) * log q" if args.objective == "pg"
            else f"{T:g}^2 * {divergence}")
    whole = " of whole answers, by policy gradient" if args.objective == "minillm" else ""
    return (f"{loss} at T={T:g}{whole}, on the student's own answers in "
            f"{args.on_policy_fraction:.0%} of the steps")


def check_onpolicy_args(parser, args):
    """Values that follow from others, and flags that do not go together."""
    is_pg, is_minillm, is_ema = (args.objective == "pg", args.objective == "minillm",
                                 args.teacher_ema is not None)
    args.temperature = args.generation_temperature if is_pg else args.temperature
    args.divergence = args.divergence if args.objective == "gkd" else "reverse_kl"
    args.reward_weight = args.reward_weight if args.reward and is_pg else 0.0
    alone, sibling = args.reward_weight == 1, args.privileged == "sibling"
    sampling = (args.top_p, args.top_k) != (1, 0)
    stale = is_minillm and (args.temperature, args.generation_temperature,
                            args.sample_every) != (1, 1, 1)
    for refused, reason in (
            (args.tokenizer, f"--tokenizer {args.tokenizer}: --student has its own"),
            (sampling and args.objective != "gkd", f"--objective {args.objective} samples from the "
             "whole distribution: --top_p 1 --top_k 0"),
            (stale, "--objective minillm needs samples of the current student: --temperature 1 "
             "--generation_temperature 1 --sample_every 1"),
            (args.num_samples == 1 and (args.reward_weight or sibling),
             "--reward compares several answers to a prompt: --num_samples 2, or more"),
            (sibling and not args.reward, "--privileged sibling: right by which --reward?"),
            (args.privileged and (alone or is_minillm or args.divergence == "gold"),
             "--privileged is for a teacher that reads rollouts, in the student's tokens: "
             "--objective gkd, or pg with --reward_weight below 1"),
            (args.on_policy_fraction < 1 and (args.privileged or alone),
             "--privileged and --reward_weight 1 are for rollouts: --on_policy_fraction 1"),
            (is_ema and args.shard != "none", "--teacher_ema averages whole weights: --shard none"),
            (args.teacher_url and (args.teacher or is_ema),
             "--teacher_url, --teacher or --teacher_ema: give one of them"),
            (args.teacher_url and (args.objective != "gkd" or args.temperature != 1),
             "--teacher_url knows the most likely tokens at temperature 1: --objective gkd")):
        if refused:
            parser.error(reason)
    if not args.teacher and not args.teacher_url:
        args.teacher = ["out/full_sft_768.pth"]
    if alone or is_ema:
        args.teacher = None
    if ((args.teacher == [args.student] or is_ema)
            and not (args.teacher_data_path or args.privileged)):
        Logger("teacher and student are the same model with the same prompts, so the KD loss is "
               "zero. --teacher_data_path gives the teacher prompts with privileged context")
