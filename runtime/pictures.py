"""
图片：写成 PNG；中文标签用已安装的中文字体，没有时用编号，并打印对照。
Pictures as PNG files, in one set of colours. Labels in Chinese need a font that has its characters;
without one they are numbered, and the key is printed.
"""

from pathlib import Path

from runtime.files import write_atomic
from runtime.log import Logger

# Of Linux, macOS and Windows. Of a collection of fonts matplotlib knows the first, so Noto is JP.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
         "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei")


# Okabe & Ito 2008, https://jfly.uni-koeln.de/color/: colours that colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float, height: float):
    """An empty matplotlib figure, in inches; "C0", "C1", ... are COLOURS."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(width, height), layout="constrained")


def chinese_fonts() -> list[str]:
    """Those of FONTS that are installed."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    if not {font.name for font in manager.ttflist} & {*FONTS}:      # its cache may be older
        for file in {*font_manager.findSystemFonts()} - {font.fname for font in manager.ttflist}:
            manager.addfont(file)
    installed = {font.name for font in manager.ttflist}
    return [name for name in FONTS if name in installed]


def save_picture(figure, path: Path, **more):
    """Write a matplotlib figure. Its texts are shown as they are, $ included."""
    from matplotlib import font_manager, rc_context
    from matplotlib.text import Text

    fonts, numbers = ["DejaVu Sans", *chinese_fonts()], {}
    known = {code for name in fonts for code in
             font_manager.get_font(font_manager.findfont(name)).get_charmap()}

    def shown(text: str) -> str:
        if {ord(char) for char in text} - known <= {ord("\n")}:
            return text
        number = numbers.setdefault(text.strip(), len(numbers) + 1)
        return text.replace(text.strip(), f"[{number}]")

    with rc_context({"font.family": fonts, "text.parse_math": False}):
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):       # before each drawing, an axis sets these
                names = [label.get_text() for label in axis.get_ticklabels()]
                if any(shown(name) != name for name in names):
                    axis.set_ticks(axis.get_ticklocs(), list(map(shown, names)))
        for text in figure.findobj(Text):
            text.set(text=shown(text.get_text()), fontfamily=fonts, parse_math=False)
        write_atomic(Path(path),
                     lambda file: figure.savefig(file, format="png", dpi=120, **more))
    if numbers:
        key = ", ".join(f"[{number}] {text}" for text, number in numbers.items())
        Logger(f"{path}: no installed font has the characters of {key}; to see them, install a "
               "font: apt-get install fonts-noto-cjk")
