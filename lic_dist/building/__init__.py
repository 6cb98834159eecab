"""Shard work: crops, frozen encoder, search, write; adaptation and calibration before it."""
