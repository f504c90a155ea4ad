"""Colours: as far from each other as the numbers are, for the colour-blind too, and what is written on them is read."""

import numpy as np
import pytest
from plotly.colors import get_colorscale, hex_to_rgb

from glmlens import plot
from glmlens.plot.style import MAGNITUDE, SIGNED

TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
BLIND = {  # Machado, Oliveira and Fernandes 2009, severity 1.0, on linear sRGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
NUMBERS = np.linspace(-1, 1, 201)


def linear(rgb):
    """sRGB from 0 to 255 as light (IEC 61966-2-1)."""
    c = np.asarray(rgb, float) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light):
    """Light as CIELAB (CIE 15:2004), white being (1, 1, 1)."""
    t = light @ TO_XYZ.T / TO_XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def drawn(scale, places):
    """The colours that a page mixes for places from 0 to 1: straight lines in sRGB."""
    at, names = zip(*get_colorscale(scale) if isinstance(scale, str) else scale, strict=True)
    stops = np.array([hex_to_rgb(name) for name in names])
    return np.stack([np.interp(places, at, stops[:, i]) for i in range(3)], -1).round()


def contrast(a, b):
    """The ratio of two luminances (WCAG 2.2)."""
    bright, dark = sorted((a, b), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_signed_colours_are_as_far_from_the_middle_as_their_numbers_from_zero():
    seen = lab(linear(drawn(SIGNED, (NUMBERS + 1) / 2)))
    far = np.linalg.norm(seen - seen[100], axis=1)
    assert abs(far[0] - far[-1]) < 1  # what is just seen
    assert np.abs(far / far[-1] - np.abs(NUMBERS)).max() < 0.01
    assert far[-1] > 80


@pytest.mark.parametrize("kind", BLIND)
def test_signs_are_told_apart_by_the_colour_blind(kind):
    seen = lab(np.clip(linear(drawn(SIGNED, (NUMBERS + 1) / 2)) @ np.transpose(BLIND[kind]), 0, 1))
    apart = np.linalg.norm(seen - seen[::-1], axis=1)[100:]
    assert (np.diff(apart[::10]) > 0).all()
    assert apart[-1] > 50


def test_magnitudes_grow_brighter_evenly_and_for_the_colour_blind_too():
    places = np.linspace(0, 1, 101)
    light = linear(drawn(MAGNITUDE, places))
    bright = lab(light)[:, 0]
    assert np.abs((bright - bright[0]) / (bright[-1] - bright[0]) - places).max() < 0.05
    for blind in BLIND.values():
        assert (np.diff(lab(np.clip(light @ np.transpose(blind), 0, 1))[:, 0]) > 0).all()


@pytest.mark.parametrize("lowest", [-1, 0])
def test_what_is_written_in_a_cell_is_read_on_its_colour(lowest):
    values = np.linspace(lowest, 1, 96, dtype=np.float32).reshape(12, 8)
    heat, text = plot.heatmap(values).data
    assert len(text.text) == values.size
    cells = drawn(heat.colorscale, (values.ravel() - heat.zmin) / (heat.zmax - heat.zmin))
    for cell, ink in zip(linear(cells) @ TO_XYZ[1], text.textfont.color, strict=True):
        assert contrast(cell, linear(hex_to_rgb(ink)) @ TO_XYZ[1]) >= 4.5


def test_nothing_shows_the_page_but_what_is_not_known():
    """A page is white or black: a colour through which it is seen would be another one on each."""
    for scale in (SIGNED, get_colorscale(MAGNITUDE)):
        assert all(color.startswith("#") and len(color) == 7 for _, color in scale)
    heat, text = plot.heatmap(np.array([[0.0, np.nan, -2.0]])).data
    assert heat.hoverongaps is False
    assert list(text.text) == ["0.00", "-2.00"]
