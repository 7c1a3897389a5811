"""How near a training run comes to what its device can do."""

import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cxr_vae.config import Config
from cxr_vae.models import PatchDiscriminator, build_discriminator, build_model
from cxr_vae.precision import peak_flops
from cxr_vae.training.stopwatch import Stopwatch


def efficiency(
    config: Config, device: torch.device, num_images: int, watch: Stopwatch, world_size: int, flops: int
) -> dict[str, Any]:
    """Figures of an attempt that trained on `num_images` of `flops` operations each, in the time `watch` has seen.

    `model_flops_utilisation` is the share of what all devices could multiply in that time, at the rate `peak_flops`
    measured here; None where nothing was trained.
    """
    seconds = sum(watch.seconds.values())
    peak = peak_flops(device, config.train.precision, largest=8192 if device.type == "cuda" else 2048)
    return {
        "num_images": num_images,
        "seconds": {kind: round(spent, 3) for kind, spent in watch.seconds.items()},
        "images_per_s": num_images / seconds if seconds else None,
        "flops_per_image": flops,
        "peak_flops": peak,
        "model_flops_utilisation": num_images * flops / (seconds * world_size * peak) if seconds else None,
        "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def in_a_line(figures: dict[str, Any]) -> str:
    """`104.2 images/s; time: 97 % step, 2 % test, 1 % data; 61 % of 150 GFLOP/s; peak memory 1.2 GB`."""
    total = sum(figures["seconds"].values())
    shares = sorted(((spent / total, kind) for kind, spent in figures["seconds"].items()), reverse=True)
    spent = ", ".join(f"{100 * share:.3g} % {kind}" for share, kind in shares if share >= 0.0005)
    peak = figures["peak_flops"] / 1e9
    used = f"{100 * figures['model_flops_utilisation']:.2g} % of {peak:,.{0 if peak >= 10 else 2}f} GFLOP/s"
    memory = f"peak memory {figures['peak_memory_bytes'] / 1e9:.2f} GB"
    return f"{figures['images_per_s']:.1f} images/s; time: {spent}; {used}; {memory}"


def flops_per_image(config: Config) -> int:
    """Floating-point operations of forward and backward passes, counted without computing anything.

    With an adversarial loss, of the steps in which the discriminator has its part.
    """
    with torch.device("meta"):
        model, batch = build_model(config), 2
        images = torch.empty(batch, 1, config.data.image_size, config.data.image_size)
        with FlopCounterMode(display=False) as counter:
            labels = torch.zeros(batch, dtype=torch.long) if model.num_classes else None
            output = model(images, torch.empty(batch, *model.latent_shape), labels)
            sum(part.sum() for part in output).backward()
            if config.objective.adversarial_weight:
                _use_discriminator(build_discriminator(config), images, config.objective.feature_matching_weight > 0)
    return int(counter.get_total_flops()) // batch


def _use_discriminator(discriminator: PatchDiscriminator, images: Tensor, matches_features: bool) -> None:
    """What `VaeStep` does with it: through it to the reconstructions, and its own step on both kinds of images."""
    discriminator.requires_grad_(False)
    discriminator(images.clone().requires_grad_())[-1].sum().backward()
    if matches_features:
        discriminator(images)
    discriminator.requires_grad_(True)
    discriminator(torch.cat([images, images]))[-1].sum().backward()


def peak_memory(device: torch.device) -> int:
    """Bytes at most at a time: of the GPU, or of this process.

    On Linux not getrusage's, which knows what the process was before it became this program: a copy of its parent.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
