"""What the reproductions share: options, training, statistics over seeds, pictures and pages."""

from study.command import PageOptions, StudyOptions
from study.examples import CLASSES, UsageError, draw_batches, run
from study.findings import Finding, Spread, compare
from study.images import Images, images_of
from study.pictures import COLORS, DASHES, band, figure_of, tidy
from study.progress import each
from study.report import Report, conclude
from study.training import TrainState, accuracy_of, create_state, eval_step, train, train_step

__all__ = [
    "CLASSES",
    "COLORS",
    "DASHES",
    "Finding",
    "Images",
    "PageOptions",
    "Report",
    "Spread",
    "StudyOptions",
    "TrainState",
    "UsageError",
    "accuracy_of",
    "band",
    "compare",
    "conclude",
    "create_state",
    "draw_batches",
    "each",
    "eval_step",
    "figure_of",
    "images_of",
    "run",
    "tidy",
    "train",
    "train_step",
]
