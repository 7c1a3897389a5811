"""What images are worth: feature networks, measures, and `cxr-vae evaluate`."""
