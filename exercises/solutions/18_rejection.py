"""
接受的部分是 min(p, q)：它既不能超过 q，也不能超过 p。p 还缺的，是 p - q 的正部。
The accepted part is min(p, q): it can exceed neither q nor p. What p still lacks is the positive
part of p - q.
"""


def rejection(p, q):  # (V,), (V,) -> (V,), (V,)
    accept = (p / q).clamp(max=1)
    lacking = (p - q).clamp(min=0)
    return accept, lacking / lacking.sum()
