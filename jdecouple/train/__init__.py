"""A run from a configuration: the program above the library. Nothing imports it from below."""
