"""Batch norms go into the layers before them."""
