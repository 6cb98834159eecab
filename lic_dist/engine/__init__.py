"""Runs work over units, in this process or on Ray; knows nothing of images."""
