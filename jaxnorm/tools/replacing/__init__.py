"""Other layers in the place of norms, or the same that stand still."""
