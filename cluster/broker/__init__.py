"""The ephemeral broker: a Redis of the run's own, kept by a guardian process."""
