"""What managers, workers and the guardian speak to each other, over the broker."""
