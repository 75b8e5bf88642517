"""The MPMD engine: compiled calls for every stage, dispatched in the order of a schedule."""
