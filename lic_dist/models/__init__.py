"""Models: the protocol that families of models speak, the families served, loading checkpoints, refinement of latents.

In: a checkpoint file or name. Out: a `Checkpoint` (module, spec, carried records), whose `codec` is the module as its
family sees it: latents, stages of means and scales, pictures. The only room that imports compressai. Imports the
ground.
"""
