"""Draws architecture.svg beside this file: `python docs/figures/architecture.py`.

Boxes are packages, arrows the data between them. A text that does not fit its box is an error.
"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1200, 640
BOX_WIDTH, BOX_HEIGHT = 190, 76
LEFT, STEP = 34, 222
ROWS = {"prepare": 62, "sample": 178, "score": 342, "use": 514}
COLORS = {"input": "#f3f3f3", "fast": "#dbe9f9", "kernels": "#fbe6cf"}
FONT = "DejaVu Sans, Verdana, Arial, sans-serif"

# name: (column, row, kind, title, lines)
BOXES = {
    "files": (
        0,
        "prepare",
        "input",
        "interaction logs",
        ("CSV, Parquet, JSON, ...", "items with titles"),
    ),
    "data": (1, "prepare", "fast", "data/", ("examples: user, history,", "target; the catalog")),
    "prompts": (2, "prepare", "fast", "prompts/", ("token rows of users", "and of items")),
    "packing": (
        3,
        "prepare",
        "fast",
        "packing/",
        ("PackedBatch: no padding,", "prompts shared by G"),
    ),
    "model": (4, "prepare", "fast", "model/", ("one pass of the backbone:", "states [T, d]")),
    "rollout": (2, "sample", "fast", "rollout/", ("G reasonings a user,", "their log-probs")),
    "topk": (
        0,
        "score",
        "kernels",
        "index/, topk/",
        ("item head: exact top-K,", "history excluded"),
    ),
    "rank": (
        1,
        "score",
        "kernels",
        "index/, rank/",
        ("item head: exact rank,", "log-prob of target"),
    ),
    "advantage": (
        2,
        "score",
        "kernels",
        "advantage/",
        ("reward of each reasoning,", "advantage in its group"),
    ),
    "loss": (3, "score", "kernels", "loss/", ("ratios, clip,", "item action")),
    "logprob": (4, "score", "kernels", "logprob/", ("lm_head: token log-probs", "without logits")),
    "serve": (0, "use", "fast", "serve/", ("recommendations", "with their reasoning")),
    "eval": (1, "use", "fast", "eval/", ("hit rate, NDCG, MRR,", "baselines, comparisons")),
    "train": (3, "use", "fast", "train/", ("gradient, one step,", "item table, checkpoints")),
}


def edge(name: str, side: str, shift: float = 0) -> tuple[float, float]:
    """The middle of a box's side, moved along it by `shift`."""
    column, row, *_ = BOXES[name]
    x, y = LEFT + STEP * column, ROWS[row]
    return {
        "left": (x, y + BOX_HEIGHT / 2 + shift),
        "right": (x + BOX_WIDTH, y + BOX_HEIGHT / 2 + shift),
        "top": (x + BOX_WIDTH / 2 + shift, y),
        "bottom": (x + BOX_WIDTH / 2 + shift, y + BOX_HEIGHT),
    }[side]


def text(x: float, y: float, words: str, size: int = 12, **style: str) -> str:
    """One line of text; underscores in attribute names become hyphens."""
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{extra}>{escape(words)}</text>'


def box(name: str) -> list[str]:
    """A rectangle, its title and its lines."""
    column, row, kind, title, lines = BOXES[name]
    for words, size in ((title, 14), *((line, 12) for line in lines)):
        if len(words) * size * 0.6 > BOX_WIDTH - 8:  # 0.6: a wide sans-serif font
            raise ValueError(f"{name}: {words!r} does not fit its box")
    x, y = LEFT + STEP * column, ROWS[row]
    shape = (
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" '
        f'fill="{COLORS[kind]}" stroke="#555"/>'
    )
    middle = x + BOX_WIDTH / 2
    out = [shape, text(middle, y + 23, title, 14, text_anchor="middle", font_weight="bold")]
    for i, line in enumerate(lines):
        out.append(text(middle, y + 45 + 17 * i, line, text_anchor="middle"))
    return out


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through the points, its head at the last."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="#333" stroke-width="1.5"{dashes} '
        'marker-end="url(#head)"/>'
    )


def band(y: float, height: float, name: str, fill: str) -> list[str]:
    """The background of one package's row."""
    x = LEFT - 20
    width = STEP * 4 + BOX_WIDTH + 40
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}"/>',
        text(x + 12, y + 18, name, 13, font_weight="bold", fill="#666"),
    ]


def draw() -> str:
    """The whole picture."""
    bus = ROWS["score"] - 38  # where read-outs run to the left
    right = LEFT + STEP * 4 + BOX_WIDTH + 34  # where new weights run up
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="{FONT}" fill="#111">',
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#333"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *band(30, 240, "r2ec_fast", "#f5f9fe"),
        *band(314, 134, "", "#fef8f0"),
        text(LEFT - 8, 438, "r2ec_kernels", 13, font_weight="bold", fill="#666"),
        *band(488, 138, "", "#f5f9fe"),
        text(LEFT - 8, 614, "r2ec_fast", 13, font_weight="bold", fill="#666"),
    ]
    for one, other in (
        ("files", "data"),
        ("data", "prompts"),
        ("prompts", "packing"),
        ("packing", "model"),
    ):
        parts.append(arrow(edge(one, "right"), edge(other, "left")))
    parts.append(arrow(edge("prompts", "bottom"), edge("rollout", "top")))
    x, y = edge("packing", "bottom")
    parts.append(arrow(edge("rollout", "right"), (x, edge("rollout", "right")[1]), (x, y)))
    parts.append(arrow(edge("model", "bottom", 75), edge("logprob", "top", 75)))
    start = edge("model", "bottom", -70)
    for target in ("topk", "rank"):
        end = edge(target, "top")
        parts.append(arrow(start, (start[0], bus), (end[0], bus), end))
    parts.append(
        text(start[0] - 240, bus - 8, "states[readout]", text_anchor="end", font_style="italic")
    )
    x = edge("logprob", "top", 69)[0]
    parts.append(text(x, bus - 8, "states[predict_from]", text_anchor="end", font_style="italic"))
    parts.append(arrow(edge("rank", "right"), edge("advantage", "left")))
    parts.append(arrow(edge("advantage", "right"), edge("loss", "left")))
    parts.append(arrow(edge("logprob", "left"), edge("loss", "right")))
    parts.append(arrow(edge("topk", "bottom"), edge("serve", "top")))
    parts.append(arrow(edge("rank", "bottom"), edge("eval", "top")))
    parts.append(arrow(edge("loss", "bottom"), edge("train", "top")))
    x, y = edge("train", "right")
    up = edge("model", "right")
    parts.append(arrow((x, y), (right, y), (right, up[1]), up, dashed=True))
    parts.append(text(x + 16, y - 9, "new weights, fresh item rows", font_style="italic"))
    for name in BOXES:
        parts += box(name)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
