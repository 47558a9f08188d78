"""The settings that a sweep measures a system at."""

from flexalign.evaluation.systems import settings_of
from flexalign.lambdas import AS_IT_IS, unique_settings
from flexalign.systems import System


def test_each_kind_takes_its_settings() -> None:
    asked = unique_settings([0, 2, "route 0.5", "exit 0.9", "ladder 0.9,0.6"])
    by_kind = {
        kind: [s.id for s in settings_of(System("s", kind, ("a", "b")), asked)]
        for kind in ("model", "pair", "interpolate", "url")
    }
    assert by_kind == {
        "model": ["as it is", "exit 0.9"],
        "pair": ["λ=0", "λ=2", "route 0.5", "exit 0.9"],
        "interpolate": ["λ=0", "λ=2", "ladder 0.9,0.6"],
        "url": ["λ=0", "λ=2", "route 0.5", "exit 0.9"],
    }
    assert [s.id for s in settings_of(System("s", "dial", ("a", "b")), [])] == [
        "λ=0",
        "λ=0.5",
        "λ=1",
    ]
    assert settings_of(System("s", "url", ("u",)), []) == [AS_IT_IS]
