"""Plots for a page, as SVG: each drawn twice, for a light and for a dark one."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cxr_vae.report.images import Picture, data_uri

WIDTH, HEIGHT = 5.2, 3.4  # inches, of 72 CSS pixels in an SVG
LOSSES = {"loss_nats": "Loss", "reconstruction_nats": "Reconstruction", "kl_nats": "KL"}
THEMES = {
    "light": {"ink": "#30363d", "grid": "#d9dde1", "colors": ["#0a66a8", "#c2410c", "#15803d", "#7e22ce", "#a16207"]},
    "dark": {"ink": "#c9d1d9", "grid": "#30363d", "colors": ["#6cb6ff", "#ff9e64", "#7ee2a8", "#d2a8ff", "#e3b341"]},
}
"""Colours that are told apart on the theme's background, also by most of the colour-blind."""
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
PLAIN = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "report",  # the same plot gives the same bytes
    "text.parse_math": False,  # names of runs may hold $
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
STYLES = ("-", "--", ":", "-.")


def plot(title: str, alt: str, draw: Callable[[Any, Sequence[str]], None]) -> Picture:
    """A picture of what `draw` puts on matplotlib axes with the colours it is given."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = []
    for theme in THEMES.values():
        ink = theme["ink"]
        style: dict[Any, Any] = dict.fromkeys(INKED, ink) | PLAIN | {"grid.color": theme["grid"]}
        with mpl.rc_context(style):
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            FigureCanvasSVG(figure)
            axes = figure.subplots()
            draw(axes, theme["colors"])
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
        drawn.append(data_uri("image/svg+xml", buffer.getvalue()))
    return Picture(title, alt, drawn[0], round(WIDTH * 72), round(HEIGHT * 72), dark_uri=drawn[1])


def loss_curves(epochs: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Loss, reconstruction and KL over epochs, train and test."""
    return _curves({split: [(epoch["epoch"], epoch[split]) for epoch in epochs] for split in ("train", "test")}, "")


def compared_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    """Test loss, reconstruction and KL over epochs of several runs."""
    return _curves(
        {run: [(epoch["epoch"], epoch["test"]) for epoch in epochs] for run, epochs in runs.items()}, ", test"
    )


def _curves(lines: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]], of: str) -> list[Picture]:
    return [_plot_losses(name, title + of, lines) for name, title in LOSSES.items()]


def _plot_losses(name: str, title: str, lines: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]) -> Picture:
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Any, colors: Sequence[str]) -> None:
        for place, (label, line) in enumerate(lines.items()):
            marker = "." if len(line) < 30 else None
            style = {"color": colors[place % len(colors)], "linestyle": STYLES[place % len(STYLES)]}
            values = [losses[name] for _, losses in line]
            axes.plot([epoch for epoch, _ in line], values, label=_shorten(label), marker=marker, **style)
        last = max(line[-1][0] for line in lines.values())
        axes.set(xlabel="epoch", ylabel="nats an image", xlim=(0.5, last + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=10)

    ends = "; ".join(f"{label} {line[0][1][name]:.1f} to {line[-1][1][name]:.1f}" for label, line in lines.items())
    return plot(title, f"{title} in nats an image over epochs: {ends}", draw)


def _shorten(name: str, most: int = 28) -> str:
    """The end of a long name; not with an underscore in front, which matplotlib leaves out of a legend."""
    name = name if len(name) <= most else "…" + name[1 - most :]
    return f" {name}" if name.startswith("_") else name


def units_plot(nats: Sequence[float], active: int | None) -> Picture:
    """The KL of each latent unit, largest first."""

    def draw(axes: Any, colors: Sequence[str]) -> None:
        axes.fill_between(range(1, len(nats) + 1), list(nats), step="mid", color=colors[0], alpha=0.85, linewidth=0)
        axes.set(xlabel="latent unit, largest first", ylabel="KL, nats an image", xlim=(0.5, len(nats) + 0.5), ylim=0)

    said = "" if active is None else f"; {active} of {len(nats)} units are active"
    return plot("KL of each latent unit", f"KL of {len(nats)} latent units, from {max(nats):.2f} nats down{said}", draw)
