"""What a training will need, from its design."""
