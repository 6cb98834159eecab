"""The user interface: the command line, the quick start, the study, and the writer of a first experiment file.

In: command-line arguments and experiment files. Out: calls of the other rooms, and their results as text. Imports every
room; no room imports it.
"""
