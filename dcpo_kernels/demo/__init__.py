"""`dcpo demo`: a small language model learns sums by GRPO and by DCPO, from the same start."""
