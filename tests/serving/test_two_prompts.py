"""A server whose model is asked under two prompts."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asgi import read, request
from flexalign.calibration.effort import Calibration, store_calibration
from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError
from flexalign.generation import TwoPromptDecoder
from flexalign.generation.responses import generate_responses
from flexalign.generation.two_prompt_config import TwoPromptConfig
from flexalign.models.loading import load_tokenizer
from flexalign.models.prompted import PromptPair
from flexalign.models.sources import resolve
from flexalign.serving.app import create_app
from flexalign.serving.server import ServeOptions, load_service

CHAT = "/v1/chat/completions"
PROMPTS = PromptPair(
    PromptSettings(), PromptSettings({"enable_thinking": False}, "the answer is six.")
)
USER = {"role": "user", "content": "one and two"}
OWN = {"role": "system", "content": "check 46"}


@pytest.fixture
def options(hybrid_folder: Path) -> ServeOptions:
    return ServeOptions(
        str(hybrid_folder), name="hybrid", prompts=PROMPTS, lambda_range=(-1, 2), dtype="float32"
    )


@pytest.fixture
def app(options: ServeOptions) -> Iterator[Any]:
    service, rules = load_service(options)
    yield create_app(service, rules)
    service.engine.stop()


def ask(app: Any, path: str = CHAT, **body: Any) -> tuple[int, dict[str, Any]]:
    status, content = read(request(app, path, json.dumps(body).encode()))
    return status, json.loads(content)


def test_an_effort_without_a_calibration_says_what_to_run(app: Any) -> None:
    status, answer = ask(app, messages=[USER], max_tokens=2, effort=50)
    assert status == 400
    assert answer["error"]["message"] == (
        "effort: the two prompts of this server have no calibration, so that effort has no meaning "
        "here; give lambda, or let the operator run flexalign calibrate MODEL --aligned-prompt … "
        "and serve with --calibration FOLDER."
    )
    status, answer = ask(app, messages=[USER], max_tokens=2, reasoning_effort="low")
    assert status == 200
    assert answer["dial"]["lambda"] == 1


def test_a_calibration_gives_requests_an_effort(options: ServeOptions, tmp_path: Path) -> None:
    points = {"lambdas": [[0.0, 1.0], [40.0, 0.75], [100.0, 0.0]]}
    settings = TwoPromptConfig.of(resolve(options.model), load_tokenizer(options.model), PROMPTS)
    calibration = Calibration.from_json({"version": 1, "effort": points})
    (tmp_path / "effort").mkdir()
    store_calibration(tmp_path / "effort", calibration, settings)
    service, rules = load_service(
        replace(options, calibration=tmp_path / "effort", lambda_range=None)
    )
    app = create_app(service, rules)
    try:
        _, listed = read(request(app, "/v1/models", b"", method="GET"))
        dial = json.loads(listed)["data"][0]["dial"]
        assert (dial["effort"], dial["lambda_range"]) == (True, [0, 1])
        # 50 and 70 are a sixth and a half of the way from (40, 0.75) to (100, 0).
        asked = {"effort": {50: 0.625, 70: 0.375}, "reasoning_effort": {"none": 1, "medium": 0.625}}
        for key, values in asked.items():
            for value, lam in values.items():
                status, answer = ask(app, messages=[USER], max_tokens=2, **{key: value})
                assert status == 200
                assert answer["dial"]["lambda"] == pytest.approx(lam)
        _, answer = ask(app, messages=[USER], max_tokens=2)
        assert answer["dial"]["lambda"] == 1
    finally:
        service.engine.stop()


@pytest.mark.parametrize("lam", [0, 1, 1.5])
@pytest.mark.parametrize("messages", [[USER], [OWN, USER]])
def test_an_answer_is_that_of_the_library(
    app: Any, options: ServeOptions, lam: float, messages: list[dict[str, str]]
) -> None:
    decoder = TwoPromptDecoder.from_pretrained(options.model, PROMPTS, dtype="float32")
    both = decoder.rendering.both(messages)
    if len(messages) == 2:  # the request's own system message stays, and the prompt's follows
        assert "system\ncheck 46<|im_end|>" in both.reference.text
        assert "system\ncheck 46\n\nthe answer is six.<|im_end|>" in both.aligned.text
    [expected] = generate_responses(
        decoder, decoder.tokenizer, [both], max_new_tokens=8, temperature=0, lam=[float(lam)]
    )
    status, answer = ask(app, messages=messages, max_tokens=8, temperature=0, **{"lambda": lam})
    assert status == 200
    message = answer["choices"][0]["message"]
    assert answer["dial"]["lambda"] == lam
    assert answer["usage"]["prompt_tokens"] == both.longest
    # The reference's prompt leaves the thinking open, and the aligned one has closed it.
    key = "reasoning_content" if lam == 0 else "content"
    assert message[key].strip() == expected.text.strip()


def test_the_default_is_the_aligned_prompt_and_the_list_shows_both(app: Any) -> None:
    _, answer = ask(app, messages=[USER], max_tokens=1)
    assert answer["dial"]["lambda"] == 1
    _, listed = read(request(app, "/v1/models", b"", method="GET"))
    assert json.loads(listed)["data"][0]["prompts"] == PROMPTS.to_json()


def test_what_cannot_be_served_is_refused(app: Any, options: ServeOptions) -> None:
    status, answer = ask(app, "/v1/completions", prompt="1+2=", max_tokens=1)
    assert status == 400
    assert "two prompts" in answer["error"]["message"]
    status, answer = ask(app, messages=[USER], max_tokens=500)
    assert status == 400
    assert "tokens under the aligned prompt and may get 500 more" in answer["error"]["message"]
    status, _ = ask(app, messages=[USER], max_tokens=1, **{"lambda": 3})
    assert status == 400
    with pytest.raises(ConfigError, match="a dial of one model; leave them out, or --adapter"):
        ServeOptions("miniature", "miniature:fast", prompts=PROMPTS)
