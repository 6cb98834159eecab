"""Build a latent cache: what a cluster is handed.

ray job submit --working-dir . -- python jobs/build_cache.py configs/photos-tcq8.yaml
"""

from lic_dist.cli import main_of

if __name__ == "__main__":
    main_of("cache", "build")
