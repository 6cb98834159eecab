"""The bitstream: container, rANS coding, images to bytes and back."""
