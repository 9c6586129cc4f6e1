"""Stored statistics, taken anew from data or from replicas."""
