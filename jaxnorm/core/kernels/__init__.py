"""Faster forms of one normalization, for the devices and shapes where they are faster.

What is seen by a kernel is a matrix of rows or a stack of slabs (`layout.py`); which kernel serves
it, and why, says `choice.py`; `primitives.py` puts it in the place of the specification when a
program is lowered for a device.
"""
