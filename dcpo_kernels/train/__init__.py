"""A thin loop for RL with verifiable rewards: transformers models, problems in parquet."""

from dcpo_kernels.train.config import TrainConfig, recipes
from dcpo_kernels.train.data import Problem, ProblemError, read_problems, write_problems
from dcpo_kernels.train.evaluate import evaluate
from dcpo_kernels.train.loop import train
from dcpo_kernels.train.rewards import reward, score
from dcpo_kernels.train.step import Trainer

__all__ = [
    "Problem",
    "ProblemError",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "read_problems",
    "recipes",
    "reward",
    "score",
    "train",
    "write_problems",
]
