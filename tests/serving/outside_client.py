"""One client that people use, against a server: a chat, a stream and an effort, as JSON on stdout.

Runs in an environment of its own (`.venv-clients`), so that the clients' dependencies are not ours:
``python outside_client.py CLIENT URL KEY``.
"""

import asyncio
import json
import sys
from typing import Any

ASK = "3+14+15?"
SEEDED = {"lambda": 0.0, "seed": 3}


def by_openai(root: str, key: str) -> dict[str, str]:
    from openai import OpenAI

    client = OpenAI(base_url=f"{root}/v1", api_key=key)
    model = client.models.list().data[0].id
    turns: Any = [{"role": "user", "content": ASK}]
    chat = client.chat.completions.create(model=model, messages=turns, extra_body=SEEDED)
    stream = client.chat.completions.create(
        model=model, messages=turns, stream=True, extra_body=SEEDED
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    low = client.chat.completions.create(model=model, messages=turns, reasoning_effort="low")
    return _told(chat.choices[0].message.content, pieces, low.choices[0].message.content)


def by_responses(root: str, key: str) -> dict[str, str]:
    from openai import OpenAI

    client = OpenAI(base_url=f"{root}/v1", api_key=key)
    model = client.models.list().data[0].id
    whole = client.responses.create(model=model, input=ASK, extra_body=SEEDED)
    with client.responses.stream(model=model, input=ASK, extra_body=SEEDED) as stream:
        pieces = [e.delta for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    low = client.responses.create(model=model, input=ASK, reasoning={"effort": "low"})
    return _told(whole.output_text, pieces, low.output_text) | {"final": final.output_text}


def by_agents(root: str, key: str) -> dict[str, str]:
    from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, set_tracing_disabled
    from openai import AsyncOpenAI
    from openai.types.shared import Reasoning

    set_tracing_disabled(True)

    async def run() -> dict[str, str]:
        client = AsyncOpenAI(base_url=f"{root}/v1", api_key=key)
        model = OpenAIResponsesModel((await client.models.list()).data[0].id, client)
        seeded = ModelSettings(extra_body=SEEDED)
        agent = Agent(name="adder", model=model, model_settings=seeded)
        whole = await Runner.run(agent, ASK)
        streamed = Runner.run_streamed(agent, ASK)
        pieces = []
        async for event in streamed.stream_events():
            data = getattr(event, "data", None)
            if getattr(data, "type", "") == "response.output_text.delta":
                pieces.append(data.delta)
        settings = ModelSettings(reasoning=Reasoning(effort="low"))
        low = await Runner.run(Agent(name="adder", model=model, model_settings=settings), ASK)
        return _told(whole.final_output, pieces, low.final_output)

    return asyncio.run(run())


def by_anthropic(root: str, key: str) -> dict[str, str]:
    from anthropic import Anthropic

    client = Anthropic(base_url=root, api_key=key)
    asked: Any = {"model": "miniature", "max_tokens": 400}
    asked["messages"] = [{"role": "user", "content": ASK}]
    whole = client.messages.create(**asked, extra_body=SEEDED)
    with client.messages.stream(**asked, extra_body=SEEDED) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    low = client.messages.create(**asked, output_config={"effort": "low"})
    told = _told(whole.content[-1].text, pieces, low.content[-1].text)
    return told | {"thinking": whole.content[0].thinking, "final": final.content[-1].text}


def by_litellm(root: str, key: str) -> dict[str, str]:
    import litellm

    asked: Any = {"model": "openai/miniature", "api_base": f"{root}/v1", "api_key": key}
    asked["messages"] = [{"role": "user", "content": ASK}]
    whole = litellm.completion(**asked, extra_body=SEEDED)
    stream = litellm.completion(**asked, stream=True, extra_body=SEEDED)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    effort = {"reasoning_effort": "low", "allowed_openai_params": ["reasoning_effort"]}
    low = litellm.completion(**asked, **effort)
    return _told(whole.choices[0].message.content, pieces, low.choices[0].message.content)


def _told(whole: str, pieces: list[str], low: str) -> dict[str, str]:
    return {"whole": whole, "stream": "".join(pieces), "low": low}


CLIENTS = {
    "openai": by_openai,
    "responses": by_responses,
    "agents": by_agents,
    "anthropic": by_anthropic,
    "litellm": by_litellm,
}

if __name__ == "__main__":
    name, root, key = sys.argv[1:]
    print(json.dumps(CLIENTS[name](root, key)))
