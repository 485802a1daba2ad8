"""What a model remembers between calls."""
