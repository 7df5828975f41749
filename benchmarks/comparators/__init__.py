"""What our uncertainty is held against: other ways to draw masks and to be unsure, on the same data and CPU time."""
