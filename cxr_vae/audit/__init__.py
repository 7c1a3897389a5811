"""Does a model hand out its training images? `cxr-vae audit`."""
