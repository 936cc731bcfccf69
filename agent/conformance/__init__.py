"""Whether a core keeps to the core API: what is asked of it, and how its answers are judged."""
