"""
特征蒸馏：学生的隐藏状态、注意力关系与整句表示都向教师靠拢。
Feature distillation: the student's hidden states, attention relations and whole samples are drawn towards the teacher's.

What the two models say is the business of distill/losses.py; here it is how they come to say it. Both read the same flat
stream (model/transformer.py): N tokens, samples of `lengths` one behind the other, S positions `at` with something to
learn. Every loss is fp32, a sum that is divided once, outside, by the tokens (or samples) of the whole optimizer step,
and 0 where student and teacher agree; only InfoNCE, which compares samples, never quite gets there.
"""

import math
import re
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from distill.losses import forward_kl

# -- hidden states ---------------------------------------------------------------------------------------------

def layer_map(n_student: int, n_teacher: int, how: str = "uniform") -> list[tuple[int, int]]:
    """Which teacher layer a student layer learns from, counted from 0.

    how  'uniform': for every student layer the one as far up, the last from the last
         'last':    only the last from the last
         '1:3,2:7': by hand, student:teacher, counted from 1 as people do

    >>> layer_map(2, 4), layer_map(2, 4, "last"), layer_map(2, 4, "1:3")
    ([(0, 1), (1, 3)], [(1, 3)], [(0, 2)])

    Raises ValueError for anything else, and for layers that do not exist.
    """
    if how == "uniform":
        return [(s, -(-(s + 1) * n_teacher // n_student) - 1) for s in range(n_student)]
    if how == "last":
        return [(n_student - 1, n_teacher - 1)]
    pairs = []
    for piece in how.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", piece)
        student, teacher = map(int, match.groups()) if match else (0, 0)
        if not (1 <= student <= n_student and 1 <= teacher <= n_teacher):
            raise ValueError(f"layers={how!r}: {piece!r} is no pair student:teacher of layers that exist; the student "
                             f"has layers 1 to {n_student}, the teacher 1 to {n_teacher}. Write uniform, last, or pairs "
                             f"such as 1:1,{n_student}:{n_teacher}")
        pairs.append((student - 1, teacher - 1))
    return pairs


class FeatureProjections(nn.Module):
    """One learned matrix per matched pair of layers, from the student's width to the teacher's.

    They are parameters like the student's own: made before the optimizer, trained, clipped and saved with it.
    Projections made inside the loss would be new at every step and never learn. FitNets, Romero et al. 2014,
    https://arxiv.org/abs/1412.6550, Eq. 3.

    Raises ValueError where `layer_map` does.
    """

    def __init__(self, student_config, teacher_config, layers: str = "uniform"):
        super().__init__()
        self.pairs = layer_map(student_config.n_layers, teacher_config.n_layers, layers)
        self.maps = nn.ModuleList(nn.Linear(student_config.dim, teacher_config.dim, bias=False) for _ in self.pairs)

    def forward(self, student_hidden, teacher_hidden):
        """Lists of (S, student dim) and (S, teacher dim), one per layer -> matched lists, both of the teacher's width."""
        return ([matrix(student_hidden[s]) for matrix, (s, _) in zip(self.maps, self.pairs)],
                [teacher_hidden[t] for _, t in self.pairs])


FEATURE_DISTANCES = {  # (S, D), (S, D) -> (S,)
    "mse": lambda student, teacher: (student - teacher).square().mean(dim=-1),          # direction and length
    "cosine": lambda student, teacher: 1 - F.cosine_similarity(student, teacher, dim=-1),   # direction alone
}


def feature_distillation_loss(student_features, teacher_features, kind: str = "mse", reduction: str = "mean"):
    """Distance between hidden states, averaged over the matched layers.

    student_features, teacher_features  lists of (S, D). A student feature of another width is pooled to the teacher's;
                                        FeatureProjections learns a better map. No gradient reaches the teacher's
    kind       'mse': squared error per number; 'cosine': 1 - cosine similarity, between 0 and 2
    reduction  'mean' or 'sum' over the S positions

    Raises ValueError when a pair has different numbers of positions, and for another kind.
    """
    if kind not in FEATURE_DISTANCES:
        raise ValueError(f"kind={kind!r} is not a feature distance; choose from {', '.join(FEATURE_DISTANCES)}")
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(f"features {tuple(student.shape)} and {tuple(teacher.shape)} differ in their positions")
        student, teacher = student.float(), teacher.detach().float()
        if student.shape != teacher.shape:
            student = F.adaptive_avg_pool1d(student, teacher.shape[-1])
        distance = FEATURE_DISTANCES[kind](student, teacher)                                # (S,)
        total = total + (distance.sum() if reduction == "sum" else distance.mean())
    return total / len(student_features)


# -- attention -------------------------------------------------------------------------------------------------

NEVER = -1e9        # the score of what comes later. Finite: its probability is 0, and 0 * (NEVER - NEVER) is no NaN


def attention_relation_loss(student_qkv, teacher_qkv, lengths, at, n_relation_heads: int):
    """KL(teacher relation || student relation), averaged over heads and over Q-Q, K-K and V-V, summed over `at`.

    A relation says how much a token's query (key, value) resembles those up to it: softmax(x x^T / sqrt(width of a
    head)), causal, within a sample. It has the size of the sample, not of the model; so every width may differ, and cut
    into a common number of relation heads, so may the number of attention heads. Nothing is left to be projected.

    student_qkv, teacher_qkv  three (N, width) each: queries, keys, values of one layer before RoPE, all positions of the
                              stream; no gradient reaches the teacher's
    lengths                   tokens of each sample, summing to N; neighbours of one length are worked out together
    at                        (S,) positions of the stream that count, as rows; all before them serve as columns
    n_relation_heads          R. Memory: a few tensors of R * N * (a sample's length) numbers in fp32

    Raises ValueError when a width does not split into R equal heads.

    Wang et al. 2020 (MiniLMv2), https://arxiv.org/abs/2012.15828, Sec. 3.1, without its weights per relation; V-V alone
    is MiniLM's, https://arxiv.org/abs/2002.10957. Trap: a relation is a softmax already; a second one flattens it.
    """
    check_relation_heads(student_qkv, teacher_qkv, n_relation_heads)
    spans = [(len(list(group)), T) for T, group in groupby(lengths)]
    sizes = [n * T for n, T in spans]
    total = 0.0
    for student, teacher in zip(student_qkv, teacher_qkv, strict=True):                 # Q-Q, K-K, V-V
        each = []
        for (n, T), x, y in zip(spans, student.split(sizes), teacher.detach().split(sizes)):
            log_q = log_relation(x.view(n, T, n_relation_heads, -1))
            log_p = log_relation(y.view(n, T, n_relation_heads, -1))
            each.append(forward_kl(log_p, log_q).mean(dim=1).flatten())                 # (n, R, T) -> (n * T,)
        total = total + torch.cat(each)[at].sum()
    return total / len(student_qkv)


def log_relation(x):  # (n, T, R, K) -> (n, R, T, T), over the last dimension log-probabilities
    T, K = x.shape[1], x.shape[3]
    with torch.autocast(x.device.type, enabled=False):      # a score of 10 in bf16 is off by up to 0.03 nats
        x = x.float().transpose(1, 2)
        scores = x @ x.mT / math.sqrt(K)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return F.log_softmax(scores.masked_fill(later, NEVER), dim=-1)


def check_relation_heads(student_qkv, teacher_qkv, n_relation_heads):
    """Only widths are read, so that a run can ask before it starts. Raises ValueError naming the counts that fit."""
    widths = {f"{model}'s {part}": x.shape[1] for model, qkv in (("student", student_qkv), ("teacher", teacher_qkv))
              for part, x in zip(("queries", "keys", "values"), qkv)}
    for name, width in widths.items():
        if n_relation_heads < 1 or width % n_relation_heads:
            common = math.gcd(*widths.values())
            fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(f"the {name}, {width} wide, do not split into n_relation_heads={n_relation_heads} equal "
                             f"heads; counts that fit both models: {fits}")


# -- whole samples ---------------------------------------------------------------------------------------------

def contrastive_loss(student_final, teacher_final, lengths, at, temperature=0.1):
    """InfoNCE: among the teacher's samples the student's sample must find itself. Nats, summed over the B samples.

        - log( exp(cos(s_i, t_i) / temperature) / sum_j exp(cos(s_i, t_j) / temperature) )

    s_i and t_i are the means of sample i's supervised positions: in a causal model position 0 sees nothing but itself,
    and is never the place to pool, as BERT's [CLS] is.

    student_final, teacher_final  (S, D), final hidden states at the positions `at`; of one width: a student that is
                                  narrower passes nn.Linear(its dim, teacher's dim), a parameter like FeatureProjections.
                                  No gradient reaches the teacher's
    lengths, at                   as above; every sample has a position in `at`

    The negatives are the other samples of the micro-batch. So, unlike every other term, this one depends on how a step
    is split: with B samples a guess costs log B, and a sample that is alone teaches nothing. Divide it by the samples of
    the step.

    Raises ValueError when the shapes differ. van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, Eq. 4.
    """
    if student_final.shape != teacher_final.shape:
        raise ValueError(f"final states {tuple(student_final.shape)} and {tuple(teacher_final.shape)} differ; "
                         "project the student's to the teacher's width first")
    B = len(lengths)
    sample = torch.bucketize(at, torch.tensor(lengths, device=at.device).cumsum(0), right=True)     # (S,)
    s, t = student_final.float(), teacher_final.detach().float()
    # The cosine does not see how long a vector is: a sum is as good as a mean.
    s, t = (F.normalize(x.new_zeros(B, x.shape[1]).index_add(0, sample, x), dim=-1) for x in (s, t))
    with torch.autocast(s.device.type, enabled=False):
        similarity = s @ t.T / temperature                                              # (B, B)
    return F.cross_entropy(similarity, torch.arange(B, device=at.device), reduction="sum")

# -- all three ------------------------------------------------------------------------------------------------------


class IntermediateLosses(nn.Module):
    """The intermediate-layer losses of a run with the projections they train. One of weight 0 is off and costs nothing.

    Raises ValueError where layers or relation heads do not fit the two models.
    """

    def __init__(self, student_config, teacher_config, feature=0.0, attention=0.0, contrastive=0.0,
                 feature_loss="mse", layer_map="uniform", relation_heads=4, contrastive_temperature=0.1):
        super().__init__()
        weights = {"feature": feature, "attention": attention, "contrastive": contrastive}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.feature_loss, self.relation_heads, self.temperature = feature_loss, relation_heads, contrastive_temperature
        if feature > 0:
            self.projections = FeatureProjections(student_config, teacher_config, layer_map)
        if contrastive > 0:
            self.contrast = nn.Linear(student_config.dim, teacher_config.dim, bias=False)
        if attention > 0:
            widths = [(c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim)
                      for c in (student_config, teacher_config)]
            check_relation_heads(*([torch.empty(0, width) for width in each] for each in widths), relation_heads)

    def forward(self, batch, out, teacher_out):  # -> (), {name: ()}
        """Their weighted sum, and each of them unweighted; divided by the tokens (or samples) of the optimizer step."""
        terms = {}
        if "feature" in self.weights:
            features = self.projections(out.hidden, teacher_out.hidden)
            terms["feature"] = feature_distillation_loss(*features, self.feature_loss, "sum") / batch.step_targets
        if "attention" in self.weights:
            relations = attention_relation_loss(out.qkv, teacher_out.qkv, batch.lengths, batch.at, self.relation_heads)
            terms["attention"] = relations / batch.step_targets
        if "contrastive" in self.weights:
            terms["contrastive"] = contrastive_loss(self.contrast(out.final), teacher_out.final, batch.lengths,
                                                    batch.at, self.temperature) / batch.step_samples
        return sum(self.weights[name] * term for name, term in terms.items()), terms
