"""What a plan is made of: the devices it is for, times, what fits, and tables."""
