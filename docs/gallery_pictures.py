"""Draws the pictures of those examples that draw none: `docs/images/NAME.png`.

python docs/gallery_pictures.py
"""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from batch_norm_digits_nnx import Network, Options, train_step  # noqa: E402
from parts.digits import draw_batches, load_small_digits  # noqa: E402

INK, RIGHT, WRONG = "#222222", "#0072b2", "#d55e00"
ROWS, COLUMNS = 4, 7


def digits() -> Figure:
    """Test images and what the network of `batch_norm_digits_nnx.py` takes them for."""
    options = Options()
    data = load_small_digits(options.seed)
    model = Network(data.train_images.shape[1], options.width, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, optax.sgd(options.learning_rate), wrt=nnx.Param)
    model.train()
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    for batch in draw_batches(len(images), 60, options.steps, options.seed):
        train_step(model, optimizer, images[batch], labels[batch])
    model.eval()
    found = model(jnp.asarray(data.test_images)).argmax(-1)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    for number, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
        axes.imshow(data.test_images[number].reshape(8, 8), cmap="Greys")
        axes.axis("off")
        is_right = int(found[number]) == int(data.test_labels[number])
        axes.set_title(str(int(found[number])), color=RIGHT if is_right else WRONG, fontsize=15)
    return figure


def folding() -> Figure:
    """What becomes of a convolution and its batch norm."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 14), ylim=(8.4, 0))
    axes.axis("off")
    axes.text(0.5, 1.0, "before", fontsize=17, fontweight="bold", color=INK)
    boxes(axes, 2.5, [("convolution", RIGHT), ("batch norm", WRONG), ("relu", "#666666")])
    axes.text(0.5, 5.0, "folded, the same outputs", fontsize=17, fontweight="bold", color=INK)
    boxes(axes, 6.5, [("convolution, scaled\nand shifted", RIGHT), ("relu", "#666666")])
    return figure


def boxes(axes: Axes, y: float, layers: list[tuple[str, str]]) -> None:
    """Layers in a row, an arrow after each."""
    width = 3.9 if len(layers) == 3 else 6.2
    for number, (text, color) in enumerate(layers):
        x = 0.5 + number * (width + 0.75)
        right = width if text != "relu" else 2.4
        shape = "round,pad=0,rounding_size=0.2"
        axes.add_patch(
            FancyBboxPatch((x, y - 0.9), right, 1.8, boxstyle=shape, fc=color, ec="none")
        )
        style: dict[str, Any] = dict(color="white", fontsize=15, fontweight="bold", va="center")
        axes.text(x + right / 2, y, text, ha="center", **style)
        arrow = dict(arrowstyle="-|>", color=INK, lw=1.8, shrinkA=0, shrinkB=0)
        axes.annotate("", (x + right + 0.7, y), (x + right + 0.05, y), arrowprops=arrow)


if __name__ == "__main__":
    for name, draw in (("batch_norm_digits_nnx", digits), ("fold_batch_norm", folding)):
        target = HERE / "images" / f"{name}.png"
        draw().savefig(target, dpi=110)
        print(f"wrote {target}, {target.stat().st_size / 1000:.0f} kB")
