"""Parts of the examples that are not for copying: data, command lines, tables and pictures."""
