"""The nearest images of one set to each image of another: in pixels after alignment, and in features.

Both spaces have unit vectors, and the distance of two is √(2 - 2 · their product), 0 … 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh
from torch import Tensor
from torch.nn import functional as F

from cxr_vae.audit.fingerprints import Fingerprints

MAX_SHIFT = 2
"""In pixels of the small copies: at 224 px that is ± 14 px in each direction."""

QUERIES_AT_ONCE = 64
NUM_COMPONENTS = 64
MIN_GAIN = 0.2


class Neighbours(NamedTuple):
    """Of m images: the distances (m, K) float32 of their nearest, ascending, and those images' ids (m, K) int64.

    Where there are fewer than K, the distance is inf and the id -1.
    """

    distances: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]

    def of(self, images: slice | npt.NDArray[np.int64]) -> "Neighbours":
        """Those of some of the images."""
        return Neighbours(self.distances[images], self.ids[images])


@dataclass(frozen=True)
class Space:
    """How two images are compared: an image that is looked for has V unit vectors, the best of which counts."""

    name: str
    looked_for: Callable[[Fingerprints], Tensor]
    """(m, V, D) of m images."""
    looked_at: Callable[[Fingerprints], Tensor]
    """(n, D) of n images."""
    is_learned: bool
    """Whether a network's features are compared, among which a few images may be the nearest of many others."""


def centred(vectors: Tensor) -> Tensor:
    """Vectors (…, D) with mean 0 and length 1: their product is then the correlation. Constant ones become zeros."""
    return F.normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)


def shifted_crops(small: Tensor) -> Tensor:
    """(m, V, D) of small copies (m, S, S): the crops at all V = (2k + 1)² offsets, each of mean 0 and length 1."""
    k = min(MAX_SHIFT, (small.shape[-1] - 2) // 2)
    crops = F.unfold(small[:, None], small.shape[-1] - 2 * k)  # (m, D, V)
    return centred(crops.transpose(1, 2))


def central_crops(small: Tensor) -> Tensor:
    """(n, D) of small copies (n, S, S): the crop that all shifts are compared with."""
    k = min(MAX_SHIFT, (small.shape[-1] - 2) // 2)
    end = small.shape[-1] - k
    return centred(small[:, k:end, k:end].flatten(1))


def pixel_space() -> Space:
    """The largest normalised cross-correlation over shifts of up to ± 2 small pixels (Lewis 1995).

    The central crop of the image that is looked at is compared with all crops of that size of the one looked for.
    Brightness and contrast make no difference.
    """
    return Space(
        "pixels",
        lambda images: shifted_crops(images.small),
        lambda images: central_crops(images.small),
        is_learned=False,
    )


def feature_space(centre: Tensor) -> Space:
    """The cosine of features (Somepalli et al. 2023) about their mean (D,) over training images.

    Without the mean, features that are all positive point the same way.
    """
    return Space(
        "features",
        lambda images: F.normalize(images.pooled - centre)[:, None],
        lambda images: F.normalize(images.pooled - centre),
        is_learned=True,
    )


def likened(reference: Fingerprints, samples: Fingerprints) -> Fingerprints:
    """Reference images made as blurred, pale or alike as the samples are, so that these alone don't set them apart.

    A blurred image has no fine structure of its own: all its distances are smaller, and the nearest stands out more.
    """
    shape = reference.small.shape
    small = likened_vectors(centred(reference.small.flatten(1)), centred(samples.small.flatten(1)))
    return Fingerprints(small.reshape(shape), likened_vectors(reference.pooled, samples.pooled))


def likened_vectors(reference: Tensor, samples: Tensor) -> Tensor:
    """(R, D) of (R, D), with the mean of samples (m, D) and their variance along the main components of the reference.

    These are up to 64, and one in ten of R at the most, so that they hold for other images too; what is outside them
    has the samples' variance as a whole. No spread gets below a fifth of what it was: where all samples are copies of
    one image, the reference must not become that image.
    """
    mean, around = reference.mean(0), samples - samples.mean(0)
    reference = reference - mean
    num = min(NUM_COMPONENTS, len(reference) // 10, reference.shape[1])
    covariance = (reference.T @ reference).double().numpy()
    size = len(covariance)
    basis = torch.from_numpy(eigh(covariance, subset_by_index=[size - num, size - 1])[1]).float()
    parts, around_parts = reference @ basis, around @ basis
    rest, around_rest = reference - parts @ basis.T, around - around_parts @ basis.T
    gains = gain(around_parts.pow(2).mean(0), parts.pow(2).mean(0))
    return samples.mean(0) + (parts * gains) @ basis.T + rest * gain(around_rest.pow(2).mean(), rest.pow(2).mean())


def gain(wanted: Tensor, had: Tensor) -> Tensor:
    """What takes one variance to another, at least 0.2."""
    return (wanted / had.clamp(min=torch.finfo(had.dtype).tiny)).sqrt().clamp(MIN_GAIN, 1 / MIN_GAIN)


class Search:
    """Keeps the nearest `keep` to each of m images, while the images to look at come by in blocks.

    Images of the same group (a patient) are no neighbours; group -1 is nobody's.
    """

    def __init__(
        self, space: Space, images: Fingerprints, groups: npt.NDArray[np.int64], keep: int, device: torch.device | str
    ) -> None:
        self.space, self.images, self.device = space, images, device
        self.groups = torch.from_numpy(groups).to(device)
        self.distances = torch.full((len(groups), keep), torch.inf, device=device)
        self.ids = torch.full((len(groups), keep), -1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def look_at(self, images: Fingerprints, groups: npt.NDArray[Any], first_id: int) -> None:
        """Takes n more images, whose ids count from `first_id`."""
        vectors = self.space.looked_at(images).to(self.device)
        theirs = torch.from_numpy(groups.astype(np.int64)).to(self.device)
        ids = torch.arange(first_id, first_id + len(vectors), device=self.device)
        for start in range(0, len(self.groups), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            queries = self.space.looked_for(Fingerprints(*(whole[part] for whole in self.images))).to(self.device)
            products = (queries.flatten(0, 1) @ vectors.T).unflatten(0, queries.shape[:2]).amax(1)
            distances = (2 - 2 * products).clamp(min=0).sqrt()
            distances[self.groups[part, None] == theirs] = torch.inf
            self._keep_nearest(part, distances, ids)

    def _keep_nearest(self, part: slice, distances: Tensor, ids: Tensor) -> None:
        all_ids = torch.cat([self.ids[part], ids.expand(len(distances), -1)], 1)
        nearest = torch.cat([self.distances[part], distances], 1).topk(self.ids.shape[1], largest=False)
        self.distances[part] = nearest.values
        self.ids[part] = torch.where(nearest.values.isinf(), -1, all_ids.gather(1, nearest.indices))

    def found(self) -> Neighbours:
        """The nearest of all images that came by."""
        return Neighbours(self.distances.cpu().numpy(), self.ids.cpu().numpy())


def merge(parts: Sequence[Neighbours], keep: int) -> Neighbours:
    """The nearest `keep` of several searches for the same images."""
    distances = np.concatenate([part.distances for part in parts], 1)
    ids = np.concatenate([part.ids for part in parts], 1)
    order = np.argsort(distances, axis=1, kind="stable")[:, :keep]
    return Neighbours(np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1))
