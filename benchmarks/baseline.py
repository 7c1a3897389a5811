"""The plain program: a VAE on chest X-rays as most people would write it. It is the yardstick of benchmarks/speed.py.

    python -m benchmarks.baseline SOURCE OUT [--epochs 1] [--image-size 224] [--evaluate 1000 --inception-weights FILE]

SOURCE holds train/CLASS/*.jpeg and test/CLASS/*.jpeg. Imports nothing of cxr_vae. Original files are decoded and
resized in every epoch, by two workers of a DataLoader; everything is computed in float32; the loss is binary
cross-entropy of the sigmoid; weights are saved each epoch. With --evaluate, images are generated and written, as many
real ones beside them, and torch-fidelity compares the folders. Prints a JSON line an epoch.
"""

import argparse
import json
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image


class VAE(nn.Module):
    """Five stride-2 convolutions down to a vector, and their mirror: 15,235,137 parameters at 224 px."""

    def __init__(
        self, image_size: int = 224, latent_dim: int = 128, channels: tuple[int, ...] = (32, 64, 128, 256, 512)
    ):
        super().__init__()
        side = image_size // 2 ** len(channels)
        layers: list[nn.Module] = []
        previous = 1
        for width in channels:
            layers += [nn.Conv2d(previous, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
            previous = width
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        self.fc_mu = nn.Linear(channels[-1] * side * side, latent_dim)
        self.fc_logvar = nn.Linear(channels[-1] * side * side, latent_dim)
        layers = [nn.Linear(latent_dim, channels[-1] * side * side), nn.Unflatten(1, (channels[-1], side, side))]
        for width in channels[-2::-1]:
            layers += [nn.ConvTranspose2d(previous, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
            previous = width
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(previous, 1, 4, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, logvar = self.fc_mu(h), self.fc_logvar(h)
        eps = torch.randn_like(mu) if eps is None else eps
        return self.decoder(mu + eps * torch.exp(0.5 * logvar)), mu, logvar


def vae_loss(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Nats, summed over the batch."""
    bce = F.binary_cross_entropy(recon, x, reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kl


def loader(folder: Path, image_size: int, batch_size: int, *, shuffle: bool) -> DataLoader:
    transform = transforms.Compose(
        [transforms.Grayscale(), transforms.Resize((image_size, image_size)), transforms.ToTensor()]
    )
    return DataLoader(
        ImageFolder(str(folder), transform), batch_size, shuffle=shuffle, num_workers=2, drop_last=shuffle
    )


def train_step(model: VAE, optimizer: torch.optim.Optimizer, x: Tensor, eps: Tensor | None = None) -> float:
    recon, mu, logvar = model(x, eps)
    loss = vae_loss(recon, x, mu, logvar) / len(x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_loss(model: VAE, batches: DataLoader) -> float:
    """Nats an image."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, _ in batches:
            x = x.to(next(model.parameters()).device)
            total += vae_loss(*(out := model(x))[:1], x, *out[1:]).item()
    return total / len(batches.dataset)  # type: ignore[arg-type]


def evaluate(model: VAE, source: Path, out: Path, num: int, arguments: argparse.Namespace) -> None:
    """FID, KID and Inception Score of `num` generated images against as many real ones, through PNGs."""
    import torch_fidelity

    device = next(model.parameters()).device
    for name in ("generated", "real"):
        (out / name).mkdir(exist_ok=True)
    model.eval()
    with torch.no_grad():
        for i in range(num):
            save_image(model.decoder(torch.randn(1, arguments.latent_dim, device=device)), out / f"generated/{i}.png")
    real = loader(source / "test", arguments.image_size, 1, shuffle=False)
    for i, (x, _) in zip(range(num), real, strict=False):
        save_image(x, out / f"real/{i}.png")
    metrics = torch_fidelity.calculate_metrics(
        input1=str(out / "generated"),
        input2=str(out / "real"),
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=min(num, 1000),
        cuda=torch.cuda.is_available(),
        feature_extractor_weights_path=arguments.inception_weights,
    )
    print(json.dumps(metrics), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--latent-dim", type=int, default=128)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=int, default=0, metavar="N")
    parser.add_argument("--inception-weights", help="of torch-fidelity, which else downloads them")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    train_loader = loader(arguments.source / "train", arguments.image_size, arguments.batch_size, shuffle=True)
    test_loader = loader(arguments.source / "test", arguments.image_size, arguments.batch_size, shuffle=False)
    model = VAE(arguments.image_size, arguments.latent_dim, tuple(arguments.channels)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=arguments.lr)

    for epoch in range(1, arguments.epochs + 1):
        began, losses = time.time(), []
        model.train()
        for step, (x, _) in enumerate(train_loader, start=1):
            losses.append(train_step(model, optimizer, x.to(device)))
            if epoch == step == 1:
                from_start = time.time() - psutil.Process().create_time()
                print(json.dumps({"first_step_s": from_start}), flush=True)
        trained = time.time()
        record = {"epoch": epoch, "train_loss": sum(losses) / len(losses), "test_loss": test_loss(model, test_loader)}
        with torch.no_grad():
            samples = model.decoder(torch.randn(64, arguments.latent_dim, device=device))
        save_image(samples, arguments.out / f"samples_{epoch:03d}.png")
        torch.save(model.state_dict(), arguments.out / "vae.pt")
        times = {
            "train_s": trained - began,
            "epoch_s": time.time() - began,
            "num_images": len(losses) * arguments.batch_size,
        }
        print(json.dumps(record | times), flush=True)
    if arguments.evaluate:
        evaluate(model, arguments.source, arguments.out, arguments.evaluate, arguments)


if __name__ == "__main__":
    main()
