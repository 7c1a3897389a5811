"""A run, or several beside each other, as one HTML file that needs no network: `cxr-vae report`.

templates/report.html says how the page looks. Text from files is escaped by Jinja2, and the page's own
Content-Security-Policy forbids it to load anything or to run any script but its own.
"""

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2

from cxr_vae import __version__
from cxr_vae.files import write_atomically
from cxr_vae.report.comparison import MOST_COMPARED, sections_comparing
from cxr_vae.report.inputs import Inputs
from cxr_vae.report.sections import Section, Tile, sections_of, tiles_of

PAGE = "report.html"


def write_report(inputs: Sequence[Inputs], out: Path) -> None:
    """Writes the page of runs."""
    if len(inputs) == 1:
        title, tiles, sections = inputs[0].name, tiles_of(inputs[0]), sections_of(inputs[0])
        subtitle = str(inputs[0].run.path.resolve())
    else:
        title, tiles, sections = f"{len(inputs)} runs side by side", [], sections_comparing(inputs)
        subtitle = ", ".join(one.name for one in inputs[:MOST_COMPARED]) + (" …" if len(inputs) > MOST_COMPARED else "")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(title, subtitle, tiles, sections))


def render(title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The page as text."""
    loader = jinja2.PackageLoader("cxr_vae.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(PAGE).render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=sections,
        warnings=[(one, finding) for one in sections for finding in one.findings if finding.level == "warning"],
        script=script,
        script_hash=digest,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M %z"),
    )
