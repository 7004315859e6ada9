"""
每一步把 X 的奇异值 s 变成 a s + b s^3 + c s^5，奇异向量不变；五步把 0.01 也带到 1 附近。
先除以范数，因为奇异值太大时多项式发散。
Each step takes a singular value s of X to a s + b s^3 + c s^5 and keeps the singular vectors. Five
steps bring even 0.01 near 1. The norm comes first: for large singular values the polynomial
diverges.
"""

a, b, c = 3.4445, -4.7750, 2.0315


def muon_update(gradient):  # (R, C) -> (R, C)
    X = gradient / gradient.norm()
    for _ in range(5):
        S = X @ X.T
        X = a * X + (b * S + c * S @ S) @ X
    return X
