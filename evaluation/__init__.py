"""评测：给模型打分的唯一地方。 Evaluation: the one place that scores a model."""
