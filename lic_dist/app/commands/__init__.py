"""The groups of commands, and the arguments and helpers that commands share."""
