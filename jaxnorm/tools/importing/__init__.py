"""Import of models from other frameworks, and export back."""

from jaxnorm.tools.importing.names import Stack as Stack
from jaxnorm.tools.importing.presets import torch_defaults as torch_defaults
from jaxnorm.tools.importing.safetensors_file import save_safetensors as save_safetensors
from jaxnorm.tools.importing.torch import export_torch as export_torch
from jaxnorm.tools.importing.torch import import_torch as import_torch
