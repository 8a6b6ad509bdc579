"""``slmops demo``: the main job, end to end, with real processes."""
