"""
图片的规律：字体里有的字照样显示，没有的字用编号并打印对照，绝不画成方框。
Laws of runtime/pictures.py: characters that a font has are shown, labels with others are numbered and the key is
printed; none becomes an empty box.
"""

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from runtime import pictures
from runtime.pictures import save_picture


def charmap(name) -> set[int]:
    return set(font_manager.get_font(font_manager.findfont(name)).get_charmap())


RARE = chr(min(charmap("STIXGeneral") - charmap("DejaVu Sans")))    # stands for a Chinese character


@pytest.fixture
def labels(monkeypatch, tmp_path, capsys, recwarn):
    """labels(fonts) -> (texts of a picture with such labels, what was printed)."""
    def draw(*fonts):
        monkeypatch.setattr(pictures, "FONTS", fonts)
        figure = Figure()
        axes = figure.add_subplot(title=f"{RARE}{RARE}", xlabel="步")
        axes.plot([0, 1], [0, 1], label=f"{RARE} 1")
        axes.set_yticks([0, 1], ["all", f"{RARE}{RARE}"])
        axes.annotate(f"  {RARE}x", (0, 0))
        axes.legend()
        save_picture(figure, tmp_path / "new.png")
        assert (tmp_path / "new.png").read_bytes()[:4] == b"\x89PNG"
        assert not [str(each.message) for each in recwarn if "missing from" in str(each.message)]
        found = [axes.get_title(), axes.get_legend().get_texts()[0], *axes.get_yticklabels(), axes.texts[0]]
        return [getattr(each, "get_text", lambda each=each: each)() for each in found], capsys.readouterr().out
    return draw


def test_labels_that_no_installed_font_can_show_are_numbered_and_the_key_is_printed(labels):
    texts, printed = labels("a font that nobody has")
    number = {text: f"[{printed.split(f'] {text}')[0].rpartition('[')[2]}]"
              for text in (f"{RARE}{RARE}", f"{RARE} 1", f"{RARE}x", "步")}
    assert sorted(number.values()) == ["[1]", "[2]", "[3]", "[4]"]
    assert texts == [number[f"{RARE}{RARE}"], number[f"{RARE} 1"], "all", number[f"{RARE}{RARE}"],
                     f"  {number[f'{RARE}x']}"]
    assert printed.endswith("install a font: apt-get install fonts-noto-cjk\n")


def test_labels_that_an_installed_font_can_show_are_shown(labels):
    texts, printed = labels("a font that nobody has", "STIXGeneral")
    assert texts == [f"{RARE}{RARE}", f"{RARE} 1", "all", f"{RARE}{RARE}", f"  {RARE}x"]
    assert "characters of [1] 步; to see" in printed
