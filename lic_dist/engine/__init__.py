"""Run units of work through stages, in this process, in several, or on a Ray cluster.

In: `Stage`s and units. Out: (unit, result) in order of completion, each unit once. Knows nothing of images. Imports the
ground.
"""
