"""`python -m lic_dist`: what torchrun starts."""

from lic_dist.cli import main

main()
