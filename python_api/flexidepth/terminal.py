"""Tokens in colour: how many layers each one needed."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.text import Text

from .errors import ValueOutOfRangeError

COLOR_CHOICES = ("auto", "always", "never")

# From few layers to all of them; legible on dark and light backgrounds and by colour-blind eyes.
_PALETTE = ("#1b9e77", "#66a61e", "#a6a61e", "#e6ab02", "#d9781f", "#d95f02")
# What a model writes must not move the cursor or set the title of a terminal: show control
# characters (all but tab and line feed) as their pictures, U+2400 and on.
_CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {127: 0x2421}
_CONTROL_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def layer_style(used: int, fewest: int, most: int) -> str:
    """Colour of a token that used `used` layers, on the scale from `fewest` to `most`."""
    if most <= fewest:
        return _PALETTE[-1]
    share = (min(max(used, fewest), most) - fewest) / (most - fewest)
    return _PALETTE[round(share * (len(_PALETTE) - 1))]


def make_console(color: str = "auto", *, file: TextIO | None = None) -> Console:
    """A console on `file` (None = standard output).

    color: "auto" = on a terminal where NO_COLOR is not set, "always", or "never".
    """
    if color not in COLOR_CHOICES:
        raise ValueOutOfRangeError(f"color {color!r}: wanted one of {', '.join(COLOR_CHOICES)}")
    if color == "always":
        return Console(
            file=file,
            force_terminal=True,
            no_color=False,
            color_system="truecolor",
            highlight=False,
        )
    if color == "never":
        return Console(file=file, no_color=True, color_system=None, highlight=False)
    return Console(file=file, highlight=False)


class TokenPrinter:
    """Prints text piece by piece, each in the colour of the layers it used.

    Where colour is off the text goes out as it is, byte for byte.

    Args:
        color: "auto", "always" or "never".
        fewest, most: the scale, layers used when every routed layer skips and when none does.
        file: None = standard output.
    """

    def __init__(self, color: str, fewest: int, most: int, *, file: TextIO | None = None) -> None:
        self.console = make_console(color, file=file)
        self.fewest, self.most = fewest, most

    @property
    def colored(self) -> bool:
        """Whether colours come out."""
        return self.console.color_system is not None and not self.console.no_color

    def token(self, text: str, used: int) -> None:
        """Print `text`, which needed `used` layers, without a line break."""
        if not text:
            return
        if self.colored:
            style = layer_style(used, self.fewest, self.most)
            visible = Text(text.translate(_CONTROL_PICTURES), style=style)
            self.console.print(visible, end="", soft_wrap=True)
        else:
            self.console.file.write(text)
            self.console.file.flush()

    def legend(self, file: TextIO | None = None) -> None:
        """Print the scale in its own colours, on standard error by default; nothing without colour."""
        if not self.colored:
            return
        line = Text("layers used: ")
        last = len(_PALETTE) - 1
        steps = {self.fewest + round(i * (self.most - self.fewest) / last) for i in range(last + 1)}
        for used in sorted(steps):
            line.append(f" {used} ", style=layer_style(used, self.fewest, self.most))
        make_console("always", file=file or sys.stderr).print(line, soft_wrap=True)
