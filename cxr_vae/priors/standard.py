"""`standard`: N(0, 1), which the KL term pulls the posteriors to. Nothing to fit."""

from torch import Tensor

from cxr_vae.priors.base import Prior


class StandardPrior(Prior):
    """Latents are the noise itself."""

    def sample(self, noise: Tensor, uniform: Tensor, labels: Tensor | None) -> Tensor:
        """See Prior.sample."""
        return noise
