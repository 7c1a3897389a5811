"""What `cxr-vae inspect` finds out about shards: duplicates, patients in two splits, what gives classes away."""
