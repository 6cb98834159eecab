"""The quick start: the whole main job on a few photos, offline, in a few minutes on two cores."""
