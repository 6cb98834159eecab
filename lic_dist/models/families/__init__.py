"""Adapters: the families of models served, each a subclass of `models.protocol.CodecModel`."""
