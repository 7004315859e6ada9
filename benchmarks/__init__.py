"""Speed and memory, side by side with a plain implementation in the same run."""
