"""Draws ``docs/kernels.png``, the picture of the GPU kernels: ``python docs/kernels.py``."""

import colorsys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 1600, 900  # pixels, which are the units of all coordinates below; y grows downwards
DPI = 100

INK, GREY, LINE = "#1f2430", "#5d6472", "#c3c8d2"
PROGRAMS = ("#cfe3f7", "#fbe3c4", "#d6ecd2")
MEMORY, REGISTERS, TENSOR, SHARED = "#dfe8f2", "#fdf3d8", "#f3dcea", "#dcefe6"
HUES = (0.58, 0.09, 0.36, 0.86)  # of the four threads that share a coordinate

TILE, ROWS, QUADS, UNITS = 64, 8, 4, 16
TENSORS = (("A", 200), ("B", 10), ("C", 150))


def thread_of(coordinate: int, unit: int) -> int:
    """Thread of a warp that holds ``unit`` of one of the warp's 16 coordinates."""
    return QUADS * (coordinate % ROWS) + unit % 8 // 2


def colour_of(thread: int) -> tuple[float, float, float]:
    row, quad = divmod(thread, QUADS)
    return colorsys.hls_to_rgb(HUES[quad], 0.91 - 0.035 * row, 0.7)


def text(ax: Axes, x: float, y: float, words: str, size: float = 13, **style: object) -> None:
    ax.text(x, y, words, **({"fontsize": size, "ha": "center", "va": "center", "color": INK} | style))


def box(
    ax: Axes, x: float, y: float, width: float, height: float, words: str = "", face: object = "white", size: float = 13
) -> None:
    """A rounded box with its upper left corner at ``(x, y)`` and ``words`` in its middle."""
    shape = f"round,pad=0,rounding_size={min(7, height / 4)}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=GREY, linewidth=1))
    text(ax, x + width / 2, y + height / 2, words, size)


def cell(ax: Axes, x: float, y: float, width: float, height: float, words: str, face: object, size: float = 12) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor="white", linewidth=1))
    text(ax, x + width / 2, y + height / 2, words, size)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def title(ax: Axes, x: float, words: str) -> None:
    text(ax, x, 34, words, 16, ha="left", fontweight="bold")


def draw_launch(ax: Axes, left: float) -> None:
    """Tensors of a model, the table, the tiles and the programs."""
    title(ax, left, "One launch for all tensors")
    tiles = [(name, k) for name, size in TENSORS for k in range(-(-size // TILE))]
    program_of = {tile: number % len(PROGRAMS) for number, tile in enumerate(tiles)}

    text(ax, left, 76, "tensors of a group, cut in tiles of 64 coordinates", ha="left", color=GREY)
    scale = 1.3
    for row, (name, size) in enumerate(TENSORS):
        y = 98 + 42 * row
        text(ax, left + 8, y + 14, name, 14, fontweight="bold")
        for k in range(-(-size // TILE)):
            x, here = left + 28 + k * TILE * scale, min(TILE, size - k * TILE)
            ax.add_patch(Rectangle((x, y), TILE * scale - 4, 28, facecolor="none", edgecolor=LINE, linestyle=":"))
            face = PROGRAMS[program_of[name, k]]
            ax.add_patch(Rectangle((x, y), here * scale - 4, 28, facecolor=face, edgecolor=GREY))
        text(ax, left + 448, y + 14, f"N = {size}", ha="right", color=GREY)
    arrow(ax, (left + 223, 224), (left + 223, 250))

    text(ax, left, 268, "table of addresses, on the device", ha="left", color=GREY)
    for row, entry in enumerate(
        [("parameter", "gradient", "state", "N")] + [("•", "•", "•", str(n)) for _, n in TENSORS]
    ):
        y = 286 + 32 * row
        for column, words in enumerate(entry):
            face = "#eef0f4" if row == 0 else "white"
            ax.add_patch(Rectangle((left + 28 + 105 * column, y), 105, 32, facecolor=face, edgecolor=LINE))
            text(ax, left + 80.5 + 105 * column, y + 16, words)
        if row:
            text(ax, left + 8, y + 16, TENSORS[row - 1][0], 14, fontweight="bold")
    text(ax, left + 28, 432, "copied only when something has moved,", 12.5, ha="left", color=GREY)
    text(ax, left + 28, 452, "without waiting for the device", 12.5, ha="left", color=GREY)
    arrow(ax, (left + 223, 470), (left + 223, 496))

    text(ax, left, 514, "tiles, in order", ha="left", color=GREY)
    for number, (name, k) in enumerate(tiles):
        box(ax, left + 28 + number * 52.5, 532, 46, 34, f"{name}{k}", PROGRAMS[program_of[name, k]])
    arrow(ax, (left + 223, 578), (left + 223, 604))

    text(ax, left, 622, "persistent programs of 4 warps", ha="left", color=GREY)
    for program, face in enumerate(PROGRAMS):
        y = 640 + 58 * program
        box(ax, left + 28, y, 420, 48, face=face)
        text(ax, left + 44, y + 24, f"program {program}", ha="left")
        mine = [tile for tile in tiles if program_of[tile] == program]
        for turn, (name, k) in enumerate(mine):
            x = left + 170 + 92 * turn
            box(ax, x, y + 9, 46, 30, f"{name}{k}")
            if turn + 1 < len(mine):
                arrow(ax, (x + 46, y + 24), (x + 92, y + 24))
    text(ax, left + 28, 834, "as many as fit, 4 per multiprocessor on 9.0;", 12.5, ha="left", color=GREY)
    text(ax, left + 28, 854, "each loads the weights once for all its tiles", 12.5, ha="left", color=GREY)


def draw_flow(ax: Axes, left: float) -> None:
    """What happens to one tile, and where."""
    title(ax, left, "One tile: in once, out once")
    columns = (
        ("memory", left, 136, MEMORY),
        ("registers", left + 150, 212, REGISTERS),
        ("tensor cores", left + 376, 144, TENSOR),
    )
    for words, x, width, face in columns:
        ax.add_patch(Rectangle((x, 60), width, 740, facecolor=face, edgecolor="none", alpha=0.55))
        text(ax, x + width / 2, 78, words, 13.5, fontweight="bold", color=GREY)
    (_, memory, memory_width, _), (_, registers, register_width, _), (_, tensor, tensor_width, _) = columns

    def stage(column: tuple[float, float], y: float, height: float, words: str, face: str = "white") -> None:
        box(ax, column[0] + 8, y, column[1] - 16, height, words, face, 12.5)

    in_memory, in_registers, in_tensor = (memory, memory_width), (registers, register_width), (tensor, tensor_width)
    a, b = memory + memory_width - 8, registers + 8
    c, d = registers + register_width - 8, tensor + 8
    middle = registers + register_width / 2

    stage(in_memory, 100, 44, "gradient\n4 B")
    stage(in_registers, 100, 44, "log |g|, sign g")
    arrow(ax, (a, 122), (b, 122))

    stage(in_memory, 172, 84, "state in\nh1 c1 h2 c2\n320 B")
    stage(in_registers, 172, 84, "h1, features, 1\nas float16 parts\nhigh + low")
    stage(in_tensor, 182, 64, "layer 1\n32 × 80")
    arrow(ax, (a, 214), (b, 214))
    arrow(ax, (middle, 144), (middle, 172))
    arrow(ax, (c, 214), (d, 214))

    stage(in_registers, 300, 64, "gates i f g o, cell\nnew c1, h1")
    arrow(ax, (d + 20, 246), (c, 318))

    stage(in_registers, 406, 84, "new h1, h2, 1\nas float16 parts\nhigh + low")
    stage(in_tensor, 416, 64, "layer 2\n48 × 80")
    arrow(ax, (middle, 364), (middle, 406))
    arrow(ax, (c, 448), (d, 448))

    stage(in_registers, 534, 64, "gates i f g o, cell\nnew c2, h2")
    arrow(ax, (d + 20, 480), (c, 552))
    stage(in_memory, 534, 84, "state out\nh1 c1 h2 c2\n320 B")
    arrow(ax, (b, 566), (a, 566))

    stage(in_registers, 640, 64, "output layer:\na sum of 20 units")
    arrow(ax, (middle, 598), (middle, 640))
    stage(in_registers, 746, 44, "θ ← decay θ + update")
    arrow(ax, (middle, 704), (middle, 746))
    stage(in_memory, 746, 44, "parameter\n4 B + 4 B")
    arrow(ax, (a, 760), (b, 760))
    arrow(ax, (b, 776), (a, 776))

    stage(in_tensor, 292, 84, "weights: in\nshared mem.,\nloaded once", SHARED)
    arrow(ax, (tensor + tensor_width - 30, 292), (tensor + tensor_width - 30, 246))
    arrow(ax, (tensor + tensor_width - 30, 376), (tensor + tensor_width - 30, 416))
    text(ax, left, 822, "652 bytes per coordinate in float32.", 12.5, ha="left")
    text(ax, left, 844, "A thread holds the same units of all four gates,", 12.5, ha="left")
    text(ax, left, 864, "so gates, cell and next layer need no exchange.", 12.5, ha="left")


def draw_order(ax: Axes, left: float) -> None:
    """Which thread holds which numbers of a plane, and where they lie."""
    title(ax, left, "The state, in the order of registers")
    text(ax, left, 76, "one warp: 16 coordinates × 16 units; number: thread", ha="left", color=GREY)
    x0, y0, width, height = left + 34, 114, 26, 19
    for unit in range(UNITS):
        text(ax, x0 + (unit + 0.5) * width, y0 - 11, str(unit), 11.5, color=GREY)
    for coordinate in range(2 * ROWS):
        y = y0 + coordinate * height + 6 * (coordinate >= ROWS)
        text(ax, x0 - 14, y + height / 2, str(coordinate), 11.5, color=GREY)
        for unit in range(0, UNITS, 2):
            thread = thread_of(coordinate, unit)
            cell(ax, x0 + unit * width, y, 2 * width, height, str(thread), colour_of(thread), 12)
    bottom = y0 + 2 * ROWS * height + 6

    y = bottom + 28
    text(ax, left, y, "in memory, 32-bit: 16 bytes of each thread in turn", ha="left", color=GREY)
    for thread in range(ROWS * QUADS):
        cell(ax, left + 34 + thread * 13, y + 16, 13, 30, "", colour_of(thread))
    for thread in (0, 8, 16, 24):
        text(ax, left + 35 + thread * 13, y + 60, f"thread {thread}", 12, ha="left", color=GREY)

    y += 92
    text(ax, left, y, "the first 64 bytes: the units of coordinate 0", ha="left", color=GREY)
    for quad in range(QUADS):
        units = [2 * quad, 2 * quad + 1, 8 + 2 * quad, 9 + 2 * quad]
        for place, unit in enumerate(units):
            cell(ax, left + 34 + quad * 104 + place * 25, y + 16, 25, 30, str(unit), colour_of(quad))
        text(ax, left + 84 + quad * 104, y + 60, f"thread {quad}", 12, color=GREY)
    text(ax, left + 34, y + 82, "coordinates 8 to 15 follow 2048 bytes on", 12, ha="left", color=GREY)

    y += 116
    text(ax, left, y, "16-bit: 16 bytes hold both coordinates of a thread", ha="left", color=GREY)
    for quad in range(2):
        for place in range(8):
            unit = 2 * quad + (0, 1, 8, 9)[place % 4]
            cell(ax, left + 34 + quad * 208 + place * 25, y + 16, 25, 30, str(unit), colour_of(quad))
        for half in range(2):
            text(ax, left + 84 + quad * 208 + 100 * half, y + 58, f"coord. {8 * half}", 12, color=GREY)
        text(ax, left + 134 + quad * 208, y + 76, f"thread {quad}", 12, color=GREY)

    y += 106
    for line in (
        "Every load is a whole 16-byte vector, 512 bytes in a",
        "row per warp, and arrives as the tensor cores want it:",
        "no number of the state moves to another thread.",
        "Five planes make a tile: h1, c1, h2, c2 of units 0 to 15,",
        "and units 16 to 19 of all four in the same manner.",
    ):
        text(ax, left, y, line, 12.5, ha="left")
        y += 20


def main() -> None:
    figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    ax.axis("off")
    for x in (496, 1050):
        ax.plot([x, x], [30, HEIGHT - 30], color=LINE, linewidth=1)
    draw_launch(ax, 24)
    draw_flow(ax, 514)
    draw_order(ax, 1072)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
