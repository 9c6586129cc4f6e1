"""The options of a reproduction."""

from dataclasses import dataclass
from pathlib import Path

from study.examples import Choice, UsageError, check_picture, check_seeds


@dataclass(frozen=True)
class PageOptions:
    """The options of everything that ends in a picture and a page."""

    quick: bool = False
    """A short run, enough to see that everything works; its findings mean nothing."""

    out: Path | None = None
    """Where to write the picture (.png, .pdf or .svg); by default here, by the script's name."""

    record: bool = False
    """Also write the result, with machine and versions, into docs/reproductions."""

    def check(self) -> None:
        """Refuses impossible options before any time goes into work."""
        if self.record and self.quick:
            raise UsageError("--record keeps full results; leave --quick out")
        if self.out is not None:
            check_picture(self.out)


@dataclass(frozen=True)
class StudyOptions(PageOptions):
    """The options that all reproductions have that train; each adds its own."""

    data: Choice = "auto"
    """Images to train on; auto takes MNIST if JAXNORM_DATA names its folder, else the digits."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the weights and of the order of the batches; all ways are tried with each."""

    def check(self) -> None:
        """Refuses impossible options before any time goes into training."""
        super().check()
        check_seeds(self.seeds)

    @property
    def used_seeds(self) -> tuple[int, ...]:
        """The first of the seeds alone in a quick run."""
        return self.seeds[:1] if self.quick else self.seeds
