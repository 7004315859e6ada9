"""
练习：损失掩码。交叉熵只对助手的词元求平均；位置 t 预测的是词元 t + 1。
Exercise: the loss mask. The mean cross-entropy of the assistant's tokens alone; position t predicts
token t + 1.

    loss = - sum over the assistant's tokens of log q(token | the tokens before it) / their number

课 · lesson  docs/lessons/02_fine_tuning.md
检查 · check  python exercises/check.py 02_masked
"""

import torch.nn.functional as F


def masked_loss(logits, ids, is_answer):  # (T, V), (T,), (T,) bool -> ()
    """is_answer[t]: token t is the assistant's. Token 0 never is.

    ids         7  3  5  4  2  6        the assistant's: 4 and its end of turn, 2
    is_answer   0  0  0  1  1  0        which rows of the logits predict these two?
    """
    raise NotImplementedError  # your lines here
