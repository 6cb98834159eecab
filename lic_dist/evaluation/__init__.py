"""Evaluation: code a folder of images to real bitstreams, decode them, compare the results and measure.

In: an `Experiment`. Out: a result file with a row for each image, a CSV, decoded pictures, an archive of bitstreams.
Imports `building` and what it imports.
"""
