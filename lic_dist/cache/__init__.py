"""The latent cache: a Zarr store in a folder or a bucket, written shard by shard, read by sample or as a stream.

In: a `Plan` and the arrays of shards. Out: `LatentCache`, whole whatever was killed, the same bytes from any number of
workers. Imports the ground and `data`.
"""
