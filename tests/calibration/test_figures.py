import pytest

from flexalign.calibration.effort import known_cut

CALIBRATION = {
    "levels": [
        {"setting": "adaptive 0.4", "tokens": 30.0, "source": "simulated"},
        {"setting": "λ=0", "tokens": 70.0, "source": "interpolated"},
    ],
    "settings": [
        {"setting": "λ=0", "tokens": 60.0, "source": "measured"},
        {"setting": "λ=0.5", "tokens": 45.0, "source": "measured"},
        {"setting": "λ=-1", "tokens": 90.0, "source": "measured"},
    ],
}


@pytest.mark.parametrize(
    ("setting", "cut"),
    [
        ("adaptive 0.4", (0.5, "simulated")),
        ("λ=0.5", (0.25, "measured")),
        ("λ=-1", (-0.5, "measured")),
        ("λ=0", None),
        ("λ=0.7", None),
    ],
)
def test_a_cut_is_against_the_measured_reference(setting, cut):
    assert known_cut(CALIBRATION, setting) == cut


@pytest.mark.parametrize("calibration", [None, {}, {"levels": CALIBRATION["levels"][:1]}])
def test_nothing_is_known_where_nothing_was_measured(calibration):
    assert known_cut(calibration, "adaptive 0.4") is None
