"""Reports: on a model's norms, on what normalization costs a program, on how a network trains.

| function | what it reports |
|---|---|
| `report_norms` | of each norm of a model: statistics, dead channels, singular values, ... |
| `norm_kernels` | which kernels a program's norms run as on a platform, and why |
| `collectives` | what a compiled program sends between devices |
| `loss_landscape` | loss and gradient along a step: predictiveness of gradients, smoothness |
| `covariate_shift` | change of a layer's gradient by the step of the layers before it |
| `input_shift` | distance between a layer's input distributions before and after a step |
| `saturated_share` | share of inputs at which an activation is all but flat |
| `jacobian_singular_values` | of any function of one array, at a point |

The last five take pure functions and arrays, and measure what papers on normalization speak of.
"""

from jaxnorm.diagnose.collectives import Collective as Collective
from jaxnorm.diagnose.collectives import collectives as collectives
from jaxnorm.diagnose.covariate_shift import CovariateShift as CovariateShift
from jaxnorm.diagnose.covariate_shift import covariate_shift as covariate_shift
from jaxnorm.diagnose.input_shift import InputShift as InputShift
from jaxnorm.diagnose.input_shift import input_shift as input_shift
from jaxnorm.diagnose.jacobian import jacobian_singular_values as jacobian_singular_values
from jaxnorm.diagnose.landscape import LossLandscape as LossLandscape
from jaxnorm.diagnose.landscape import loss_landscape as loss_landscape
from jaxnorm.diagnose.norm_kernels import NormKernel as NormKernel
from jaxnorm.diagnose.norm_kernels import norm_kernels as norm_kernels
from jaxnorm.diagnose.norm_rows import NormRow as NormRow
from jaxnorm.diagnose.norms import NormReport as NormReport
from jaxnorm.diagnose.norms import report_norms as report_norms
from jaxnorm.diagnose.saturation import saturated_share as saturated_share
