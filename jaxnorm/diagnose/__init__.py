"""Reports on programs: what their normalization costs.

| function | what it reports |
|---|---|
| `collectives` | what a compiled program sends between devices |
"""

from jaxnorm.diagnose.collectives import Collective as Collective
from jaxnorm.diagnose.collectives import collectives as collectives
