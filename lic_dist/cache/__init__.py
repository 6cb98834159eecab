"""The latent cache: a sharded Zarr store with one owner a shard and a marker when it is done."""
