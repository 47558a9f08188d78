"""The playground: what is served, and the page in a real browser before engines of all kinds."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest

from asgi import read, request
from browser import CHROMIUM, Browser, Tab
from flexalign.lambdas import Fixed
from flexalign.serving import playground
from flexalign.serving.dial import DialRules
from flexalign.serving.playground import Playground
from server_process import KEY, Server
from streaming_server import StreamingServer

PAGE = {file.name: file.read_text("utf-8") for file in (files(playground) / "page").iterdir()}
IMAGE = "<img src=x onerror=\"document.title='taken'\">"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def get(path: str, method: str = "GET", root: str = "") -> tuple[int, dict[str, str], bytes]:
    """Ask a playground before an application that answers 404 to everything."""

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"behind"})

    sent = request(Playground(behind), path, method=method, root_path=root)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    status, content = read(sent)
    return status, headers, content


@pytest.mark.parametrize("root", ["", "/under"])
def test_the_page_is_served_and_nothing_else_is_touched(root: str):
    status, headers, body = get(f"{root}/playground", root=root)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert body.decode() == PAGE["index.html"]
    assert headers["content-length"] == str(len(body))
    for path, to in (("/", "playground"), ("/playground/", "../playground")):
        status, headers, _ = get(root + path, root=root)
        assert (status, headers["location"]) == (307, to)
    for path in ("/v1/models", "/playground/../x", "/playground/index.html", "/playgrounds"):
        assert get(root + path, root=root)[2] == b"behind"
    assert get("/playground", "POST")[2] == b"behind"


def test_every_file_allows_this_server_alone():
    for name in PAGE:
        status, headers, _ = get(f"/playground/{name}" if name != "index.html" else "/playground")
        assert status == 200
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_files_name_only_each_other_and_make_no_markup_of_text():
    named = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', PAGE["index.html"])
    assert {name.removeprefix("playground/") for name in named} == {"playground.css", "main.js"}
    for name, text in PAGE.items():
        assert {place.removeprefix("./") for place in re.findall(r'from "([^"]+)"', text)} <= set(
            PAGE
        )
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"localStorage|sessionStorage|document\.cookie", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def engine() -> Iterator[Callable[..., StreamingServer]]:
    started = []

    def start(*rules: Any, **more: Any) -> StreamingServer:
        started.append(StreamingServer(DialRules(*rules, **more)))
        return started[-1]

    yield start
    for one in started:
        one.close()


def ask(tab: Tab, question: str) -> str:
    """Ask in the chat; return what the last answer says when it has ended."""
    before = tab.value("document.querySelectorAll('#log .answer').length")
    tab.write("#question", question)
    tab.press("Enter")
    tab.wait(f"document.querySelectorAll('#log .answer[aria-busy=false]').length === {before + 1}")
    tab.wait("!document.getElementById('send').hidden")
    return tab.text("#log .answer:last-child")


def opened(tab: Tab) -> Tab:
    tab.wait("!document.getElementById('chat').hidden")
    return tab


def require_quiet(tab: Tab, server: str) -> None:
    """Nothing was said on the console, and nothing asked of others."""
    assert tab.complaints() == []
    outside = [told["url"] for told in tab.requests() if not told["url"].startswith(server)]
    assert [url for url in outside if not url.startswith("data:")] == []


@in_browser
@pytest.mark.full
def test_the_slider_moves_between_turns(browser: Browser, server: Server):
    tab = browser.open(f"{server.root}/")
    tab.wait("!document.getElementById('door').hidden")
    assert "This server asks for a key." in tab.text("#door")
    for key, comes in (("wrong", "the key is missing or wrong"), (KEY, "")):
        tab.click("#key")
        tab.write("#key", key)
        tab.press("Enter")
        tab.wait(f"document.getElementById('door-reason').innerText.includes({comes!r})")
    assert opened(tab).text("#model") == "miniature"
    slow = ask(tab, "9+3+6?")
    assert "λ = 0" in slow
    assert re.search(r"Thinking · \d+ tokens", slow)
    assert re.search(r"\d+ tokens · \d+\.\d+\u202fs", slow)
    tab.click("#slider")  # the middle of -1…2
    tab.press("ArrowRight", times=10)
    assert tab.value("document.getElementById('exact').value") == "1"
    fast = ask(tab, "9+3+6?")
    assert "λ = 1" in fast
    assert "Thinking" not in fast
    tab.click("input[value=auto]")
    assert re.search(r"auto · (fast|slow) · λ = [01]", ask(tab, "9+3+6?"))
    sent = [json.loads(one["postData"]) for one in tab.requests() if "postData" in one]
    assert [body["lambda"] for body in sent] == [0, 1, "auto"]
    assert all(KEY not in told["url"] for told in tab.requests())
    refused = [one for one in tab.complaints() if "401" not in json.dumps(one)]
    assert refused == []  # the browser itself notes a 401
    assert tab.value("document.cookie + localStorage.length + sessionStorage.length") == "00"


@in_browser
@pytest.mark.full
def test_answers_are_compared_side_by_side(browser: Browser, start_server: Any):
    server = start_server("miniature", "--adapter", "miniature:fast", "--playground")
    for width in (1100, 375):
        tab = opened(browser.open(f"{server.root}/playground", width=width))
        tab.click("input[value=compare]")
        tab.click("#settings-list")
        tab.write("#settings-list", "0, 3")
        tab.click("#run")
        assert "λ = 3 is outside this server’s range, 0 to 1." in tab.text("#list-error")
        tab.write("#settings-list", "0, 1, auto")
        tab.click("#run")
        tab.wait("document.querySelectorAll('#columns [aria-busy=false]').length === 3")
        slow, fast, auto = (tab.text(f"#columns .answer:nth-child({place})") for place in (1, 2, 3))
        assert "λ = 0" in slow
        assert "Thinking" in slow
        assert "λ = 1" in fast
        assert "auto" in auto
        assert all(re.search(r"\d+ tokens · (.* · )?\d+\.\d+\u202fs", one) for one in (slow, fast))
        bodies = [json.loads(one["postData"]) for one in tab.requests() if "postData" in one]
        assert len({body["seed"] for body in bodies}) == 1
        beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert tab.value(beyond) <= 0
        tops = (
            "new Set([...document.querySelectorAll('#columns .answer')].map(n => n.offsetTop)).size"
        )
        assert tab.value(tops) == (1 if width > 1000 else 3)
        require_quiet(tab, server.root)


@in_browser
@pytest.mark.full
def test_text_is_never_markup(browser: Browser, engine: Any):
    served = engine(Fixed(0.0), (-0.5, 2.0))
    served.deltas = [{"reasoning": IMAGE}, {"content": IMAGE}, {"content": "\n<script>x</script>"}]
    tab = opened(browser.open(served.url))
    answer = ask(tab, IMAGE)
    assert f"{IMAGE}\n<script>x</script>" in answer
    assert "Thinking · 5 tokens" in answer
    assert "1,234 tokens" in answer
    assert "cut off at the limit" in answer
    assert IMAGE in tab.text("#log .question")
    assert tab.text("#model") == "M <b>1</b>"
    assert (
        tab.value("document.images.length + document.querySelectorAll('b, main script').length")
        == 0
    )
    assert "taken" not in tab.value("document.title")
    require_quiet(tab, served.url)


@in_browser
@pytest.mark.full
def test_turns_are_sent_without_their_thinking(browser: Browser, engine: Any):
    served = engine(Fixed(0.0), (-0.5, 2.0))
    served.deltas = [{"reasoning": "hm"}, {"content": " Yes"}, {"content": "."}]
    tab = opened(browser.open(served.url))
    tab.click("#settings summary")
    tab.write("#system", "Be brief.")
    tab.write("#temperature", "0.5")
    tab.write("#max-tokens", "7")
    ask(tab, "one")
    served.failure = {"error": {"message": "the model has stopped."}}
    assert "the model has stopped." in ask(tab, "two")
    assert tab.value("document.getElementById('question').value") == "two"
    served.failure, served.breaks = None, True
    assert "The answer broke off" in ask(tab, "two")
    served.breaks = False
    ask(tab, "three")
    first, _, _, third = served.asked
    assert first["temperature"] == 0.5
    assert first["max_tokens"] == 7
    turns = [(message["role"], message["content"]) for message in third["messages"]]
    assert turns == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", " Yes."),
        ("user", "three"),
    ]
    tab.click("#clear")
    ask(tab, "four")
    assert [message["role"] for message in served.asked[-1]["messages"]] == ["system", "user"]


@in_browser
@pytest.mark.full
def test_stop_lets_go_of_the_answer(browser: Browser, engine: Any):
    served = engine(Fixed(0.0), (-0.5, 2.0))
    served.stalls = True
    tab = opened(browser.open(served.url))
    tab.write("#question", "one")
    tab.press("Enter")
    tab.wait("document.querySelector('.answer')?.innerText.includes('Yes.')")
    tab.click("#stop")
    assert served.left.wait(10)
    tab.wait("document.querySelector('.counts').innerText.includes('stopped')")
    served.stalls = False
    ask(tab, "two")
    assert [message["content"] for message in served.asked[-1]["messages"]] == [
        "one",
        "Yes.",
        "two",
    ]
    require_quiet(tab, served.url)


@in_browser
@pytest.mark.full
def test_effort_where_the_adapter_is_calibrated(browser: Browser, engine: Any):
    served = engine(Fixed(0.0), (-0.5, 2.0), effort=lambda effort: Fixed(1 - effort / 100))
    tab = opened(browser.open(served.url))
    tab.click("input[value=effort]")
    tab.click("#slider")
    tab.press("ArrowLeft", times=5)
    assert "effort 25 · λ = 0.75" in ask(tab, "one")
    assert served.asked[-1]["effort"] == 25
    tab.click("input[value=compare]")
    tab.write("#prompt", "one")
    tab.write("#settings-list", "effort 100, 2")
    tab.click("#run")
    tab.wait("document.querySelectorAll('#columns [aria-busy=false]').length === 2")
    assert "effort 100 · λ = 0" in tab.text("#columns")
    assert "λ = 2" in tab.text("#columns")


@in_browser
@pytest.mark.full
def test_a_model_without_a_dial_is_chatted_with(browser: Browser, engine: Any):
    served = engine(None)
    tab = opened(browser.open(served.url))
    assert "no dial" in tab.text("#welcome")
    assert tab.value("document.getElementById('dial').checkVisibility()") is False
    assert tab.value("document.getElementById('views').checkVisibility()") is False
    assert "λ" not in ask(tab, "one")
    require_quiet(tab, served.url)


@in_browser
@pytest.mark.full
@pytest.mark.parametrize("view", ["chat", "compare"])
def test_every_control_has_a_name(browser: Browser, engine: Any, view: str):
    served = engine(Fixed(0.0), (-0.5, 2.0), effort=lambda effort: Fixed(0.0))
    tab = opened(browser.open(served.url))
    tab.click(f"input[value={view}]")
    tab.click("#settings summary")
    roles = {"button", "slider", "textbox", "spinbutton", "radio", "checkbox", "DisclosureTriangle"}
    found = [
        (node["role"]["value"], node["name"]["value"])
        for node in tab.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert len(found) > 8
    assert all(name for _, name in found), found
    assert (("slider", "λ") in found) == (view == "chat")
