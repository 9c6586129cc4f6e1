"""Reports: on a model's norms, and on what normalization costs a program.

| function | what it reports |
|---|---|
| `report_norms` | of each norm of a model: statistics, dead channels, singular values, ... |
| `norm_kernels` | which kernels a program's norms run as on a platform, and why |
| `collectives` | what a compiled program sends between devices |
"""

from jaxnorm.diagnose.collectives import Collective as Collective
from jaxnorm.diagnose.collectives import collectives as collectives
from jaxnorm.diagnose.norm_kernels import NormKernel as NormKernel
from jaxnorm.diagnose.norm_kernels import norm_kernels as norm_kernels
from jaxnorm.diagnose.norm_rows import NormRow as NormRow
from jaxnorm.diagnose.norms import NormReport as NormReport
from jaxnorm.diagnose.norms import report_norms as report_norms
