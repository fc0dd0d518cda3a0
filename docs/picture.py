"""Draws how-it-works.svg: `python docs/picture.py`. The norms are made up; how they are cut off is not."""

from pathlib import Path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#6a51a3")
NEURONS = (3, 0, 5, 1, 2, 0, 4, 3, 1, 5, 2, 4, 0, 2, 1, 4, 3, 5)  # the expert of each, as training left them
TAU = 0.3
NORMS = {
    "The": (0.2, 0.9, 0.1, 0.1, 0.3, 0.1),
    "yield": (1.0, 0.8, 0.2, 0.7, 0.5, 0.1),
    ",": (0.0, 0.1, 0.0, 0.4, 0.0, 0.1),
}
INK, FAINT = "#1c2330", "#667085"


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "start") -> str:
    """Words at a point."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def circle(x: float, y: float, colour: str) -> str:
    """A neuron."""
    return f'<circle cx="{x}" cy="{y}" r="7" fill="{colour}"/>'


def dense(x: float, y: float) -> list[str]:
    """The neurons in the order in which training left them."""
    parts = [text(x, y, "1. An FFN is a sum over neurons", 14)]
    for i, expert in enumerate(NEURONS):
        parts.append(circle(x + 16 + 30 * (i % 6), y + 36 + 30 * (i // 6), COLOURS[expert]))
    return [*parts, text(x, y + 136, "colour: fires for the same tokens", 12, FAINT)]


def experts(x: float, y: float) -> list[str]:
    """The same neurons, expert by expert."""
    parts = [text(x, y, "2. put in another order: experts", 14)]
    for expert, colour in enumerate(COLOURS):
        left = x + 34 * expert
        parts.append(
            f'<rect x="{left}" y="{y + 18}" width="28" height="96" rx="6" fill="none" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )
        parts += [circle(left + 14, y + 36 + 30 * i, colour) for i in range(NEURONS.count(expert))]
    return [*parts, text(x, y + 136, "the sum is the same", 12, FAINT)]


def token(x: float, y: float, word: str, norms: tuple[float, ...]) -> list[str]:
    """What the router predicts for a token, and what dynamic-k makes of it."""
    line, height = TAU * max(norms), 34
    ran = [norm >= line for norm in norms]
    parts = [text(x, y - 8, word, 13, INK, "end")]
    for i, (norm, runs) in enumerate(zip(norms, ran, strict=True)):
        tall = max(norm * height, 1)
        fill = COLOURS[i] if runs else "none"
        parts.append(
            f'<rect x="{x + 12 + 20 * i}" y="{y - tall:.1f}" width="14" height="{tall:.1f}" fill="{fill}" '
            f'stroke="{COLOURS[i]}"/>'
        )
    level = y - line * height
    parts.append(
        f'<line x1="{x + 8}" x2="{x + 132}" y1="{level:.1f}" y2="{level:.1f}" stroke="{INK}" stroke-dasharray="4 3"/>'
    )
    return [*parts, text(x + 142, y - 8, f"k = {sum(ran)}", 13)]


def router(x: float, y: float) -> list[str]:
    """Three tokens under the same tau."""
    parts = [text(x, y, "3. A router predicts each one's norm", 14)]
    for i, (word, norms) in enumerate(NORMS.items()):
        parts += token(x + 38, y + 58 + 46 * i, word, norms)
    return [*parts, text(x, y + 176, f"dashed: tau = {TAU} of the token's largest; filled: runs", 12, FAINT)]


def picture() -> str:
    """The whole SVG."""
    parts = [*dense(24, 36), *experts(272, 36), *router(512, 36)]
    return "\n".join(
        (
            '<svg xmlns="http://www.w3.org/2000/svg" width="830" height="232" viewBox="0 0 830 232" '
            'font-family="system-ui, sans-serif">',
            '<rect width="830" height="232" rx="10" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    Path(__file__).with_name("how-it-works.svg").write_text(picture())
