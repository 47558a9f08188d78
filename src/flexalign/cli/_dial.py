"""The dial on the command line: read, put to a model, and told of."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from flexalign.cli.console import as_input_errors, console, parse_lambdas
from flexalign.errors import ConfigError, LambdaError

if TYPE_CHECKING:
    from flexalign.evaluation.systems import Answer, Setting, SystemOptions
    from flexalign.evaluation.systems.local import LocalBackend


def read_lambdas(text: str | None) -> list[object]:
    """Read ``--lambda 0,0.5,1``; a schedule's JSON in its place is left to :func:`read_settings`.

    Raises:
        LambdaError: If a λ is not a finite number.
    """
    if text is None:
        return []
    return [text] if text.lstrip().startswith("{") else list(parse_lambdas(text))


def read_settings(
    lambdas: Sequence[object], policies: Sequence[str], efforts: "Sequence[Setting]" = ()
) -> "list[Setting]":
    """Make settings of ``--lambda``, every ``--policy`` and ``--effort``.

    Args:
        lambdas: What :func:`read_lambdas` gave.
        policies: Each value of the option.
        efforts: What :func:`read_efforts` gave.

    Raises:
        ConfigError: If a schedule or a policy is malformed, or a setting is given twice.
        LambdaError: If a λ in one is not a finite number.
    """
    from flexalign.evaluation.systems import unique_settings

    return unique_settings([*lambdas, *policies, *efforts])


def read_setting(name: str, text: str) -> "Setting":
    """Read one setting in mid-conversation, as ``--lambda`` or ``--policy`` would.

    Args:
        name: ``lambda`` or ``policy``.
        text: The option's value.

    Raises:
        ConfigError: If it is malformed, or several.
        LambdaError: If a λ is not a finite number.
    """
    if name == "policy" or text.startswith("{"):
        return read_settings([], [text])[0]
    try:
        return read_settings([float(text)], [])[0]
    except ValueError:
        raise ConfigError(f"/lambda takes one finite number, such as 0.3; got {text!r}.") from None


def read_efforts(text: str | None, adapter: str | None) -> "list[Setting]":
    """Read ``--effort 0,50,100`` by an adapter's calibration, and say what each stands for.

    Args:
        text: The option's value.
        adapter: The adapter; None if there is none.

    Raises:
        ConfigError: If it is not numbers, there is no adapter, it has not been calibrated, or an
            effort lies outside what calibration covers.
    """
    if text is None:
        return []
    if adapter is None:
        raise ConfigError(
            "--effort needs an InRa adapter that flexalign calibrate has measured; name it, or "
            "give --lambda."
        )
    from flexalign.calibration.effort import Calibration, effort_settings
    from flexalign.inra.configuration import InRaConfig
    from flexalign.models.sources import resolve_adapter

    with as_input_errors():
        stored = InRaConfig.load(resolve_adapter(adapter)).calibration
    efforts = []
    for part in text.split(","):
        try:
            efforts.append(float(part))
        except ValueError:
            raise ConfigError(
                f"--effort: {part.strip()!r} is not a number; write one, such as 50, or several "
                "with commas."
            ) from None
    settings = effort_settings(Calibration.from_json(stored), efforts)
    for setting in settings:
        told = describe_setting(setting, stored)
        console.print(f"effort {setting.effort:g}: {told}", markup=False)
    return settings


def read_range(text: str | None) -> tuple[float, float] | None:
    """Read ``--lambda-range -1,2``.

    Raises:
        LambdaError: If it is not two numbers in order.
    """
    if text is None:
        return None
    with suppress(LambdaError):
        least, *rest = parse_lambdas(text)
        if len(rest) == 1 and least <= rest[0]:
            return least, rest[0]
    raise LambdaError(f"--lambda-range takes LEAST,LARGEST, such as -1,2; got {text!r}.")


def open_dial(
    model: str,
    adapter: str | None,
    aligned: str | None,
    settings: "Sequence[Setting]",
    options: "SystemOptions",
) -> "LocalBackend":
    """Find a model with what turns it, and check all that needs no weights.

    Args:
        model: A folder or a known name.
        adapter: An InRa adapter on it.
        aligned: Instead: the pair's other model.
        settings: What it will be asked at.
        options: How it is run.

    Raises:
        ConfigError: If a part is not there or damaged, or there is a setting and no dial.
        LambdaError: If a setting may leave the adapter's range, or go below 0 for a pair.
    """
    from flexalign.evaluation.systems.local import LocalBackend

    if adapter is not None and aligned is not None:
        raise ConfigError("give --adapter or --aligned, not both: each is a dial of its own.")
    if adapter is None and options.any_base:
        raise ConfigError("--any-base is about an adapter; name --adapter.")
    kind = "dial" if adapter else "pair" if aligned else "model"
    if kind == "model":
        require_dial(settings, options.gate, options.lambda_range)
    parts = [part for part in (model, adapter, aligned) if part is not None]
    with as_input_errors():
        return LocalBackend(kind, parts, settings, options)


def require_dial(
    settings: "Sequence[Setting]",
    gate: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Refuse settings for a model that has nothing to turn.

    Raises:
        ConfigError: If there is one.
    """
    asked = [setting.id for setting in settings]
    asked += ["a gate"] * (gate is not None) + ["--lambda-range"] * (limits is not None)
    if asked:
        raise ConfigError(
            f"{asked[0]} needs a dial, and the model alone has none; name its --adapter, or the "
            "--aligned model beside it."
        )


def describe_setting(setting: "Setting", calibration: "Mapping[str, Any] | None") -> str:
    """Name a setting, with what calibration found that it saves, if it looked at it."""
    from flexalign.calibration.effort import Calibration, known_cut

    cut = None
    if calibration is not None:
        # One that cannot be read is refused where an effort is asked for, and only untold here.
        with suppress(ConfigError):
            cut = known_cut(Calibration.from_json(calibration), setting.id)
    if cut is None:
        return setting.id
    sign = "−" if cut[0] >= 0 else "+"
    return f"{setting.id}: {sign}{abs(100 * cut[0]):.0f} % tokens, {cut[1]}"


def describe_start(setting: "Setting", backend: "LocalBackend") -> str:
    """Say what a conversation begins at, what that is, and where λ may go."""
    if backend.kind == "model":
        return "The plain model, which has no dial"
    ends = {
        "dial": "0 is the base model, 1 the adapter whole",
        "pair": "0 is the reference, 1 the aligned model",
    }
    start = f"{describe_setting(setting, backend.calibration)}; λ: {ends[backend.kind]}"
    if backend.permitted is None:
        return start
    low, high = backend.permitted
    return f"{start}; it may go from {low:g} to {high:g}"


def describe_choice(answer: "Answer", setting: "Setting", model: Any) -> str | None:
    """Say which way a policy took and why; None if it was not its choice."""
    from flexalign.lambdas import Adaptive

    if answer.route is None:
        return None
    if not isinstance(setting.dial, Adaptive):
        return f"{answer.route}: by the coin"
    threshold = model.threshold(setting.dial)
    confidence = 0.0 if answer.confidence is None else answer.confidence
    shown = _beside(confidence, threshold)
    if answer.route == "fast":
        return f"fast: confidence {shown} ≥ {threshold:g}"
    if confidence >= threshold:
        return "slow: the fast answer did not come to its end"
    return f"slow: fast answer's confidence {shown} < {threshold:g}"


def describe_tokens(answer: "Answer", tokens_per_second: float) -> str:
    """Say how many tokens were written for an answer, and how fast.

    The thinking tags themselves count with the answer.
    """
    parts = [f"{answer.tokens} tokens"]
    thinking, rejected = answer.thinking_tokens or 0, answer.rejected_tokens
    if thinking or rejected:
        shares = [f"{thinking} thinking", f"{answer.tokens - thinking - rejected} answer"]
        parts[0] += f" ({' + '.join(shares + [f'{rejected} rejected'] * bool(rejected))})"
    parts.append(f"{tokens_per_second:.0f} tokens/s")
    return " · ".join(parts + ["cut off"] * answer.truncated)


def _beside(confidence: float, threshold: float) -> str:
    """Round to two digits, or to as many as leave it on its side of the threshold."""
    digits, is_enough = 2, confidence >= threshold
    while (float(f"{confidence:.{digits}f}") >= threshold) != is_enough:
        digits += 1
    return f"{confidence:.{digits}f}"
