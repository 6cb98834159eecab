"""The quick start: the whole main job on a handful of photos, offline, in a few minutes on two cores."""
