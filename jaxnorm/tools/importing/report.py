"""What an import did, and what did not fit."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What an import did.

    `print(report)` shows it as a table.

    Attributes:
        copied: by variable of the model, the keys of the source that it was made of.
        unused: keys of the source, with shapes, that no variable was made of.
        missing: variables of the model that kept their values, as the source has none for them.
        misshaped: the same, as the source's have other shapes, with both.
        refused: the same, as no layer has such numbers: of another kind, too large for the dtype,
            negative variances and counts; or as one array was to be filled with two that differ.
        dropped: keys that no layer needs and that change nothing, such as counts of batches.
        notes: what the arrays cannot tell and is worth knowing.
    """

    copied: Mapping[str, str]
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every key and every variable found its counterpart."""
        return not (self.unused or self.missing or self.misshaped or self.refused)

    def __str__(self) -> str:
        width = max(map(len, self.copied), default=0)
        lines = [f"{name:<{width}}  <-  {keys}" for name, keys in self.copied.items()]
        for title, entries in (
            ("not used", self.unused),
            ("not filled", self.missing),
            ("of another shape", self.misshaped),
            ("refused", self.refused),
            ("dropped", self.dropped),
            ("notes", self.notes),
        ):
            if entries:
                lines += ["", f"{title}:", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)
