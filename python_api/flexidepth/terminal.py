"""Tokens in colour: how many layers each one needed."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

# From few layers to all of them; legible on dark and on light backgrounds, and apart for colour-blind eyes.
_PALETTE = ("#1b9e77", "#66a61e", "#a6a61e", "#e6ab02", "#d9781f", "#d95f02")


def layer_style(used: int, fewest: int, most: int) -> str:
    """Colour of a token that used `used` layers, on the scale from `fewest` to `most`."""
    if most <= fewest:
        return _PALETTE[-1]
    share = (min(max(used, fewest), most) - fewest) / (most - fewest)
    return _PALETTE[round(share * (len(_PALETTE) - 1))]


def make_console(color: str = "auto", *, stderr: bool = False) -> Console:
    """A console. color: "auto" (terminal without NO_COLOR), "always" or "never"."""
    if color == "always":
        return Console(
            force_terminal=True, color_system="truecolor", stderr=stderr, highlight=False
        )
    return Console(no_color=True if color == "never" else None, stderr=stderr, highlight=False)


def print_token(console: Console, text: str, used: int, fewest: int, most: int) -> None:
    """Print a piece of text in the colour of the layers it used, without a line break."""
    if text:
        console.print(Text(text, style=layer_style(used, fewest, most)), end="", soft_wrap=True)


def legend(fewest: int, most: int) -> Text:
    """The scale, in its own colours."""
    line = Text("layers used: ")
    for i, color in enumerate(_PALETTE):
        used = fewest + round(i * (most - fewest) / (len(_PALETTE) - 1))
        line.append(f" {used} ", style=color)
    return line
