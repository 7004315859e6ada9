"""
图片：写成 PNG，配色统一；中文标签用已安装的中文字体。
Pictures as PNG files, in one set of colours. Labels in Chinese need an installed Chinese font.
"""

import warnings
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
    from matplotlib import rc_context
    from matplotlib.text import Text

    fonts = ["DejaVu Sans", *chinese_fonts()]
    for text in figure.findobj(Text):
        text.set(fontfamily=fonts, parse_math=False)
    with (rc_context({"font.family": fonts, "text.parse_math": False}),
          warnings.catch_warnings(record=True) as said):
        warnings.simplefilter("always")
        write_atomic(Path(path),
                     lambda file: figure.savefig(file, format="png", dpi=120, **more))
    if any("missing from" in str(each.message) for each in said):
        Logger(f"{path}: the boxes are characters that no installed font has; install one: "
               "apt-get install fonts-noto-cjk")
