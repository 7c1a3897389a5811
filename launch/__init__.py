"""Starts the stages of `cxr_vae` as jobs, on this machine or on Slurm. The only place that imports submitit."""
