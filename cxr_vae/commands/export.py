"""What `cxr-vae export` does: the weights of a checkpoint as one file, and the decoder as a program."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cxr_vae.checkpoints.manifest import find_fault, published, read_manifest
from cxr_vae.checkpoints.parts import read_tensors
from cxr_vae.checkpoints.saving import best_of
from cxr_vae.errors import UserError
from cxr_vae.models import VAE, build_model
from cxr_vae.run_dir import RunDir
from cxr_vae.weights import save_vae


class Decoder(nn.Module):
    """Latents (B, *latent_shape), and classes (B,) int64 where it is told of them, to images (B, 1, H, W) in [0, 1]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The pixels' means."""
        return self.vae.image(latents, labels)


def export_run(run: RunDir, which: str, out: Path | None, decoder: Path | None) -> list[Path]:
    """Writes the weights of a checkpoint ("newest", "best" or its name), and the decoder if asked; returns the files.

    Raises UserError where there is no such checkpoint or it is damaged.
    """
    config = run.saved_config()
    path = choose(run, which)
    manifest = read_manifest(path)
    vae = build_model(config)
    prefix = "ema." if config.train.ema_decay else "model."
    # state_dict's tensors are the network's own: reading fills it.
    read_tensors(path, {prefix + name: tensor for name, tensor in vae.state_dict().items()})
    vae.eval()
    weights = out or run.path / f"vae_{path.name}.safetensors"
    facts = {name: manifest[name] for name in ("step", "samples_seen", "classes") if name in manifest}
    save_vae(weights, vae, config, **facts)
    if decoder is None:
        return [weights]
    example = [torch.zeros(2, *vae.latent_shape)]
    if config.model.num_classes:
        example.append(torch.zeros(2, dtype=torch.int64))
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Decoder(vae), tuple(example), dynamic_shapes=(batch,) * len(example))
    torch.export.save(program, decoder)
    return [weights, decoder]


def choose(run: RunDir, which: str) -> Path:
    """The checkpoint that is meant, every byte of it verified."""
    all_of_them = published(run.checkpoints)
    if not all_of_them:
        raise UserError(f"{run.path} has no checkpoint yet: train it first")
    if which == "newest":
        path = all_of_them[0]
    elif which == "best":
        best = best_of(run.checkpoints)
        if best is None:
            raise UserError(f"{run.path} has no checkpoint from the end of an epoch: set checkpoint.best=true")
        path = best
    else:
        path = run.checkpoints / which
        if path not in all_of_them:
            names = ", ".join(path.name for path in all_of_them)
            raise UserError(f"{run.path} has no checkpoint {which}; it has {names}")
    fault = find_fault(path)
    if fault is not None:
        raise UserError(f"{path} can't be used: {fault}; name another with --checkpoint")
    return path
