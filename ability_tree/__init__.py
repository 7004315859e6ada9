"""能力树：找出学生的弱叶，为它出题、验题、蒸馏，一轮又一轮。 The ability tree, and a command for each step of its loop."""
