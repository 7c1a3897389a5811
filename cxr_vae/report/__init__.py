"""What `cxr-vae report` shows, on the screen and as a page."""
