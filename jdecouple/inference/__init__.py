"""What was trained, in use: rules of leaving early, calibration and reports."""
