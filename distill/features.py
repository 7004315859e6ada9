"""
特征蒸馏：让学生的中间层接近教师的中间层。
Feature distillation: the student's hidden states are drawn towards the teacher's.
"""

from torch import nn


def layer_map(n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """Which teacher layer each student layer learns from: the one as far up, the last from the last.

    >>> layer_map(2, 4)
    [(0, 1), (1, 3)]
    """
    return [(s, -(-(s + 1) * n_teacher // n_student) - 1) for s in range(n_student)]


class FeatureProjections(nn.Module):
    """One learned matrix per matched pair of layers, from the student's width to the teacher's.

    They are parameters like the student's own: made before the optimizer, trained, clipped and saved with it.
    Projections made inside the loss would be new at every step and never learn. FitNets, Romero et al. 2014,
    https://arxiv.org/abs/1412.6550, Eq. 3.
    """

    def __init__(self, student_config, teacher_config):
        super().__init__()
        self.pairs = layer_map(student_config.n_layers, teacher_config.n_layers)
        self.maps = nn.ModuleList(nn.Linear(student_config.dim, teacher_config.dim, bias=False) for _ in self.pairs)

    def forward(self, student_hidden, teacher_hidden):
        """Lists of (S, student dim) and (S, teacher dim), one per layer -> matched lists, both of the teacher's width."""
        return ([matrix(student_hidden[s]) for matrix, (s, _) in zip(self.maps, self.pairs)],
                [teacher_hidden[t] for _, t in self.pairs])


def feature_distillation_loss(student_features, teacher_features):
    """Mean squared error per number, averaged over the matched layers, summed over tokens.

    student_features, teacher_features  lists of (S, D), already of one width (FeatureProjections)

    Raises ValueError when a pair's shapes differ.
    """
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape != teacher.shape:
            raise ValueError(f"features {tuple(student.shape)} and {tuple(teacher.shape)} differ; project them first")
        total = total + (student.float() - teacher.detach().float()).square().mean(dim=-1).sum()
    return total / len(student_features)
