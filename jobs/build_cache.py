"""Build a latent cache: what a cluster is handed.

ray job submit --working-dir . -- python jobs/build_cache.py configs/photos-tcq8.yaml --set engine.address=auto

The job runs in a copy of the folder that Ray throws away, so the paths in the YAML must be absolute;
`lic-dist submit cache` sends the YAML alone and keeps relative ones.
"""

from lic_dist.app.cli import main_of

if __name__ == "__main__":
    main_of("cache", "build")
