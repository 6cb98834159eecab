"""CompressAI architectures: loading, saving, parameter parts, and the stages view."""
