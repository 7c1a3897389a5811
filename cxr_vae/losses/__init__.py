"""What is minimised: `objective`.

A likelihood (`likelihoods`) is what the ELBO (`elbo`) is recorded of, and one replaces another; terms of
`reconstruction_terms` are added to it, as an adversarial loss (`adversarial`) is.
"""
