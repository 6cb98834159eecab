"""Models: the families served, checkpoints as they are found, the stages of an entropy model, refinement.

In: a checkpoint file or name. Out: a `Checkpoint` (module, spec, carried records); of a batch its latents, means and
scales. The one place that imports compressai. Imports the ground.
"""
