"""Base training and finetuning from the cache, in one process or under torchrun."""
