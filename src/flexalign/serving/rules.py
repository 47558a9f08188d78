"""What an adapter permits, whatever engine serves it."""

from functools import partial

from flexalign.calibration.effort import effort_to_dial, largest_effort
from flexalign.errors import ConfigError
from flexalign.inra.config import InRaConfig
from flexalign.policies import Fixed
from flexalign.serving.dial import DialRules

__all__ = ["adapter_rules"]


def adapter_rules(
    settings: InRaConfig, lambda_range: tuple[float, float] | None = None
) -> DialRules:
    """Return a server's rules.

    Args:
        settings: The adapter's.
        lambda_range: What the operator permits; the adapter's own range if not given.

    Raises:
        ConfigError: If the adapter's default is not permitted, or its calibration cannot be read.
    """
    low, high = permitted = lambda_range or settings.lambda_range
    if not low <= settings.default_lambda <= high:
        raise ConfigError(
            f"the adapter's default λ = {settings.default_lambda:g} is outside --lambda-range "
            f"[{low:g}, {high:g}]; permit it."
        )
    default, calibration = Fixed(settings.default_lambda), settings.calibration
    if calibration is None:
        return DialRules(default, permitted)
    sampling = calibration.get("sampling", {})
    largest_effort(calibration)  # refuses one that cannot be read, before anybody asks
    return DialRules(
        default,
        permitted,
        effort=partial(effort_to_dial, calibration),
        holes=tuple((float(low), float(high)) for low, high in calibration.get("holes", ())),
        sampling={name: sampling[name] for name in ("temperature", "top_p") if name in sampling},
    )
