"""The losses of distillation: tensors in, tensors out."""
