"""The groups of commands, and what all commands share."""
