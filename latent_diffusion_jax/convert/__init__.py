"""Published checkpoint files in and out: read safely and lazily, written atomically."""
