"""What each command of `cxr-vae` does with its arguments."""
