"""Where the time of 50 epochs would go on GPUs nobody lent us: arithmetic on paper, from stated pieces. No measurement.

    python -m benchmarks.on_paper

The pieces that were measured are those of benchmarks/results/*-speed.md (CPU time an image) and of the model
(operations and bytes an image); those of GPU, network and storage are data sheets' and marked so. Half of the
memory-bound ceiling is assumed to be reached.
"""

from dataclasses import dataclass

from tabulate import tabulate

EPOCHS = 50
DECODE_S = {"raw": 0.12e-3, "png": 0.96e-3}  # measured: CPU an image, one core of the machine of the results
BYTES = {"raw": 50.7e3, "png": 23.3e3}  # measured: an image in a tar
PIXELS = 224 * 224
GRADIENTS = 61e6  # bytes of float32 gradients, measured
CEILING = 73e3  # images/s of one H200 at batch 256: 43.4 MB an image at 4.3 TB/s (data sheet), fused norms
REACHED = 0.5  # assumed
CORES = 16  # a GPU, assumed
GPU_MEMORY, NODE_MEMORY = 0.5 * 141e9, 0.5 * 2e12  # what may be filled with images; data sheets
NVLINK, NETWORK = 450e9, 50e9  # bytes/s a GPU within and between nodes, data sheets
STORAGE = 20e9  # bytes/s of a parallel file system for the whole job, assumed
BATCH = 256  # images a GPU
PER_NODE = 8


@dataclass
class Plan:
    """50 epochs of `num` images on `gpus`."""

    num: int
    gpus: int
    has_room: bool = True

    @property
    def place(self) -> str:
        """Where the images are kept."""
        if not self.has_room:
            return "shards"
        if self.num * PIXELS <= GPU_MEMORY:
            return "gpu"
        return "memory" if self.num * PIXELS <= NODE_MEMORY else "shards"

    def parts(self) -> dict[str, float]:
        """Seconds of each part, were it alone."""
        nodes = max(1, self.gpus // PER_NODE)
        steps = EPOCHS * self.num / (BATCH * self.gpus)
        share = 2 * (self.gpus - 1) / self.gpus
        link = NVLINK if nodes == 1 else NETWORK
        reads = 1 if self.place != "shards" else EPOCHS
        return {
            "steps": EPOCHS * self.num / (self.gpus * CEILING * REACHED),
            "all-reduce": steps * share * GRADIENTS / link,
            # Each node decodes all of what it keeps; each reads all of it.
            "decode": reads * self.num * DECODE_S["png"] / (CORES * min(self.gpus, PER_NODE)),
            "storage": reads * self.num * BYTES["png"] * nodes / STORAGE,
        }

    def row(self) -> list[object]:
        """As in the table. Decoding and reading overlap with nothing; the all-reduce with half of a step."""
        parts = self.parts()
        hidden = min(parts["all-reduce"], 0.5 * parts["steps"])
        total = sum(parts.values()) - hidden - min(parts["decode"], parts["storage"])
        cost = dict(parts) | {"all-reduce": parts["all-reduce"] - hidden}
        limit = max(cost, key=lambda name: cost[name])
        figures = [f"{parts[name]:,.3g}" for name in ("steps", "all-reduce", "decode", "storage")]
        return [
            f"{self.num:,}",
            self.gpus,
            self.place,
            *figures,
            f"{total:.3g}",
            f"{total * self.gpus / 3600:.2g}",
            limit,
        ]


def main() -> None:
    rows = [Plan(num, gpus).row() for num in (5_216, 112_000, 377_000, 5_000_000) for gpus in (1, 8, 64)]
    rows += [Plan(5_000_000, gpus, has_room=False).row() for gpus in (1, 8, 64)]
    parts = ["steps, s", "all-reduce, s", "decode, s", "storage, s"]
    headers = ["images", "GPUs", "kept on", *parts, "in all, s", "GPU hours", "the limit"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
