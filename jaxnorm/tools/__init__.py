"""Tools for whole models, of either framework: they know variables by their names."""

from jaxnorm.tools.replicas import merge_replicas as merge_replicas
