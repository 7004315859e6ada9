"""
图片的规律：字体里有的字照样显示；没有的字，打印该装什么字体。
Laws of runtime/pictures.py: characters that a font has are shown; for others the picture says which font to install.
"""

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from runtime import pictures
from runtime.pictures import save_picture


def charmap(name) -> set[int]:
    return set(font_manager.get_font(font_manager.findfont(name)).get_charmap())


RARE = chr(min(charmap("STIXGeneral") - charmap("DejaVu Sans")))    # stands for a Chinese character


@pytest.mark.parametrize("fonts, is_shown", [(["a font that nobody has"], False), (["STIXGeneral"], True)])
def test_a_character_that_no_font_has_is_named_with_the_font_to_install(fonts, is_shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "FONTS", fonts)
    figure = Figure()
    axes = figure.add_subplot(title=RARE, xlabel="costs $1, or $2")
    axes.plot([0, 1], [0, 1], label=f"{RARE} 1")
    axes.set_yticks([0, 1], ["all", RARE])
    axes.legend()
    save_picture(figure, tmp_path / "new.png")
    assert (tmp_path / "new.png").read_bytes()[:4] == b"\x89PNG"
    assert ("apt-get install fonts-noto-cjk" in capsys.readouterr().out) is not is_shown
