"""The SPMD engine: a pipeline of equal blocks as one compiled program."""
