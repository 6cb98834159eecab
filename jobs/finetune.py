"""Finetune from a cache: what a cluster is handed.

torchrun --nproc-per-node=8 jobs/finetune.py configs/photos-tcq8.yaml
"""

from lic_dist.cli import main_of

if __name__ == "__main__":
    main_of("finetune")
