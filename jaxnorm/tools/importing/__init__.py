"""Import of models from other frameworks, and export back."""
