"""The scripts of `examples/` and `examples/reproductions/`, found by listing the folders."""

import importlib
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDERS = (EXAMPLES, EXAMPLES / "reproductions")
SCRIPTS = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.py"))}
REPRODUCTIONS = [name for name, path in SCRIPTS.items() if path.parent == FOLDERS[1]]


def script(name):
    """A script as a module, or a part of one, imported as Python does that runs it."""
    for folder in map(str, FOLDERS):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    return importlib.import_module(name)
