"""Small PyTorch models, and what they compute, for `test_import_torch.py`.

Writes `recorded/torch.npz`, with which the default tests compare, so that they need no PyTorch:

    python tests/record_torch.py
"""

import pathlib
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

FILE = pathlib.Path(__file__).parent / "recorded" / "torch.npz"


class Block(nn.Module):
    """The twin of `tool_models.Block`, with the names of torchvision."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=2 - stride, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x):
        # Flax's "SAME" pads only the far side of an image of even size.
        padded = nn.functional.pad(x, (0, 1, 0, 1)) if self.stride == 2 else x
        y = torch.relu(self.bn1(self.conv1(padded)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (self.downsample(x) if self.stride != 1 else x))


class ResNet(nn.Module):
    """The twin of `tool_models.ResNet`, with the names of torchvision."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 6, 2))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def old(method, layer):
    """A layer wrapped by a function that PyTorch has deprecated, as many checkpoints are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method(layer)


MODELS = {
    "resnet": (ResNet, (2, 3, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, padding=1, groups=2), (2, 4, 7)),
    "conv2d": (
        lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), padding=(2, 1), dilation=(2, 1), bias=False),
        (2, 3, 6, 5),
    ),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=1), (1, 2, 3, 4, 2)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 4, 2, padding=1), (2, 3, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(3, 2, (3, 4), 2, padding=1, output_padding=(1, 0)),
        (2, 3, 4, 3),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (1, 2, 3, 2, 3)),
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "heads": (lambda: nn.Linear(6, 8), (2, 6)),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), (2, 2, 3, 4)),
    "layer_norm": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "layer_norm_of_axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer_norm_of_image": (lambda: nn.LayerNorm((2, 3, 4)), (2, 2, 3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 2)),
    "rms_norm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "batch_norm": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 3)),
    "batch_norm_of_all_batches": (lambda: nn.BatchNorm1d(3, momentum=None), (5, 3)),
    "instance_norm": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (4, 3, 2, 3),
    ),
    "instance_norm_without_statistics": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 5)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 2)), (2, 2, 3, 4)),
    "weight_norm_old": (lambda: old(weight_norm, nn.Linear(3, 4)), (2, 3)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), (2, 3)),
    "spectral_norm_old": (lambda: old(spectral_norm, nn.Conv2d(2, 3, 2)), (2, 2, 3, 4)),
    "spectral_norm_of_transposed": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose1d(2, 3, 2)),
        (2, 2, 4),
    ),
}
"""By name, what makes a model, and the shape of its input."""


def recorded(name, seed=0):
    """A model's input, state dict, result, and what one step of training leaves of statistics."""
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        for _ in range(3):  # so that running statistics are no longer those of the start
            module.train()(2 * torch.randn(shape) + 1)
        x = 2 * torch.randn(shape) + 1
        state = {key: leaf.clone() for key, leaf in module.state_dict().items()}
        arrays = {"x": x, "y": module.eval()(x)}
        arrays |= {f"state/{key}": leaf for key, leaf in state.items()}
        module.train()(x)
        arrays |= {
            f"trained/{key}": leaf
            for key, leaf in module.state_dict().items()
            if "running" in key or "num_batches" in key
        }
    return {key: leaf.numpy().copy() for key, leaf in arrays.items()}


def main():
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        FILE,
        allow_pickle=False,
        **{f"{name}/{key}": leaf for name in MODELS for key, leaf in recorded(name).items()},
    )
    print(f"{FILE.name}: {FILE.stat().st_size} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
