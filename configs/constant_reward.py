"""对照：处处相同的优势。A control for --reward: the same advantage at each token, no information.
https://arxiv.org/abs/2608.31046"""

normalise = False


def reward(question, answer, gold):
    return -1.0
