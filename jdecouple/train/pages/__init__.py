"""Pages about runs: one HTML file each, which asks nothing of any other place."""
