"""Models: the families served, loading checkpoints, the stages of an entropy model, refinement of latents.

In: a checkpoint file or name. Out: a `Checkpoint` (module, spec, carried records), and a batch's latents, means and
scales. The only room that imports compressai. Imports the ground.
"""
