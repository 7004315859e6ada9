// The page of scripts/serve.py. No library, no build step; text of models is never HTML.

// -- 1. Texts ---------------------------------------------------------------------------------------

const TEXTS = {
  chat: ["Side by side", "并排对话"], tokens: ["Dark knowledge", "暗知识"], runs: ["Training", "训练"],
  models: ["Models, up to four", "模型，至多四个"], prompt: ["Prompt", "提示"], more: ["Sampling and context", "采样与上下文"],
  system: ["System prompt", "系统提示"],
  experience: ["Experience, put before the prompt as a context that a student can learn to do without",
    "经验：放在提示之前的上下文，学生可以学会不用它"],
  temperature: ["Temperature, 0: greedy", "温度，0：贪心"], max_tokens: ["Tokens", "词元数"], seed: ["Seed", "种子"],
  send: ["Send", "发送"], stop: ["Stop", "停止"], hint: ["Ctrl+Enter sends. Click a token to see why it was chosen.",
    "Ctrl+Enter 发送。点一个词元，看它为什么被选中。"],
  teacher: ["Teacher", "教师"], student: ["Student", "学生"], softmax: ["Temperature of both softmaxes", "两个 softmax 的温度"],
  tokens_help: ["The answer, coloured by KL(teacher ‖ student): red tokens are those that the student has to learn. Click one.",
    "回答按 KL(教师 ‖ 学生) 上色：红的是学生还要学的词元。点一个看看。"],
  bars_help: ["Click a row to continue from that token instead.", "点一行，看看从那个词元会怎样继续。"],
  run_list: ["Runs in out/, newest first", "out/ 里的运行，新的在前"], tables: ["Tables of comparisons", "比较的表格"],
  entropy: ["entropy, nats", "熵，nats"], probability: ["probability", "概率"], continues: ["continues", "的续写"],
  one_model: ["This server has one model; dark knowledge needs two.", "这个服务只有一个模型；暗知识需要两个。"],
  no_runs: ["No runs yet.", "还没有运行。"], key: ["Key of this server", "服务的密钥"], steps: ["step", "步"],
};
let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const say = name => TEXTS[name][language === "zh" ? 1 : 0];
const $ = id => document.getElementById(id);

function showLanguage() {
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh";
}

// make("p", {className: "quiet"}, "text", child, ...)
function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// -- 2. Requests ------------------------------------------------------------------------------------

async function ask(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = {...(body && {"Content-Type": "application/json"}), ...(key && {Authorization: `Bearer ${key}`})};
  const response = await fetch(path, {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)});
  if (response.status === 401) {
    const given = prompt(say("key"));
    if (given) {
      sessionStorage.setItem("key", given);
      return ask(path, body, signal);
    }
  }
  if (!response.ok) throw Error((await response.json()).error?.message ?? response.statusText);
  return response;
}

const askJSON = async (path, body) => (await ask(path, body)).json();

// A problem is shown until something works again.
async function attempt(work) {
  try {
    await work();
    $("problem").hidden = true;
  } catch (error) {
    if (error.name === "AbortError") return;
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}

// -- 3. Side by side --------------------------------------------------------------------------------

let models = [], running = null;
const vocabularies = {};

async function vocabulary(model) {
  vocabularies[model] ??= await askJSON(`/v1/page/vocabulary/${encodeURIComponent(model)}`);
  return vocabularies[model];
}

// What is visible of a token that is white space or a part of a character.
const visible = text => text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/^ +$/, spaces => "␣".repeat(spaces.length));

function conversation() {
  const system = $("system").value.trim(), experience = $("experience").value.trim(), asked = $("prompt").value;
  return [...(system ? [{role: "system", content: system}] : []),
    {role: "user", content: experience ? `${experience}\n\n${asked}` : asked}];
}

async function* events(response) {
  let rest = "";
  for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + chunk).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function answer(model, messages, card, signal) {
  const text = make("div", {className: "tokens"}), status = make("small");
  card.append(text, status);
  const begun = performance.now(), ids = [], names = await vocabulary(model);
  const response = await ask("/v1/chat/completions", {
    model, messages, stream: true, temperature: +$("temperature").value, top_p: +$("top_p").value, top_k: +$("top_k").value,
    max_tokens: +$("max_tokens").value, seed: +$("seed").value, logprobs: true, return_tokens_as_token_ids: true}, signal);
  for await (const event of events(response)) {
    if (event.error) throw Error(event.error.message);
    for (const token of event.choices[0].logprobs.content) {
      const at = ids.push(+token.token.slice(9)) - 1;
      text.append(make("button", {textContent: visible(names[ids[at]]), title: `p = ${Math.exp(token.logprob).toFixed(3)}`,
        onclick: () => attempt(() => explain(model, messages, ids, at))}));
    }
    const seconds = (performance.now() - begun) / 1000;
    status.textContent = `${ids.length} ${say("max_tokens")} · ${(ids.length / seconds).toFixed(0)} /s`;
  }
}

$("ask").onsubmit = event => {
  event.preventDefault();
  running?.abort();
  running = new AbortController();
  const chosen = [...document.querySelectorAll("#models input:checked")].map(box => box.value);
  const cards = chosen.map(model => make("article", {className: "card"}, make("h3", {textContent: model})));
  $("answers").replaceChildren(...cards);
  $("stop").hidden = false;
  const messages = conversation(), mine = running;
  attempt(() => Promise.all(chosen.map((model, i) => answer(model, messages, cards[i], mine.signal))))
    .finally(() => { if (running === mine) $("stop").hidden = true; });
};
$("stop").onclick = () => running?.abort();
$("ask").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit(); };

// -- 4. Dark knowledge ------------------------------------------------------------------------------

let shown = null;           // {tokens, n_prompt, at, logits}: the answer and the chosen position in it

// An answer of side by side, seen by both models.
async function explain(model, messages, ids, at) {
  if (models.length < 2) throw Error(say("one_model"));
  const pair = [$("teacher").value, $("student").value];
  const asked = await askJSON("/v1/page/compare", {models: pair, messages, answer: ""});
  shown = {tokens: [...asked.tokens.slice(0, asked.n_prompt), ...ids], n_prompt: asked.n_prompt, at};
  select("tokens");
  await colour();
  await choose(at);
}

// The answer's tokens, coloured by KL at the slider's temperature.
async function colour() {
  if (!shown) return;
  const names = await vocabulary($("teacher").value), {tokens, n_prompt} = shown;
  const found = await askJSON("/v1/page/compare", {models: [$("teacher").value, $("student").value], tokens,
    temperature: +$("soften").value});
  // Prediction i is of token i + 1.
  const kl = found.kl.slice(n_prompt - 1), answers = tokens.slice(n_prompt);
  $("answer-tokens").replaceChildren(...answers.map((id, i) => {
    const button = make("button", {textContent: visible(names[id]), title: `KL = ${kl[i].toFixed(3)} nats`,
      onclick: () => attempt(() => choose(i))});
    button.style.backgroundColor = `rgba(var(--hot), ${(0.75 * (1 - Math.exp(-kl[i]))).toFixed(3)})`;
    button.ariaPressed = i === shown.at;
    return button;
  }));
}

async function choose(at) {
  shown.at = at;
  const tokens = shown.tokens.slice(0, shown.n_prompt + at);
  const {logits} = await askJSON("/v1/page/distribution", {models: [$("teacher").value, $("student").value], tokens});
  shown.logits = logits.map(text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer));
  $("what-if").replaceChildren();
  [...$("answer-tokens").children].forEach((button, i) => { button.ariaPressed = i === at; });
  await showPosition();
}

export function softmax(logits, T) {
  const most = logits.reduce((a, b) => Math.max(a, b)), e = Float64Array.from(logits, x => Math.exp((x - most) / T));
  const sum = e.reduce((a, b) => a + b);
  return e.map(x => x / sum);
}

const KL = (p, q) => p.reduce((sum, x, i) => sum + (x > 0 ? x * Math.log(x / Math.max(q[i], 1e-300)) : 0), 0);
const entropy = p => -p.reduce((sum, x) => sum + (x > 0 ? x * Math.log(x) : 0), 0);

async function showPosition() {
  if (!shown?.logits) return;
  const [p, q] = shown.logits.map(each => softmax(each, +$("soften").value));
  const middle = p.map((x, i) => (x + q[i]) / 2), names = await vocabulary($("teacher").value);
  const rows = [[`${$("teacher").value}: ${say("entropy")}`, entropy(p)], [`${$("student").value}: ${say("entropy")}`, entropy(q)],
    ["KL(teacher ‖ student)", KL(p, q)], ["KL(student ‖ teacher)", KL(q, p)],
    ["JSD", (KL(p, middle) + KL(q, middle)) / 2]];
  $("numbers").replaceChildren(...rows.map(([name, value]) =>
    make("tr", {}, make("td", {textContent: name}), make("td", {textContent: value.toFixed(4)}))));
  const likely = p.map((x, i) => [Math.max(x, q[i]), i]);
  const top = [...likely.keys()].sort((a, b) => Math.max(p[b], q[b]) - Math.max(p[a], q[a])).slice(0, 10).sort((a, b) => p[b] - p[a]);
  $("bars").replaceChildren(...top.map(i => {
    const bar = (y, kind, value) => [
      draw("rect", {x: 0, y, width: `${(value * 85).toFixed(2)}%`, height: 12, class: kind}),
      draw("text", {x: `${(value * 85 + 1).toFixed(2)}%`, y: y + 10}, value.toFixed(4))];
    return make("button", {className: "bar", onclick: () => attempt(() => whatIf(i)), title: names[i]},
      make("code", {textContent: visible(names[i])}),
      draw("svg", {role: "img", "aria-label": `${p[i].toFixed(4)}, ${q[i].toFixed(4)}`}, ...bar(1, "teacher", p[i]), ...bar(16, "student", q[i])));
  }));
  $("position").hidden = false;
}

// Both models continue after another token, greedily.
async function whatIf(id) {
  const prompt = [...shown.tokens.slice(0, shown.n_prompt + shown.at), id], pair = [$("teacher").value, $("student").value];
  const names = await vocabulary(pair[0]);
  const found = await Promise.all(pair.map(model => askJSON("/v1/completions", {model, prompt, max_tokens: 64, temperature: 0})));
  const begin = shown.tokens.slice(shown.n_prompt, shown.n_prompt + shown.at).map(each => names[each]).join("");
  $("what-if").replaceChildren(...found.map((each, i) => make("p", {},
    make("b", {className: ["teacher", "student"][i], textContent: `${pair[i]} ${say("continues")}: `}),
    begin, make("u", {textContent: names[id]}), each.choices[0].text)));
}

let waiting = null;
$("soften").oninput = () => {
  $("soften-value").textContent = (+$("soften").value).toFixed(1);
  attempt(showPosition);
  clearTimeout(waiting);
  waiting = setTimeout(() => attempt(colour), 200);
};
$("teacher").onchange = $("student").onchange = () => attempt(async () => {
  await colour();
  if (shown) await choose(shown.at);
});

// -- 5. Training ------------------------------------------------------------------------------------

const SHOWN = ["loss", "val_kl", "val_loss", "val_agreement", "val_accuracy"];      // at first, if a run has them
let runs = {}, quantities = null;
const rowsOf = {};

async function refreshRuns() {
  const found = await askJSON("/v1/page/runs"), changed = Object.keys(found).filter(name => found[name] !== runs[name]);
  if (Object.keys(found).join() !== Object.keys(runs).join()) {
    const before = new Set([...document.querySelectorAll("#run-list input:checked")].map(box => box.value));
    $("run-list").replaceChildren($("run-list").firstElementChild, ...Object.keys(found).map((name, i) => make("label", {},
      make("input", {type: "checkbox", value: name, checked: before.size ? before.has(name) : i === 0,
        onchange: () => attempt(showRuns)}), ` ${name}`)));
    if (!Object.keys(found).length) $("run-list").append(make("p", {className: "quiet", textContent: say("no_runs")}));
  }
  runs = found;
  changed.forEach(name => delete rowsOf[name]);
  if (changed.length) await showRuns();
}

async function showRuns() {
  const names = [...document.querySelectorAll("#run-list input:checked")].map(box => box.value);
  for (const name of names) rowsOf[name] ??= await askJSON(`/v1/page/runs/${name.split("/").map(encodeURIComponent).join("/")}`);
  const known = [...new Set(names.flatMap(name => rowsOf[name].flatMap(Object.keys)))]
    .filter(name => names.some(run => rowsOf[run].some(row => typeof row[name] === "number")) && name !== "step").sort();
  quantities ??= SHOWN.filter(name => known.includes(name));
  $("quantities").replaceChildren(...known.map(name => make("label", {},
    make("input", {type: "checkbox", checked: quantities.includes(name), onchange: event => {
      quantities = event.target.checked ? [...quantities, name] : quantities.filter(each => each !== name);
      attempt(showRuns);
    }}), ` ${name}`)));
  $("charts").replaceChildren(...quantities.filter(name => known.includes(name)).map(name => chart(name, names)));
}

const COLOURS = ["var(--teacher)", "var(--student)", "#3a9d6e", "#a45ac4", "#c2a01e", "#50a9bd"];

function chart(quantity, names) {
  const curves = names.map(name => rowsOf[name].filter(row => Number.isFinite(row[quantity])).map(row => [row.step, row[quantity]]));
  const xs = curves.flat().map(([x]) => x), ys = curves.flat().map(([, y]) => y);
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const W = 320, H = 170, place = ([x, y]) => [40 + (W - 50) * (x - left) / (right - left || 1), 10 + (H - 35) * (high - y) / (high - low || 1)];
  const lines = curves.map((curve, i) => {
    const path = draw("path", {d: curve.map((point, n) => `${n ? "L" : "M"}${place(point).map(v => v.toFixed(1))}`).join("")});
    path.style.stroke = COLOURS[i % COLOURS.length];
    return path;
  });
  const label = (x, y, text, anchor) => draw("text", {x, y, "text-anchor": anchor}, text);
  const number = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString() : `${+value.toPrecision(3)}`;
  const last = curves.map((curve, i) => {
    const line = make("small", {textContent: `${names[i]}: ${curve.length ? number(curve.at(-1)[1]) : "–"}  `});
    line.style.color = COLOURS[i % COLOURS.length];
    return line;
  });
  return make("figure", {className: "card chart"}, make("h3", {textContent: quantity}),
    draw("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": quantity},
      draw("line", {x1: 40, y1: H - 25, x2: W - 10, y2: H - 25}), draw("line", {x1: 40, y1: 10, x2: 40, y2: H - 25}),
      label(36, 16, number(high), "end"), label(36, H - 27, number(low), "end"),
      label(40, H - 8, number(left), "start"), label(W - 10, H - 8, `${say("steps")} ${number(right)}`, "end"), ...lines),
    ...last);
}

async function showTables() {
  const names = await askJSON("/v1/page/tables");
  $("table-list").replaceChildren(...names.map(name => make("option", {textContent: name})));
  $("table-list").hidden = !names.length;
  if (names.length) await showTable();
}

async function showTable() {
  const text = await askJSON(`/v1/page/tables/${$("table-list").value}`);
  const rows = text.split("\n").filter(line => line.startsWith("|") && !/^\|[-:| ]+\|$/.test(line));
  const cells = rows.map(row => row.split("|").slice(1, -1).map(cell => cell.trim().replaceAll("**", "")));
  $("table").replaceChildren(make("table", {}, ...cells.map((row, n) =>
    make("tr", {}, ...row.map(cell => make(n ? "td" : "th", {textContent: cell}))))));
}
$("table-list").onchange = () => attempt(showTable);

// -- 6. Tabs, and the start -------------------------------------------------------------------------

const TABS = ["chat", "tokens", "runs"];

function select(tab) {
  for (const each of TABS) {
    $(each).hidden = each !== tab;
    $(`tab-${each}`).ariaSelected = each === tab;
    $(`tab-${each}`).tabIndex = each === tab ? 0 : -1;
  }
  history.replaceState(null, "", `#${tab}`);
  if (tab === "runs") attempt(async () => { await refreshRuns(); await showTables(); });
}
for (const tab of TABS) $(`tab-${tab}`).onclick = () => select(tab);
document.querySelector("nav").onkeydown = event => {
  const step = {ArrowRight: 1, ArrowLeft: TABS.length - 1}[event.key];
  if (!step) return;
  const next = TABS[(TABS.findIndex(tab => !$(tab).hidden) + step) % TABS.length];
  select(next);
  $(`tab-${next}`).focus();
};
$("language").onclick = () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  showLanguage();
  attempt(showPosition);
};
setInterval(() => { if (!$("runs").hidden) attempt(refreshRuns); }, 2000);

showLanguage();
select(TABS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
attempt(async () => {
  models = (await askJSON("/v1/models")).data.map(each => each.id);
  $("models").append(...models.map((name, i) => make("label", {},
    make("input", {type: "checkbox", value: name, checked: i < 4, onchange: event => {
      if (document.querySelectorAll("#models input:checked").length > 4) event.target.checked = false;
    }}), ` ${name}`)));
  for (const id of ["teacher", "student"]) $(id).append(...models.map(name => make("option", {textContent: name})));
  $("student").selectedIndex = Math.min(1, models.length - 1);
});
