"""Finetune from a cache: what a cluster is handed.

torchrun --nproc-per-node=8 jobs/finetune.py configs/photos-tcq8.yaml
ray job submit --working-dir . -- \\
    python jobs/finetune.py configs/photos-tcq8.yaml --engine ray --set engine.address=auto

The second runs in a copy of the folder that Ray throws away, so the paths in the YAML must be absolute;
`lic-dist submit finetune` sends the YAML alone and keeps relative ones.
"""

from lic_dist.app.cli import main_of

if __name__ == "__main__":
    main_of("finetune")
