"""A model of a public repository, as it is: `architecture: foreign_architecture:WindowSlices` (docs/families.md)

Its class is imported by name, from the folder that you are in or from PYTHONPATH, and nothing in its files is changed.
This one codes y in slices of channels with latent residual prediction, by networks with window attention, as LIC_TCM's.
"""

from lic_dist.models.families.slices import ChannelSlices, slice_sizes
from lic_dist.models.protocol import Strides


class WindowSlices(ChannelSlices):
    name = "window-slices"
    module_class = "foreign_model:WindowCodec"  # module and class; models.tcm:TCM in a clone of LIC_TCM
    strides = Strides(y=16, sides=(64,), multiple=256)  # h_a has windows of 8x8 positions, of 32 pixels a side each
    mean_nets = ("atten_mean", "cc_mean_transforms")  # the lists that make means and scales, one after the other
    scale_nets = ("atten_scale", "cc_scale_transforms")
    parts = {**ChannelSlices.parts, "context": (*ChannelSlices.parts["context"], "atten_mean.", "atten_scale.")}
    supports = frozenset({"refinement"})  # not tiles: where a window lies depends on the whole picture

    @classmethod
    def fits(cls, state):
        return "atten_mean.0.in_conv.weight" in state

    @classmethod
    def sizes(cls, state):
        return {**super().sizes(state), "num_slices": len(slice_sizes(state, "cc_mean_transforms"))}
