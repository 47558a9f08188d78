"""Results folders in the form that a sweep leaves behind, without any model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexalign._storage import write_json
from flexalign.evaluation.summary import summarise

HOSTILE = "</script><script>document.title='taken'</script><b id='taken'>bold</b> <!--data-->"
LIMIT = 900


def _response(tokens: int, lam: float | None, cut: bool) -> str:
    thinking = f"<think>{HOSTILE} λ {lam}: " + "again and again " * (tokens // 40)
    return thinking if cut else f"{thinking}</think>The answer is \\boxed{{7}}. {HOSTILE}"


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of results folders: a dial that shortens, one adaptive policy, two tasks."""

    def make(
        name: str = "sweep",
        questions: int = 40,
        samples: int = 4,
        seed: int = 0,
        tasks: tuple[str, ...] = ("alpha", "beta"),
    ) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        generator = np.random.default_rng(seed)
        settings: list[tuple[str, float | None]] = [
            *((f"λ={lam:g}", lam) for lam in (-0.5, 0.0, 0.5, 1.0, 2.0)),
            ("adaptive 0.5", None),
        ]
        asked, rows = [], []
        for task in tasks:
            for number in range(questions):
                asked.append(
                    {
                        "task": task,
                        "question": f"{task}-{number}",
                        "problem": f"What is {number} + {number}? {HOSTILE}",
                        "gold": str(2 * number),
                    }
                )
                hard = generator.beta(2, 2)
                for setting, lam in settings:
                    mean = 420 * np.exp(-0.6 * (0.7 if lam is None else lam)) * (0.5 + hard)
                    right = 1 - 0.5 * hard - 0.05 * max(0.0, (lam or 0) - 1)
                    for sample in range(samples):
                        tokens = min(LIMIT, int(generator.gamma(4, mean / 4)) + 5)
                        cut = tokens == LIMIT
                        status = "correct" if generator.random() < right else "wrong"
                        rows.append(
                            {
                                "system": "dial",
                                "setting": setting,
                                "lambda": lam,
                                "policy": None,
                                "task": task,
                                "question": f"{task}-{number}",
                                "sample": sample,
                                "seed": sample,
                                "prompt_hash": "0",
                                "response": _response(tokens, lam, cut),
                                "tokens": tokens,
                                "thinking_tokens": tokens - 10 if not cut else tokens,
                                "rejected_tokens": 0,
                                "finish": "length" if cut else "stop",
                                "route": None,
                                "confidence": None,
                                "status": "truncated" if cut else status,
                                "extracted": None if cut else "7",
                            }
                        )
        configuration: dict[str, Any] = {
            "tasks": [{"name": task} for task in tasks],
            "systems": [{"name": "dial", "settings": [{"id": name} for name, _ in settings]}],
            "options": {"temperature": 0.7, "max_new_tokens": LIMIT},
        }
        environments = [{"flexalign": "0.1", "packages": {"torch": "2.13.0"}}]
        write_json(
            folder / "run.json", {"configuration": configuration, "environments": environments}
        )
        write_json(folder / "summary.json", summarise(configuration, rows, environments).to_json())
        for file, content in (("questions", asked), ("samples", rows)):
            lines = [json.dumps(row, ensure_ascii=False) for row in content]
            (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make
