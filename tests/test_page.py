"""
网页的规律：分布、散度与模型的一致；只给出 out/ 里的日志和表格；浏览器里每一项承诺都真的能用。
Laws of the page: its numbers are the models', it shows nothing but logs and tables of out/, and in a real
browser all that it promises works, in English and Chinese, on a phone, without an error or a foreign request.
"""

import base64
import json
import os
import shutil
import time

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from interop.checkpoint import load_model
from model.tokenizer import Tokenizer
from serving.api import make_app
from serving.engine import Engine
from serving.page import FILES, add_page
from test_serve import ASKED, KEY, Server, serve  # noqa: F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
ATTACK = '<img src=x onerror="document.title = 1">'


# -- what the page asks for


@pytest.fixture(scope="module")
def pair(models):
    return [load_model(models / f"{name}.pth", "cpu") for name in ("teacher", "student")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of runs: a log, data that is no log, a table; and a secret beside it."""
    folder = tmp_path_factory.mktemp("beside") / "out"
    (folder / "arena").mkdir(parents=True)
    (folder / "run.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss"')
    (folder / "answers.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "arena/table.md").write_text(f"| model | KL |\n|---|---:|\n| {ATTACK} | 0.5 |\n")
    for name in ("secret.jsonl", "table.md"):
        (folder.parent / name).write_text('{"step": 1}\n')
    (folder / "link.jsonl").symlink_to(folder.parent / "secret.jsonl")
    return folder


@pytest.fixture(scope="module")
def api(pair, out):
    engines = {name: Engine(name, model.eval(), tokenizer) for name, (model, tokenizer) in zip(("teacher", "student"), pair)}
    app = make_app(engines)
    add_page(app, engines, out)
    with TestClient(app) as client:
        yield client


def log_probs(model, tokens, begin, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor(tokens), [len(tokens)]).logits[begin:]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_divergence_and_entropies_are_those_of_the_two_models(api, pair, temperature):
    (teacher, tokenizer), (student, _) = pair
    prompt, answer = tokenizer.encode_chat(ASKED, add_generation_prompt=True)[0], tokenizer.encode("seven")
    found = api.post("/v1/page/compare", json={"models": ["teacher", "student"], "messages": ASKED, "answer": answer,
                                               "temperature": temperature}).json()
    p, q = (log_probs(model, prompt + answer, len(prompt) - 1, temperature) for model in (teacher, student))
    by_hand = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found["prompt"] == prompt and len(found["kl"]) == len(answer) + 1
    assert found["kl"] == pytest.approx(by_hand.tolist(), abs=1e-5)
    for entropies, log in zip(found["entropies"], (p, q), strict=True):
        assert entropies == pytest.approx(torch.distributions.Categorical(logits=log).entropy().tolist(), abs=1e-5)
    for text, model in zip(found["logits"], (teacher, student)):
        logits = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
        assert torch.allclose(logits.log_softmax(-1), log_probs(model, prompt + answer, -1)[0], atol=1e-5)


def test_a_long_answer_in_parts_gives_the_same_numbers(api, monkeypatch):
    body = {"models": ["teacher", "student"], "messages": ASKED, "answer": [20, 21, 22, 23, 24, 25, 26]}
    whole = api.post("/v1/page/compare", json=body).json()
    monkeypatch.setattr("serving.page.AT_ONCE", 3)
    parts = api.post("/v1/page/compare", json=body).json()
    assert parts["kl"] == pytest.approx(whole["kl"], rel=1e-5, abs=1e-6)
    assert parts["entropies"][1] == pytest.approx(whole["entropies"][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("wrong, status", [
    ({"models": ["teacher"]}, 400), ({"models": ["teacher", "none"]}, 404), ({"answer": [10 ** 9]}, 400), ({"answer": [-1]}, 400),
    ({"answer": [20] * 200}, 400), ({"messages": []}, 400), ({"temperature": 0}, 400), ({"answer": "text"}, 400)])
def test_a_comparison_of_nothing_is_refused(api, wrong, status):
    body = {"models": ["teacher", "student"], "messages": ASKED, "answer": [20]} | wrong
    refused = api.post("/v1/page/compare", json=body)
    assert refused.status_code == status and refused.json()["error"]["message"]


def test_models_of_different_vocabularies_are_not_compared(pair, byte_tokenizer):
    (model, tokenizer), _ = pair
    engines = {"a": Engine("a", model.eval(), tokenizer), "b": Engine("b", model, byte_tokenizer())}
    app = make_app(engines)
    add_page(app, engines, FILES)
    refused = TestClient(app).post("/v1/page/compare", json={"models": ["a", "b"], "messages": ASKED})
    assert refused.status_code == 400 and "no common vocabulary" in refused.json()["error"]["message"]


def test_the_vocabulary_is_the_bytes_of_each_token(api, pair):
    tokenizer = pair[0][1]
    names = api.get("/v1/page/vocabulary/teacher").json()
    for text in ("3 plus 4?", "矮龘 ⏎"):
        assert "".join(names[i] for i in tokenizer.encode(text)).encode("latin-1").decode() == text
    assert names[tokenizer.end_of_turn] == "<|im_end|>" and len(names) == tokenizer.vocab_size


def test_only_logs_and_tables_of_the_folder_are_shown(api):
    assert {*api.get("/v1/page/files").json()} == {"run.jsonl", "arena/table.md"}
    assert api.get("/v1/page/files/run.jsonl").json() == [{"step": 1, "loss": 2.5}]      # without the half-written row
    assert "0.5" in api.get("/v1/page/files/arena/table.md").json()
    for name in ("..%2Fsecret.jsonl", "..%2Ftable.md", "arena/..%2F..%2Ftable.md", "link.jsonl", "answers.jsonl", "%2Fetc%2Fpasswd",
                 "run", "", "%00"):
        refused = api.get(f"/v1/page/files/{name}")
        assert refused.status_code == 404 and "step" not in refused.text, name


def test_the_page_may_load_nothing_foreign_and_lies_in_no_frame(api):
    for path in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg"):
        policy = api.get(path).headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert api.get("/page/..%2Fpage.py").status_code == api.get("/page/page.py").status_code == 404


def test_the_page_stays_small():
    assert sum(len((FILES / name).read_text().splitlines()) for name in ("index.html", "app.js", "style.css")) <= 900


# -- in a browser


class Tab:
    """A page in a browser, whose errors and requests are kept."""

    def __init__(self, browser, url, **options):
        self.page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, "locale": "en-US"} | options)
        self.errors, self.requests = [], []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.js = self.page.evaluate

    def until(self, expression, seconds=30):
        """Playwright's wait_for_function needs eval, which the page's policy forbids."""
        end = time.time() + seconds
        while not (value := self.js(expression)):
            assert time.time() < end, expression
            self.page.wait_for_timeout(20)
        return value

    def ask(self, prompt, max_tokens=8):
        self.page.fill("#prompt", prompt)
        self.js(f"document.getElementById('max_tokens').value = {max_tokens}")
        self.page.press("#prompt", "Control+Enter")
        self.until("[...document.querySelectorAll('#answers .card small')].filter(e => /stop|length/.test(e.textContent)).length"
                   " === document.querySelectorAll('#models input:checked').length")

    def numbers(self):
        return [float(text) for text in self.js("[...document.querySelectorAll('#numbers td:last-child')].map(e => e.textContent)")]

    def bars(self):
        """[[teacher's, student's], ...] of the ten tokens and of the rest."""
        return self.js("[...document.querySelectorAll('#bars .bar')].map(e => [...e.querySelectorAll('text')].map(t => +t.textContent))")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with playwright.sync_playwright() as started:
        if not CHROMIUM and not os.path.exists(started.chromium.executable_path):
            pytest.skip("no Chromium: python -m playwright install chromium, or the system's")
        browser = started.chromium.launch(args=FLAGS, executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Where the server runs: its out/ has a run and a table."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "out/arena").mkdir(parents=True)
    rows = [{"step": step, "loss": 3 / step, "kd": 2 / step, "val_kl": 1 / step, "lr": 1e-3, "tokens_per_s": 900.0} for step in (1, 2, 3)]
    for name in ("a", "b"):
        (folder / f"out/{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "out/arena/table.md").write_text(f"| model | KL |\n|---|---:|\n| {ATTACK} | **0.5** |\n\n| leaf | n |\n|---|---|\n| x | 1 |\n")
    return folder


@pytest.fixture(scope="module")
def server(models, workplace):
    server = Server(f"teacher={models}/teacher.pth", f"student={models}/student.pth", cwd=workplace)
    yield server
    server.stop()


@pytest.fixture
def tab(browser, server):
    opened = []

    def open_tab(**options):
        opened.append(Tab(browser, server.root, **options))
        return opened[-1]

    yield open_tab
    for each in opened:
        assert each.errors == []
        assert all(url.startswith((f"{server.root}/", "data:")) for url in each.requests)
        each.page.close()


def test_two_models_stream_side_by_side(tab):
    tab = tab()
    tab.ask("3 plus 4?")
    assert tab.js("[...document.querySelectorAll('#answers h3')].map(e => e.textContent)") == ["teacher", "student"]
    for status in tab.js("[...document.querySelectorAll('#answers small')].map(e => e.textContent)"):
        assert "tokens" in status and "tokens/s" in status
    assert 2 <= tab.js("document.querySelectorAll('#answers .tokens button').length") <= 16


def test_an_answer_appears_while_it_is_written_and_can_be_stopped(tab, server):
    tab = tab()
    tab.js("document.getElementById('temperature').value = 10")             # random tokens: it seldom ends early
    tab.page.fill("#prompt", "tell me")
    tab.page.press("#prompt", "Control+Enter")
    tab.until("document.querySelectorAll('#answers .tokens button').length > 3 && !document.getElementById('stop').hidden"
              " && (document.getElementById('stop').click(), true)")
    tab.until("document.getElementById('stop').hidden")
    end = time.time() + 5
    while any(each["answering"] for each in httpx.get(f"{server.root}/health").json().values()):
        assert time.time() < end


def test_up_to_four_models_answer(tab):
    tab = tab()
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": name} for name in "abcde"]}))
    tab.page.reload()
    tab.until("document.querySelectorAll('#models input').length === 5")
    tab.page.click("#models label >> nth=4")
    assert tab.js("[...document.querySelectorAll('#models input:checked')].map(e => e.value).join('')") == "abcd"


def test_system_prompt_and_experience_reach_the_model(tab):
    tab, bodies = tab(), []
    tab.page.on("request", lambda request: bodies.append(request.post_data_json) if "chat/completions" in request.url else None)
    tab.page.click("summary")
    tab.page.fill("#system", "Be brief.")
    tab.page.fill("#experience", "4 and 3 are 7.")
    tab.page.fill("#temperature", "0.7")
    tab.page.fill("#top_k", "5")
    tab.ask("3 plus 4?")
    assert bodies[0]["messages"] == [{"role": "system", "content": "Be brief."},
                                     {"role": "user", "content": "4 and 3 are 7.\n\n3 plus 4?"}]
    assert bodies[0]["temperature"] == 0.7 and bodies[0]["top_k"] == 5


def test_bars_and_divergences_are_those_of_the_api_at_any_temperature(tab, pair):
    (teacher, tokenizer), (student, _) = pair
    tab = tab()
    tab.ask("3 plus 4?")
    tab.page.click("#answers .card:first-child .tokens button >> nth=0")
    tab.until("document.querySelectorAll('#bars .bar').length === 11")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "3 plus 4?"}], add_generation_prompt=True)[0]
    for temperature in (1.0, 3.0):
        if temperature != 1:
            tab.js(f"const s = document.getElementById('soften'); s.value = {temperature}; s.dispatchEvent(new Event('input'))")
        p, q = (log_probs(model, prompt, -1, temperature)[0].double().exp() for model in (teacher, student))
        top = torch.maximum(p, q).topk(10).indices
        top = top[p[top].argsort(descending=True)]
        assert tab.bars()[:10] == pytest.approx(torch.stack([p[top], q[top]], 1).numpy(), abs=1e-3)
        assert [sum(column) for column in zip(*tab.bars())] == pytest.approx([1, 1], abs=1e-3)     # with all others
        entropy, kl = (lambda a: -(a * a.log()).sum().item()), (lambda a, b: (a * (a / b).log()).sum().item())
        middle = (p + q) / 2
        assert tab.numbers() == pytest.approx([entropy(p), entropy(q), kl(p, q), kl(q, p),
                                               (kl(p, middle) + kl(q, middle)) / 2], abs=2e-3)


def test_the_answer_is_coloured_by_kl_and_hovering_shows_another_token(tab):
    tab = tab()
    tab.ask("3 plus 4?", 6)
    tab.page.click("#tab-tokens")                                           # explains the newest answer
    tab.until("document.querySelectorAll('#bars .bar').length === 11")
    titles = tab.js("[...document.querySelectorAll('#answer-tokens button')].map(e => +e.title.match(/[\\d.]+/)[0])")
    colours = tab.js("[...document.querySelectorAll('#answer-tokens button')].map(e => +getComputedStyle(e).backgroundColor.match(/[\\d.]+(?=\\)$)/)[0])")
    assert colours == pytest.approx([0.75 * min(1, kl / 3) for kl in titles], abs=0.01)
    pressed = tab.js("[...document.querySelectorAll('#answer-tokens button')].findIndex(e => e.ariaPressed === 'true')")
    assert titles[pressed] == max(titles)
    if len(titles) > 1:
        other = 1 if pressed == 0 else 0
        tab.page.hover(f"#answer-tokens button >> nth={other}")
        tab.until(f"document.getElementById('place').textContent.includes('Token {other + 1}:')")
        tab.page.mouse.move(5, 5)
        tab.until(f"document.getElementById('place').textContent.includes('Token {pressed + 1}:')")


def test_what_if_lets_both_models_continue_from_another_token(tab):
    tab = tab()
    tab.ask("3 plus 4?", 4)
    tab.page.click("#answers .card:first-child .tokens button >> nth=0")
    tab.until("document.querySelectorAll('#bars .bar').length === 11")
    name = tab.js("document.querySelectorAll('#bars .bar code')[3].textContent")
    tab.page.click("#bars .bar >> nth=3")
    tab.until("document.querySelectorAll('#what-if p').length === 2")
    assert tab.js("[...document.querySelectorAll('#what-if u')].map(e => e.textContent)") == [name, name]
    tab.until("[...document.querySelectorAll('#what-if p')].every(e => e.childNodes.length > 3)")


def test_a_character_of_several_tokens_is_read_as_one(tab):
    tab, ids = tab(), Tokenizer.load().encode("矮龘")
    assert len(ids) > 2                                                     # some token holds a part of a character

    def says(route):
        choices = [{"index": 0, "logprobs": {"content": [{"token": f"token_id:{i}", "logprob": -0.1}]}, "finish_reason": "stop"} for i in ids]
        route.fulfill(status=200, content_type="text/event-stream", body="".join(f"data: {json.dumps({'choices': [each]})}\n\n" for each in choices))

    tab.page.route("**/v1/chat/completions", says)
    tab.ask("高的反义词是什么？")
    assert tab.js("document.querySelector('#answers .tokens').textContent").replace("◌", "") == "矮龘"
    assert tab.js("document.querySelectorAll('#answers .card:first-child .tokens button').length") == len(ids)


def test_what_a_model_or_a_table_says_is_text_and_never_html(tab):
    tab = tab()

    def says(route):
        token = {"token": "token_id:20", "logprob": -0.1, "top_logprobs": []}
        choice = {"index": 0, "delta": {"content": ATTACK}, "logprobs": {"content": [token]}, "finish_reason": "stop"}
        route.fulfill(status=200, content_type="text/event-stream", body=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")

    tab.page.route("**/v1/page/vocabulary/*", lambda route: route.fulfill(json=[ATTACK] * 6400))
    tab.page.route("**/v1/chat/completions", says)
    tab.ask(ATTACK)
    assert tab.js("document.querySelector('#answers .tokens').textContent") == ATTACK
    tab.page.click("#answers .tokens button >> nth=0")
    tab.until("document.querySelectorAll('#bars .bar').length === 11")
    assert ATTACK in tab.js("document.getElementById('asked').textContent")
    tab.page.click("#tab-runs")
    tab.until("document.querySelectorAll('#table table').length === 2")
    assert tab.js("document.querySelector('#table td').textContent") == ATTACK
    assert tab.js("document.querySelectorAll('main img').length") == 0 and tab.js("document.title") == "MiniDistill"


def test_a_curve_grows_while_its_run_goes_on_and_runs_are_overlaid(tab, workplace):
    tab = tab()
    tab.page.click("#tab-runs")
    tab.until("document.querySelectorAll('.chart').length >= 4")
    points = "document.querySelector('.chart path').getAttribute('d').split('L').length"
    assert tab.js(points) == 3
    assert tab.js("[...document.querySelectorAll('.chart h3')].map(e => e.textContent)") == ["loss", "kd", "val_kl", "lr", "tokens_per_s"]
    tab.js("document.querySelectorAll('#run-list input').forEach(e => { if (!e.checked) e.click(); })")
    tab.until("document.querySelectorAll('.chart:first-child path').length === 2")
    for name in ("a", "b"):
        with open(workplace / f"out/{name}.jsonl", "a") as file:
            file.write('{"step": 4, "loss": 0.5}\n{"step": 5, "lo')
    tab.until(f"{points} === 4")
    assert "live" in tab.js("document.querySelector('#run-list label').className")
    with open(workplace / "out/a.jsonl", "a") as file:
        file.write('ss": 0.4, "sample": "\'hello\' -> \'<b>there</b>\'"}\n')
    tab.until("document.getElementById('samples').textContent.includes('step 5')")
    assert "<b>there</b>" in tab.js("document.getElementById('samples').textContent")


def test_it_speaks_chinese_and_remembers_it(tab):
    tab = tab(locale="zh-CN")
    assert tab.js("document.getElementById('tab-tokens').textContent") == "暗知识" and tab.js("document.documentElement.lang") == "zh-CN"
    tab.page.click("#language")
    assert tab.js("document.getElementById('tab-tokens').textContent") == "Dark knowledge"
    tab.page.reload()
    tab.until("document.querySelectorAll('#models label').length === 2")
    assert tab.js("document.getElementById('tab-tokens').textContent") == "Dark knowledge"
    assert tab.js("[...document.querySelectorAll('[data-text]')].every(e => e.textContent)")


@pytest.mark.parametrize("width", [380, 768])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_in_both_schemes(tab, width, scheme):
    tab = tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.ask("3 plus 4?", 8)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert tab.js(fits)
    tab.page.click("#answers .tokens button >> nth=0")
    tab.until("document.querySelectorAll('#bars .bar').length === 11")
    assert tab.js(fits)
    tab.page.click("#tab-runs")
    tab.until("document.querySelectorAll('.chart').length >= 4")
    assert tab.js(fits)
    lightness = tab.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)")
    assert (lightness > 600) == (scheme == "light")


def test_the_keyboard_reaches_everything(tab):
    tab = tab()
    tab.ask("3 plus 4?", 4)
    tab.page.focus("#answers .tokens button >> nth=0")
    tab.page.keyboard.press("ArrowRight")
    assert tab.js("document.activeElement.parentElement.className") == "tokens"
    tab.page.focus("#answers .tokens button >> nth=0")
    tab.page.keyboard.press("Enter")
    tab.until("document.querySelectorAll('#bars .bar').length === 11")
    tab.page.focus("#tab-tokens")
    tab.page.keyboard.press("ArrowRight")
    assert tab.js("document.activeElement.id") == "tab-runs" and not tab.js("document.getElementById('runs').hidden")
    tab.page.focus("#tab-runs")
    tab.page.keyboard.press("ArrowRight")
    assert not tab.js("document.getElementById('chat').hidden")


def test_a_server_with_a_key_asks_for_it_once(browser, models, serve):
    server = serve(f"teacher={models}/teacher.pth", api_key_env="SERVE_KEY", variables={"SERVE_KEY": KEY})
    tab = Tab(browser, server.root)
    tab.until("!document.getElementById('login').hidden")
    for key in ("wrong", KEY):
        tab.page.fill("#key", key)
        tab.page.press("#key", "Enter")
        tab.page.wait_for_timeout(100)
    tab.until("document.querySelectorAll('#models label').length === 1 && document.getElementById('login').hidden")
    tab.ask("3 plus 4?", 3)
    assert not any(KEY in url for url in tab.requests)
    tab.page.close()
    assert KEY not in server.stop().output
