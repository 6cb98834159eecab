"""The latent cache: a Zarr store in a folder or a bucket, written shard by shard, read by sample or as a stream.

In: a `Plan` and the arrays of shards. Out: `LatentCache`. A store stays valid whatever process is killed, and has the
same bytes for any number of workers. Imports the ground and `data`.
"""
