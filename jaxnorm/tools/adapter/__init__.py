"""A model of either framework as the tools see it, and what can be seen inside of it."""
