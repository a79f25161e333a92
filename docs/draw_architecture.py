# SPDX-License-Identifier: Apache-2.0
"""
Draws the architecture, docs/architecture.png:

    python docs/draw_architecture.py [FILE]

The two views are those of examples/pictures/street.jpg, as the image processor makes them.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon
from PIL import Image

from modeling_llava_hr import LlavaHrImageProcessorPil


ROOT = Path(__file__).parent.parent
LOW, HIGH, JOIN, TEXT = "#3b6fb6", "#d97706", "#0f766e", "#6d28d9"  # pathways, what joins them, language model
INK, FAINT = "#1f2937", "#6b7280"
TOP, BOTTOM, INSET = 37.0, 17.5, 7.0  # heights of ViT, CNN and the adapter's inside


def box(axis, x: float, y: float, width: float, height: float, text: str, color: str, name: str = "") -> None:
    """A box around its centre; `name` is the class, below it."""
    corner = (x - width / 2, y - height / 2)
    style = {"facecolor": f"{color}22", "edgecolor": color, "linewidth": 1.6}
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.7", **style))
    axis.text(x, y, text, ha="center", va="center", color=INK, fontsize=9.5, linespacing=1.35)
    axis.text(x, corner[1] - 0.5, name, ha="center", va="top", color=FAINT, fontsize=6.8, family="monospace")


def arrow(axis, *points: tuple[float, float], color: str = INK) -> None:
    """A line through the points, with a head at the last."""
    *_, before, last = points
    axis.plot(*zip(*points, strict=True), color=color, linewidth=1.5, solid_joinstyle="round")
    head = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", last, before, arrowprops=head)


def note(axis, x: float, y: float, text: str, color: str = FAINT, **kwargs) -> None:
    axis.text(x, y, text, **{"ha": "center", "va": "center", "color": color, "fontsize": 8, **kwargs})


def draw_views(axis) -> None:
    """The picture as the two pathways get it."""
    processor = LlavaHrImageProcessorPil(size=56, high_res_size=256, patch_size=7)
    with Image.open(ROOT / "examples" / "pictures" / "street.jpg") as picture:
        views = processor(picture.convert("RGB"), return_tensors="np")
    for name, (x, y, side) in {"pixel_values": (1, TOP - 4.5, 9), "high_res_pixel_values": (1, 9.5, 16)}.items():
        pixels = views[name][0].transpose(1, 2, 0) * processor.image_std + processor.image_mean
        axis.imshow(pixels.clip(0, 1), extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)
    note(axis, 1, TOP + 6.3, "low-resolution view", LOW, weight="bold", fontsize=9, ha="left")
    note(axis, 5.5, TOP - 5.6, "L × L px")
    note(axis, 1, 26.7, "high-resolution view", HIGH, weight="bold", fontsize=9, ha="left")
    note(axis, 9, 8.4, "H × H px")


def draw_pathways(axis) -> None:
    """ViT above, CNN below, and what joins them."""
    box(axis, 17.5, TOP, 8.5, 7, "patches,\npositions", LOW, "LlavaHrVisionEmbeddings")
    arrow(axis, (10, TOP), (13.2, TOP), color=LOW)
    layers, adapters = (28, 42.5, 57, 71.5), (35.2, 49.7, 64.2)
    for number, x in enumerate(layers, 1):
        box(axis, x, TOP, 7, 7, f"ViT layers\ngroup {number}", LOW)
    for x in adapters:
        box(axis, x, TOP, 5.2, 9, "MR-\nAdapter", JOIN)
    box(axis, 81.2, TOP, 6.6, 9, "fusion", JOIN, "LlavaHrFusion")
    edges = [21.8, 24.5, 31.5, 32.6, 37.8, 39, 46, 47.1, 52.3, 53.5, 60.5, 61.6, 66.8, 68, 75, 77.9]
    for left, right in zip(edges[::2], edges[1::2], strict=True):
        arrow(axis, (left, TOP), (right, TOP), color=LOW)
    note(axis, 49.7, TOP + 6.3, "F: (L / 14)² tokens, class token left out", LOW)

    arrow(axis, (17, BOTTOM), (19.5, BOTTOM), color=HIGH)
    for number, (x, half) in enumerate(((20, 7.5), (23.2, 6.2), (26.4, 4.9), (29.6, 3.6)), 1):
        corners = [(x, BOTTOM - half), (x, BOTTOM + half), (x + 2.6, BOTTOM + half - 1), (x + 2.6, BOTTOM - half + 1)]
        axis.add_patch(Polygon(corners, facecolor=f"{HIGH}22", edgecolor=HIGH, linewidth=1.6, joinstyle="round"))
        note(axis, x + 1.3, BOTTOM, str(number), INK, fontsize=9.5)
    note(axis, 26.2, 26.7, "CLIP-ConvNeXt, four stages", HIGH, weight="bold", fontsize=9)
    note(axis, 26.2, 8.4, "LlavaHrHighResVisionModel", fontsize=6.8, family="monospace")
    bus = 27.5
    arrow(axis, (32.2, BOTTOM), (adapters[0], BOTTOM), (adapters[0], TOP - 4.5), color=HIGH)
    for x in (*adapters[1:], 81.2):
        arrow(axis, (adapters[0], bus), (x, bus), (x, TOP - (5.9 if x > 80 else 4.5)), color=HIGH)
    note(axis, 57, bus - 1.2, "F_vh: (H / 32)² positions, C channels", HIGH)


def draw_language_model(axis) -> None:
    box(axis, 91.5, TOP, 7.6, 7, "projector\n2 layers", JOIN, "LlavaHrMultiModal-\nProjector")
    arrow(axis, (84.5, TOP), (87.7, TOP), color=JOIN)
    box(axis, 107.5, TOP, 15, 12, "language model\n(Llama)", TEXT)
    arrow(axis, (95.3, TOP), (100, TOP), color=TEXT)
    arrow(axis, (107.5, 25.2), (107.5, TOP - 6), color=TEXT)
    note(axis, 107.5, 24, "“What does the green sign say?”", INK, fontsize=8)
    arrow(axis, (107.5, TOP + 6), (107.5, TOP + 9), color=TEXT)
    note(axis, 107.5, TOP + 10.2, "“1471”", INK, fontsize=10, weight="bold")
    note(axis, 97.6, TOP + 7.6, "as many tokens\nas F has", TEXT)


def draw_adapter(axis) -> None:
    """What is inside an MR-Adapter: equations 3 and 4."""
    y = INSET
    style = {"boxstyle": "round,pad=0,rounding_size=1", "facecolor": "#f8fafc", "edgecolor": JOIN}
    axis.add_patch(FancyBboxPatch((40.5, 1.2), 74, 20.6, **style))
    note(axis, 42, 20.2, "MR-Adapter", JOIN, weight="bold", fontsize=9.5, ha="left")
    note(axis, 51.5, 20.2, "LlavaHrMixtureOfResolutionAdapter", fontsize=6.8, family="monospace", ha="left")
    top, bottom = y + 8, y - 0.5
    note(axis, 43, top, "F", LOW, fontsize=11, weight="bold")
    note(axis, 43.5, bottom, "F_vh", HIGH, fontsize=11, weight="bold")
    box(axis, 54.5, top, 15, 4.6, "depthwise 7×7, GELU, 1×1", LOW, "LlavaHrConvMapping")
    box(axis, 54.5, bottom, 15, 4.6, "linear, GELU, linear", HIGH, "LlavaHrMlpMapping")
    box(axis, 68.6, bottom, 8, 4.6, "to ViT’s grid", HIGH, "align_to_grid")
    box(axis, 83.6, y + 3.9, 17, 4.6, "g = tanh(W₂ GELU(W₁ [l̄, h̄]))", JOIN, "LlavaHrGate")
    arrow(axis, (44.2, top), (47, top), color=LOW)
    arrow(axis, (45.6, bottom), (47, bottom), color=HIGH)
    arrow(axis, (62, bottom), (64.6, bottom), color=HIGH)
    arrow(axis, (62, top), (66.3, top), color=LOW)
    axis.plot((45.4, 45.4, 67.3, 67.3), (top, top + 3.5, top + 3.5, top + 1), color=LOW, linewidth=1.5)
    note(axis, 67.3, top, "+", LOW, fontsize=14, bbox={"boxstyle": "circle,pad=0.1", "fc": "white", "ec": LOW})
    arrow(axis, (68.4, top), (96.5, top), (102, y + 5.2), color=LOW)
    arrow(axis, (72.6, bottom), (96.5, bottom), (102, y + 2.4), color=HIGH)
    arrow(axis, (72.4, top), (72.4, y + 4.6), (75.1, y + 4.6), color=LOW)
    arrow(axis, (74, bottom), (74, y + 3.2), (75.1, y + 3.2), color=HIGH)
    arrow(axis, (92.1, y + 3.9), (101.3, y + 3.9), color=JOIN)
    note(axis, 70.4, top + 1.1, "l", LOW, fontsize=10, style="italic")
    note(axis, 75.2, bottom + 1.1, "h", HIGH, fontsize=10, style="italic")
    note(axis, 107.3, y + 3.9, "F′ = l + g · h", INK, fontsize=11, weight="bold")


def main(file: Path) -> None:
    figure = Figure(figsize=(14.4, 6))
    axis = figure.add_axes((0, 0, 1, 1))
    draw_views(axis)
    draw_pathways(axis)
    draw_language_model(axis)
    draw_adapter(axis)
    axis.set(xlim=(0, 116), ylim=(0, 116 * 6 / 14.4), aspect="equal")
    axis.axis("off")
    figure.savefig(file, dpi=120, facecolor="white")
    print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "architecture.png")
