"""`python -m lic_dist`: what torchrun starts."""

from lic_dist.app.cli import main

main()
