"""Evaluation: real bitstreams of a folder of images, decoded again, compared and measured.

In: an `Experiment`. Out: a result file with a row for each image, a CSV, kept pictures. Imports what `building` does,
and `building`.
"""
