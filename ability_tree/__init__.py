"""能力树：考试、出题、验题、蒸馏。 The ability tree: a command for each step of a round."""
