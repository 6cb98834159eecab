"""Ray clusters: jobs submitted to them, finetuning under Ray Train."""
