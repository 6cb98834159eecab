"""Rate-distortion runs, BD-rate, plots and reports."""
