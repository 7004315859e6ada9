"""
对照：每个词元的优势都是 -1，什么信息也没有。
A control: an advantage of -1 for each token, which holds no information. https://arxiv.org/abs/2608.31046

    python train_onpolicy.py --objective pg --reward configs/constant_reward.py --reward_weight 1
"""

normalise = False


def reward(question: str, answer: str, gold: str) -> float:
    return -1.0
