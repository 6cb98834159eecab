"""Base training and finetuning from the cache, in one process, under torchrun or Ray Train."""
