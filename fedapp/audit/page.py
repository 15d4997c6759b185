"""report.html of an audit with an attack: claim, bound, and in pictures what an attacker makes of updates."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import torch

from fedapp.audit.inversion import Attack
from fedapp.audit.one_run import Finding
from fedapp.report.document import document, tile
from fedapp.report.folder import write_text
from fedapp.report.summary import digits

PIXELS = (
    112  # how large a picture is encoded, about; small ones in whole multiples, so that pixels stay sharp
)


def write_page(folder: Path, choices: str, finding: Finding, said: str, found: Attack) -> Path:
    """Write report.html into a folder. `choices` says what was audited, `said` what an audit prints."""
    page = folder / "report.html"
    body = (
        f'<header><h1>Audit</h1><p class="choices">{escape(choices)}</p></header>'
        f'<section class="tiles">{_tiles(finding)}</section>'
        f'<pre class="card">{escape(said)}</pre>{_pictures(found)}'
    )
    write_text(page, document(f"Audit: {choices}", body))
    return page


def _tiles(finding: Finding) -> str:
    claim, (low, median, high) = finding.claim, finding.expected
    confidence = f"at {100 * finding.confidence:g} % confidence"
    tiles = (
        ("claimed epsilon", digits(claim.epsilon), f"at delta {claim.delta:g}"),
        ("lower bound", digits(finding.bound), confidence),
        ("expected of an ideal audit", digits(median), f"{digits(low)} to {digits(high)}"),
        ("verdict", "passed" if finding.passed else "FAILED", "whether the bound stays within the claim"),
    )
    return "".join(tile(*each) for each in tiles)


def _pictures(found: Attack) -> str:
    """A line for each protection: the clients' images as an attacker has them, and how often it was right."""
    rows = [_row("the client's image", "", found.truth, [""] * len(found.truth))]
    for name, row in found.rows.items():
        said = f"{digits(float(row.psnr.mean()))} dB in the mean"
        if row.picked is not None and row.labelled is not None:
            said += f"; example picked: {row.picked:.0%}, its label: {row.labelled:.0%}"
        rows.append(_row(name, said, row.images, [f"{value:.0f} dB" for value in row.psnr]))
    note = (
        "Each client sends one update of the first weights, made of one image. An attacker who knows model "
        f"and weights looks for the image; another one picks the likeliest of {found.candidates:,} examples. "
        "Under DP all of the budget goes into this one step, which serves them best."
    )
    return (
        f'<figure class="card attack"><figcaption><h3>What a server makes of one update</h3></figcaption>'
        f'<table>{"".join(rows)}</table><p class="note">{note}</p></figure>'
    )


def _row(name: str, said: str, images: torch.Tensor, under: Sequence[str]) -> str:
    cells = "".join(
        f'<td><img alt="" src="data:image/png;base64,{_png(image)}"><br>{text}</td>'
        for image, text in zip(_levels(images), under, strict=True)
    )
    return f"<tr><th>{escape(name)}<br><small>{said}</small></th>{cells}</tr>"


def _levels(images: torch.Tensor) -> torch.Tensor:
    """Bytes from the darkest to the brightest value of these images."""
    low, high = images.min(), images.max()
    return ((images - low) / (high - low).clamp(min=1e-9) * 255).round().to(torch.uint8)


def _png(image: torch.Tensor) -> str:
    from PIL import Image

    times, file = max(1, PIXELS // max(image.shape[1:])), BytesIO()
    large = image.repeat_interleave(times, 1).repeat_interleave(times, 2).permute(1, 2, 0)
    Image.fromarray(large.squeeze(2).numpy()).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()
