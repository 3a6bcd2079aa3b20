"""Coloured tokens: the scale, what never reaches a terminal, and plain text as it is."""

from __future__ import annotations

import io

import pytest

from flexidepth.errors import ValueOutOfRangeError
from flexidepth.terminal import TokenPrinter, layer_style, make_console


def test_scale_runs_from_few_layers_to_all() -> None:
    styles = [layer_style(used, 15, 30) for used in (15, 18, 21, 24, 27, 30)]
    assert len(set(styles)) == 6
    assert layer_style(3, 15, 30) == styles[0]
    assert layer_style(99, 15, 30) == styles[-1]
    assert layer_style(4, 4, 4) == styles[-1]


def test_plain_text_goes_out_as_it_is() -> None:
    out = io.StringIO()
    printer = TokenPrinter("auto", 2, 4, file=out)
    assert not printer.colored
    text = "a\tb\r\n\x1b[31m[bold]é\x07" + "long " * 100
    printer.token(text, 3)
    assert out.getvalue() == text


def test_control_characters_do_not_reach_a_terminal() -> None:
    out = io.StringIO()
    TokenPrinter("always", 2, 4, file=out).token("\x1b]0;title\x07\r[red]\x9b", 4)
    assert "\x1b]" not in out.getvalue()
    assert "\u241b]0;title\u2407\u240d[red]\ufffd" in out.getvalue()


def test_legend_names_each_number_of_layers_once() -> None:
    out = io.StringIO()
    TokenPrinter("always", 28, 30, file=io.StringIO()).legend(out)
    assert [out.getvalue().count(f" {n} ") for n in (28, 29, 30)] == [1, 1, 1]


def test_no_legend_without_color() -> None:
    out = io.StringIO()
    TokenPrinter("never", 2, 4, file=io.StringIO()).legend(out)
    assert out.getvalue() == ""


def test_unknown_choice() -> None:
    with pytest.raises(ValueOutOfRangeError, match="wanted one of auto, always, never"):
        make_console("yes")
