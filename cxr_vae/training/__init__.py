"""From shards to trained weights: the step, the loop, and what they train (VAEs and priors)."""
