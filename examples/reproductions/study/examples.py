"""What reproductions take from the examples, a folder up: here alone it is known where that is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from batch_norm_digits import SigmoidNetwork, eval_step
from parts.command import UsageError, check_picture, check_seeds, run, write_picture
from parts.digits import CLASSES, Choice, Dataset, draw_batches, load_dataset
from parts.domains import Domain, load_domains
from parts.figure_1 import PERCENTILES, History

__all__ = [
    "CLASSES",
    "PERCENTILES",
    "Choice",
    "Dataset",
    "Domain",
    "History",
    "SigmoidNetwork",
    "UsageError",
    "check_picture",
    "check_seeds",
    "draw_batches",
    "eval_step",
    "load_dataset",
    "load_domains",
    "run",
    "write_picture",
]
