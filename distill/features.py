"""
特征蒸馏：学生的隐藏状态、注意力关系与整句表示向教师靠拢。
Intermediate-layer losses: hidden states, attention relations and sample embeddings of one packed
stream (model/transformer.py): N tokens, samples of `lengths`, S supervised positions `at`. Losses
are fp32 and 0 where student and teacher agree (InfoNCE comes only close).
"""

import math
import re
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from distill.losses import forward_kl

# -- hidden states -------------------------------------------------------------------------------

def layer_map(n_student: int, n_teacher: int, how: str = "uniform") -> list[tuple[int, int]]:
    """The matched pairs (student layer, teacher layer), counted from 0.

    how  'uniform': each student layer with the teacher layer at the same relative depth
         'last':    only the last with the last
         '1:3,2:7': student:teacher pairs, counted from 1

    >>> layer_map(2, 4), layer_map(2, 4, "last"), layer_map(2, 4, "1:3")
    ([(0, 1), (1, 3)], [(1, 3)], [(0, 2)])
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
            raise ValueError(f"--layer_map {how}: {piece!r} is not a pair STUDENT:TEACHER of "
                             f"layers 1 to {n_student} and 1 to {n_teacher}")
        pairs.append((student - 1, teacher - 1))
    return pairs


class FeatureProjections(nn.Module):
    """One learned matrix per matched pair of layers, from the student's width to the teacher's.

    FitNets, Romero et al. 2014, https://arxiv.org/abs/1412.6550, Eq. 3. Trap: they are parameters,
    to be trained, clipped and saved with the student. Built inside the loss they never learn.
    """

    def __init__(self, student_config, teacher_config, layers: str = "uniform"):
        super().__init__()
        self.pairs = layer_map(student_config.n_layers, teacher_config.n_layers, layers)
        self.maps = nn.ModuleList(
            nn.Linear(student_config.dim, teacher_config.dim, bias=False) for _ in self.pairs)

    def forward(self, student_hidden, teacher_hidden):
        """One (S, dim) tensor per layer -> two matched lists, both of the teacher's width."""
        return ([matrix(student_hidden[s]) for matrix, (s, _) in zip(self.maps, self.pairs)],
                [teacher_hidden[t] for _, t in self.pairs])


FEATURE_DISTANCES = {  # (S, D), (S, D) -> (S,)
    "mse": lambda student, teacher: (student - teacher).square().mean(dim=-1),
    "cosine": lambda student, teacher: 1 - F.cosine_similarity(student, teacher, dim=-1),
}


def feature_distillation_loss(student_features, teacher_features, kind: str = "mse",
                              reduction: str = "mean"):
    """Distance between hidden states, averaged over the matched layers.

    student_features  list of (S, D); another width is average-pooled to the teacher's
    teacher_features  list of (S, D of the teacher); no gradient flows
    kind              'mse': mean squared error; 'cosine': 1 - cosine similarity, 0 to 2
    reduction         'mean' or 'sum' over the S positions
    """
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        assert student.shape[:-1] == teacher.shape[:-1]     # else they would broadcast
        student, teacher = student.float(), teacher.detach().float()
        if student.shape != teacher.shape:
            student = F.adaptive_avg_pool1d(student, teacher.shape[-1])
        distance = FEATURE_DISTANCES[kind](student, teacher)                # (S,)
        total = total + (distance.sum() if reduction == "sum" else distance.mean())
    return total / len(student_features)


# -- attention -----------------------------------------------------------------------------------

MASKED = -1e9       # score of a future token. Finite, so that p * (log p - log q) is 0 and not NaN


def attention_relation_loss(student_qkv, teacher_qkv, lengths, at, n_relation_heads: int):
    """KL(teacher relation || student relation): mean over heads and Q-Q, K-K, V-V, sum over `at`.

    A relation is the causal softmax(x x^T / sqrt(head width)) of one sample's queries, keys or
    values. So widths and head counts of the two models may differ, and no projection is needed.

    student_qkv, teacher_qkv  queries, keys, values of one layer before RoPE, (N, width) each; no
                              gradient flows to the teacher's
    lengths                   tokens of each sample, N in all; runs of equal length share a batch
    at                        (S,) positions that count, as rows; all earlier ones are columns
    n_relation_heads          R; needs a few fp32 tensors of R * N * (sample length)

    Wang et al. 2020 (MiniLMv2), https://arxiv.org/abs/2012.15828, Sec. 3.1, all relations weighted
    equally. V-V alone is MiniLM, https://arxiv.org/abs/2002.10957.
    """
    spans = [(len(list(group)), T) for T, group in groupby(lengths)]
    sizes = [n * T for n, T in spans]
    total = 0.0
    for student, teacher in zip(student_qkv, teacher_qkv, strict=True):     # Q-Q, K-K, V-V
        losses = []
        for (n, T), x, y in zip(spans, student.split(sizes), teacher.detach().split(sizes)):
            log_q = log_relation(x.view(n, T, n_relation_heads, -1))
            log_p = log_relation(y.view(n, T, n_relation_heads, -1))
            losses.append(forward_kl(log_p, log_q).mean(dim=1).flatten())   # (n, R, T) -> (n * T,)
        total = total + torch.cat(losses)[at].sum()
    return total / len(student_qkv)


def log_relation(x):  # (n, T, R, K) -> (n, R, T, T) log-probabilities
    T, K = x.shape[1], x.shape[3]
    with torch.autocast(x.device.type, enabled=False):  # a score of 10 in bf16 is off by 0.03 nats
        x = x.float().transpose(1, 2)
        scores = x @ x.mT / math.sqrt(K)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return F.log_softmax(scores.masked_fill(future, MASKED), dim=-1)


def check_relation_heads(student_config, teacher_config, n_relation_heads):
    """Raise ValueError, with the counts that fit, where a width does not split into equal heads."""
    widths = [n_heads * each.head_dim for each in (student_config, teacher_config)
              for n_heads in (each.n_heads, each.n_kv_heads)]
    fits = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
    if n_relation_heads not in fits:
        raise ValueError(f"n_relation_heads={n_relation_heads} does not divide all widths of "
                         f"queries and of keys and values, {widths}. Counts that do: {fits}")


# -- sample embeddings ---------------------------------------------------------------------------

def contrastive_loss(student_final, teacher_final, lengths, at, temperature=0.1):
    """InfoNCE: the student's sample must be most similar to the teacher's same sample.

        sum_i  - log( exp(cos(s_i, t_i) / temperature) / sum_j exp(cos(s_i, t_j) / temperature) )

    s_i, t_i are the means over sample i's supervised positions. Trap: in a causal model the first
    position sees only itself, so pooling there, as with BERT's [CLS], learns nothing.

    student_final  (S, D) final hidden states at `at`, projected to the teacher's width
    teacher_final  (S, D); no gradient flows
    lengths, at    as above; every sample has a position in `at`

    The negatives are the other samples of the micro-batch. So, unlike the other losses, this one
    depends on how a step is split, and a sample alone gives no gradient. Divide it by the step's
    samples. van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, Eq. 4.
    """
    B = len(lengths)
    sample = torch.bucketize(at, torch.tensor(lengths, device=at.device).cumsum(0), right=True)
    s, t = student_final.float(), teacher_final.detach().float()
    # A cosine ignores length, so the sum serves as the mean.
    s, t = (F.normalize(x.new_zeros(B, x.shape[1]).index_add(0, sample, x), dim=-1) for x in (s, t))
    with torch.autocast(s.device.type, enabled=False):
        similarity = s @ t.T / temperature                                          # (B, B)
    return F.cross_entropy(similarity, torch.arange(B, device=at.device), reduction="sum")


# -- all three -----------------------------------------------------------------------------------

class IntermediateLosses(nn.Module):
    """The intermediate-layer losses of a run and their projections. Weight 0 switches one off."""

    def __init__(self, student_config, teacher_config, feature=0.0, attention=0.0, contrastive=0.0,
                 feature_loss="mse", layer_map="uniform", relation_heads=4,
                 contrastive_temperature=0.1):
        super().__init__()
        weights = {"feature": feature, "attention": attention, "contrastive": contrastive}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.feature_loss, self.relation_heads = feature_loss, relation_heads
        self.temperature = contrastive_temperature
        if feature > 0:
            self.projections = FeatureProjections(student_config, teacher_config, layer_map)
        if contrastive > 0:
            self.contrast = nn.Linear(student_config.dim, teacher_config.dim, bias=False)
        if attention > 0:
            check_relation_heads(student_config, teacher_config, relation_heads)

    def forward(self, batch, out, teacher_out):  # -> (), {name: ()}
        """Their weighted sum, and each unweighted, per token (or sample) of the optimizer step."""
        losses = {}
        if "feature" in self.weights:
            features = self.projections(out.hidden, teacher_out.hidden)
            loss = feature_distillation_loss(*features, self.feature_loss, "sum")
            losses["feature"] = loss / batch.step_targets
        if "attention" in self.weights:
            loss = attention_relation_loss(out.qkv, teacher_out.qkv, batch.lengths, batch.at,
                                           self.relation_heads)
            losses["attention"] = loss / batch.step_targets
        if "contrastive" in self.weights:
            loss = contrastive_loss(self.contrast(out.final), teacher_out.final, batch.lengths,
                                    batch.at, self.temperature)
            losses["contrastive"] = loss / batch.step_samples
        return sum(self.weights[name] * loss for name, loss in losses.items()), losses
