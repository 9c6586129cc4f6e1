"""Draws `docs/images/norm_report.png`, the picture on the page `docs/tools/report.md`.

python docs/norm_report_picture.py
"""

import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
TARGET = HERE / "images" / "norm_report.png"


def draw() -> None:
    """Runs the page as far as its report, and writes the picture."""
    page = (HERE / "tools" / "report.md").read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "report.md", "exec"), namespace)
        if "report" in namespace:
            break
    drawn = io.BytesIO()
    namespace["report"].picture().savefig(drawn, dpi=130)
    Image.open(drawn).convert("RGB").quantize(256).save(TARGET, optimize=True)


if __name__ == "__main__":
    draw()
    print(f"wrote {TARGET}, {TARGET.stat().st_size / 1000:.0f} kB")
