"""Draw loss.svg from loss.csv, and write the measured part of README.md between its two marks."""

import csv
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 400, 60, 44, 34, 20
COLOURS = {"baton-docs-6m": "#1f5fa8", "baton-docs-1m": "#c4622d"}
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")


def draw_losses(table: Path, picture: Path) -> None:
    """Held-out bits per byte over tokens read, one line a model."""
    curves: dict[str, list[tuple[float, float]]] = {}
    with table.open() as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["model"], []).append((int(row["tokens"]) / 1e6, float(row["heldout_bits_per_byte"])))
    points = [point for curve in curves.values() for point in curve]
    x_max = max(x for x, _ in points) * 1.02
    low, high = (round(f(y for _, y in points) + d, 1) for f, d in ((min, -0.1), (max, 0.1)))

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (WIDTH - LEFT - RIGHT) * x / x_max, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Held-out bits per byte over training</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">millions of tokens read</text>',
    ]
    for i in range(6):
        y, x = low + (high - low) * i / 5, x_max * i / 5
        (left, up), (across, _) = at(0, y), at(x, low)
        parts.append(
            f'<path d="M{left} {up:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{up + 4:.1f}" text-anchor="end">{y:.2f}</text>'
            f'<text x="{across:.1f}" y="{HEIGHT - 26}" text-anchor="middle">{x:.0f}</text>'
        )
    for number, (name, curve) in enumerate(curves.items()):
        path = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in curve)
        colour = COLOURS.get(name, "black")
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'.format(*at(*point), colour) for point in curve]
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 16 + 18 * number}" text-anchor="end" fill="{colour}">{name}: '
            f"{curve[-1][1]:.3f} at the end</text>"
        )
    picture.write_text("\n".join([*parts, "</svg>"]) + "\n")


def measured_part(results: dict[str, Any], sources: dict[str, dict[str, Any]]) -> str:
    """The README's tables and samples."""
    training, names = results["training"], list(results["parameters"])
    lines = ["| text | licence | documents | MB |", "|---|---|---|---|"]
    lines += [
        f"| {s['title']} (`{package}`) | {s['licence']} | {s['documents']} | {s['bytes'] / 1e6:.2f} |"
        for package, s in sources.items()
    ]
    held = results["heldout"]
    lines += [
        "",
        "| model | parameters |",
        "|---|---|",
        *(f"| {name} | {n:,} |" for name, n in results["parameters"].items()),
        "",
        f"Held out: {held['documents']} documents, {held['bytes'] / 1e6:.2f} MB, {held['tokens']:,} tokens.",
        "",
        "| held-out text, by | bits per byte |",
        "|---|---|",
        *(f"| {name} | {bits:.3f} |" for name, bits in results["bits_per_byte"].items()),
        "",
        "Nats per token by position in the window:",
        "",
        "| position | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    by_position = results["nats_per_token_by_position"]
    lines += [
        "| " + " | ".join([where, *(f"{by_position[name][where]:.3f}" for name in names)]) + " |"
        for where in by_position[names[0]]
    ]
    agreement = results["draft_agreement"]
    lines += [
        "",
        f"The target accepts {agreement['accepted_at_temperature_1']:.1%} of the draft's tokens at temperature 1, and "
        f"both would pick the same token {agreement['same_greedy_token']:.1%} of the time, over "
        "held-out text. "
        f"Training took {training['seconds'] / 60:.1f} minutes on one H200, "
        f"{training['target_seconds'] / 60:.1f} of them "
        "for the target.",
        "",
        "Samples, first try, with the defaults of `generation_config.json`:",
        "",
    ]
    for made in results["samples"]:
        question, answer = (
            (made["prompt"], made["text"]) if "prompt" in made else ("user: " + made["user"], made["assistant"])
        )
        lines += ["```text", f"[{question}]", answer.strip(), "```", ""]
    return "\n".join(lines).rstrip()


def fill_readme(readme: Path, results: dict[str, Any], sources: dict[str, dict[str, Any]]) -> None:
    before, rest = readme.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n\n{measured_part(results, sources)}\n\n{MARKS[1]}{after}")
