"""
练习：推测解码的拒绝规则。起草的词元来自 q，写出的词元要服从 p，并尽量多接受起草的词元。
Exercise: the rejection rule of speculative decoding. A token is drafted from q, the output must
have distribution p, and as many drafts as possible should be accepted.

    draft v ~ q; write it with probability accept(v), otherwise a token sampled from `rest`

    output(v) = q(v) accept(v) + (1 - sum over u of q(u) accept(u)) rest(v) = p(v)

课 · lesson  docs/lessons/18_draft_models.md
检查 · check  python exercises/check.py 18
"""


def rejection(p, q):  # (V,), (V,) -> (V,), (V,)
    """Returns accept, probabilities, and rest, a distribution (any where nothing is rejected).
    Tokens with q(v) = 0 are never drafted; their accept(v) may be anything.

    p = (0.5, 0.3, 0.2), q = (0.1, 0.6, 0.3): which part of q can stay, and what does p still lack?
    """
    raise NotImplementedError  # your lines here
