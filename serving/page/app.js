// The page of scripts/serve.py. No library, no build step; what models write is text, never HTML.

// -- 1. Texts ---------------------------------------------------------------------------------------

const TEXTS = {
  chat: ["Side by side", "并排对话"], tokens: ["Dark knowledge", "暗知识"], runs: ["Training", "训练"],
  key: ["Key of this server", "服务的密钥"], enter: ["Enter", "进入"], wrong_key: ["This key is wrong.", "密钥不对。"], theme: ["Light or dark", "浅色或深色"],
  models: ["Models, up to four", "模型，至多四个"], prompt: ["Prompt", "提示"],
  more: ["Sampling and context", "采样与上下文"], system: ["System prompt", "系统提示"],
  experience: ["Experience (Q + E): context before the prompt; "
      + "context distillation teaches a student to do without it",
    "经验（Q + E）：放在提示之前的上下文；上下文蒸馏让学生不用它也会"],
  temperature: ["Temperature, 0: greedy", "温度，0：贪心"], max_tokens: ["Tokens, at most", "最多词元数"],
  seed: ["Seed", "随机种子"], send: ["Send", "发送"], stop: ["Stop", "停止"],
  hint: ["Ctrl+Enter sends. Click a token to see what else could have come.",
    "Ctrl+Enter 发送。点一个词元，看看本来还可能是什么。"],
  n_tokens: ["tokens", "个词元"], per_second: ["tokens/s", "词元/秒"],
  teacher: ["Teacher", "教师"], student: ["Student", "学生"],
  softmax: ["Temperature of both softmaxes:", "两个 softmax 的温度："],
  nothing: ["Ask something in “Side by side” first; then each token of the answer is explained here.",
    "先在“并排对话”里提一个问题，这里再解释回答的每个词元。"],
  answer: ["The answer's tokens", "回答的词元"], asked: ["“{}”, and the answer of {}:", "“{}”，{} 的回答："],
  scale: ["KL(teacher ‖ student), nats: 3 and more", "KL(教师 ‖ 学生)，nats：3 及以上"],
  tokens_help: ["The redder a token, the more of the teacher's distribution the student still has to learn. "
      + "Hover over one, or click it; arrow keys work too.",
    "词元越红，教师的分布里学生还没学会的就越多。把鼠标移到词元上，或者点它；方向键也行。"],
  place: ["Token {}: what both expect here", "第 {} 个词元：两个模型各自的预测"],
  bars_help: ["Click a token to let both models continue from it instead.", "点一个词元，让两个模型改从它写下去。"],
  rest: ["others", "其余"],
  entropy: ["Entropy of {}", "{} 的熵"], nats: ["At this token, in nats", "这个词元处，单位 nats"],
  forward: ["KL(teacher ‖ student)", "KL(教师 ‖ 学生)"], covering: ["forward, mode-covering", "前向，覆盖所有峰"],
  reverse: ["KL(student ‖ teacher)", "KL(学生 ‖ 教师)"], seeking: ["reverse, mode-seeking", "反向，追逐一个峰"],
  jsd: ["JSD", "JSD"], between: ["to the mean of both", "到两者的平均"],
  continues: ["{} continues: ", "{} 续写："],
  one_model: ["This server has one model; dark knowledge needs two: --weights TEACHER STUDENT",
    "这个服务只有一个模型；暗知识需要两个：--weights 教师 学生"],
  run_list: ["Runs in out/, newest first", "out/ 里的运行，新的在前"], quantities: ["Curves", "曲线"],
  no_runs: ["No runs yet.", "还没有运行。"], samples: ["The newest samples of the student's text", "学生写的文字，最新的几段"], step: ["step", "步"], tables: ["Tables of comparisons", "比较的表格"],
};
let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const say = (name, ...values) =>
  values.reduce((text, value) => text.replace("{}", () => value), TEXTS[name][language === "zh" ? 1 : 0]);
const $ = id => document.getElementById(id);

function showLanguage() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
  for (const each of document.querySelectorAll("[data-label]")) each.ariaLabel = say(each.dataset.label);
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh-CN";
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

let keyGiven = null;        // a promise: several requests wait for one key

function askKey() {
  $("login").hidden = false;
  $("key").focus();
  return keyGiven ??= new Promise(resolve => {
    $("login").onsubmit = event => {
      event.preventDefault();
      sessionStorage.setItem("key", $("key").value.replace(/[^\x21-\x7e]/g, ""));
      $("login").hidden = true;
      keyGiven = null;
      resolve();
    };
  });
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = {
    ...(body && {"Content-Type": "application/json"}),
    ...(key && {Authorization: `Bearer ${key}`})};
  const method = body ? "POST" : "GET";
  const response = await fetch(path, {method, headers, signal, body: body && JSON.stringify(body)});
  if (response.status === 401) {
    $("wrong-key").hidden = !key;
    sessionStorage.removeItem("key");
    await askKey();
    return ask(path, body, signal);
  }
  if (!response.ok) throw Error((await response.json()).error?.message ?? response.statusText);
  return response;
}

const askJSON = async (path, body) => (await ask(path, body)).json();

// The choices of a streamed answer, as they come.
async function* stream(path, body, signal) {
  const response = await ask(path, {...body, stream: true}, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events.filter(each => each !== "data: [DONE]")) {
      const {error, choices} = JSON.parse(event.slice(6));
      if (error) throw Error(error.message);
      yield choices[0];
    }
  }
}

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
let newest = null;          // the answer that a visit to dark knowledge begins with
const vocabularies = {};

async function vocabulary(model) {
  vocabularies[model] ??= await askJSON(`/v1/page/vocabulary/${encodeURIComponent(model)}`);
  return vocabularies[model];
}

const bytes = (names, ids) => Uint8Array.from(ids.map(id => names[id]).join(""), c => c.charCodeAt(0));

// Token by token: of a character that several tokens make up, the last one has the text.
function reader(names) {
  const decoder = new TextDecoder();
  return id => decoder.decode(bytes(names, [id]), {stream: true});
}

// What is visible of a token that is white space or a part of a character.
const visible = text =>
  text === "" ? "◌" : text.replace(/\n/g, "⏎").replace(/^ +$/, spaces => "␣".repeat(spaces.length));

function nameOf(names, id) {
  const token = bytes(names, [id]), text = new TextDecoder().decode(token);
  return text.includes("\ufffd") ? [...token].map(byte => byte.toString(16)).join(" ") : visible(text).replace(/^ /, "␣");
}

const isSpecial = text => /^<\|.*\|>$/.test(text);

function tokenButton(text, properties) {
  return make("button", {type: "button", textContent: visible(text), tabIndex: -1,
    className: isSpecial(text) ? "special" : "", ...properties});
}

// One stop of the Tab key for all tokens; arrow keys go from one to the next.
function withArrowKeys(box) {
  box.addEventListener("focusin", event => {
    for (const each of box.children) each.tabIndex = each === event.target ? 0 : -1;
  });
  box.onkeydown = event => {
    const next = {ArrowRight: "nextSibling", ArrowLeft: "previousSibling"}[event.key];
    if (!next || !document.activeElement[next]) return;
    document.activeElement[next].focus();
    event.preventDefault();
  };
  return box;
}

function conversation() {
  const system = $("system").value.trim(), experience = $("experience").value.trim(), asked = $("prompt").value;
  return [...(system ? [{role: "system", content: system}] : []),
    {role: "user", content: experience ? `${experience}\n\n${asked}` : asked}];
}

async function answer(model, messages, card, signal) {
  const box = withArrowKeys(make("div", {className: "tokens"})), status = make("small");
  card.append(box, status);
  const next = reader(await vocabulary(model)), shared = {model, messages, ids: []}, begun = performance.now();
  const body = {model, messages, logprobs: true, return_tokens_as_token_ids: true};
  for (const id of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) if ($(id).value) body[id] = +$(id).value;
  for await (const choice of stream("/v1/chat/completions", body, signal)) {
    for (const token of choice.logprobs.content) {
      const at = shared.ids.push(+token.token.slice("token_id:".length)) - 1;
      box.append(tokenButton(next(shared.ids[at]), {title: `p = ${Math.exp(token.logprob).toFixed(3)}`,
        onclick: () => attempt(() => explain(shared, at))}));
    }
    if (box.firstChild) box.firstChild.tabIndex = 0;
    const n = shared.ids.length, seconds = (performance.now() - begun) / 1000;
    status.textContent = `${n} ${say("n_tokens")} · ${(n / seconds).toFixed(0)} ${say("per_second")}`
      + (choice.finish_reason ? ` · ${choice.finish_reason}` : "");
  }
  return shared;
}

$("ask").onsubmit = event => {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController(), messages = conversation();
  const chosen = [...document.querySelectorAll("#models input:checked")].map(box => box.value);
  const cards = chosen.map(model => make("article", {className: "card"}, make("h3", {textContent: model})));
  $("answers").replaceChildren(...cards);
  $("stop").hidden = false;
  shown = newest = null;
  attempt(async () => {
    [newest] = await Promise.all(chosen.map((model, i) => answer(model, messages, cards[i], mine.signal)));
  }).finally(() => { if (running === mine) $("stop").hidden = true; });
};
$("stop").onclick = () => running?.abort();
$("ask").onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
};

// -- 4. Dark knowledge ------------------------------------------------------------------------------

let shown = null;           // {model, messages, ids, at, prompt}: an answer, and the chosen token in it
let seen = null;            // {at, logits} of the token whose bars are drawn
const pair = () => [$("teacher").value, $("student").value];

function heat(kl) {
  const percent = 75 * Math.min(1, Math.max(0, kl) / 3);
  return `color-mix(in srgb, var(--hot) ${percent.toFixed(1)}%, transparent)`;
}

// An answer of side by side, seen by teacher and student; at: a token, or by default the least alike.
async function explain(shared, at) {
  if (models.length < 2) throw Error(say("one_model"));
  shown = {...shared, ids: [...shared.ids], at};
  select("tokens");
  $("nothing").hidden = true;
  $("explained").hidden = false;
  const kl = await colour();
  await choose(at ?? kl.indexOf(Math.max(...kl)));
}

const compare = answer => askJSON("/v1/page/compare",
  {models: pair(), messages: shown.messages, answer, temperature: +$("soften").value});

// The whole answer, coloured by KL at the slider's temperature. Returns KL at each token.
async function colour() {
  const answer = shown, names = await vocabulary(pair()[0]), found = await compare(answer.ids);
  const kl = found.kl.slice(0, answer.ids.length);
  if (answer !== shown) return kl;
  shown.prompt = found.prompt;
  $("asked").textContent = say("asked", answer.messages.at(-1).content, answer.model);
  const next = reader(names), buttons = answer.ids.map((id, i) => {
    const button = tokenButton(next(id), {title: `KL = ${kl[i].toFixed(3)} nats`,
      onclick: () => attempt(() => choose(i))});
    button.style.backgroundColor = heat(kl[i]);
    return button;
  });
  const focused = [...$("answer-tokens").children].indexOf(document.activeElement);
  $("answer-tokens").replaceChildren(...buttons);
  buttons[focused]?.focus();
  press();
  return kl;
}

function press() {
  [...$("answer-tokens").children].forEach((button, i) => {
    button.ariaPressed = i === shown.at;
    button.tabIndex = i === shown.at ? 0 : -1;
  });
}

async function choose(at) {
  shown.at = at;
  press();
  $("what-if").hidden = true;
  await look(at);
}

const decode = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);

// Both models' distributions at one token, unless another one is wanted by now.
let wanted = null;
async function look(at) {
  const mine = wanted = {}, found = await compare(shown.ids.slice(0, at));
  if (mine !== wanted) return;
  seen = {at, logits: found.logits.map(decode)};
  await showPosition();
}

let hovering = null;
function hover(at) {        // a pointer on its way to somewhere else asks for nothing
  clearTimeout(hovering);
  hovering = setTimeout(() => { if (shown && seen && seen.at !== at) attempt(() => look(at)); }, 120);
}
const placeOf = event => [...$("answer-tokens").children].indexOf(event.target);
withArrowKeys($("answer-tokens")).onpointerover = event => {
  if (placeOf(event) >= 0 && event.pointerType === "mouse") hover(placeOf(event));
};
$("answer-tokens").onpointerleave = () => { if (shown) hover(shown.at); };
$("answer-tokens").addEventListener("focusin", event => hover(placeOf(event)));

export function softmax(logits, T) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const e = Float64Array.from(logits, x => Math.exp((x - most) / T));
  const sum = e.reduce((a, b) => a + b);
  return e.map(x => x / sum);
}

export const KL = (p, q) =>
  p.reduce((sum, x, i) => sum + (x > 0 ? x * Math.log(x / Math.max(q[i], 1e-300)) : 0), 0);
export const entropy = p => -p.reduce((sum, x) => sum + (x > 0 ? x * Math.log(x) : 0), 0);

async function showPosition() {
  if (!seen) return;
  const [p, q] = seen.logits.map(each => softmax(each, +$("soften").value));
  const middle = p.map((x, i) => (x + q[i]) / 2);
  const [teacher, student] = pair(), names = await vocabulary(teacher);
  const rows = [
    ["teacher", say("entropy", teacher), "", entropy(p)],
    ["student", say("entropy", student), "", entropy(q)],
    ["", say("forward"), say("covering"), KL(p, q)],
    ["", say("reverse"), say("seeking"), KL(q, p)],
    ["", say("jsd"), say("between"), (KL(p, middle) + KL(q, middle)) / 2]];
  $("numbers").replaceChildren(make("tr", {}, make("th", {textContent: say("nats")}), make("th")),
    ...rows.map(([className, name, note, value]) => make("tr", {},
      make("td", {className}, name, make("small", {textContent: note})),
      make("td", {textContent: value.toFixed(4)}))));
  $("place").replaceChildren(say("place", seen.at + 1), ...pair().map((model, i) =>
    make("small", {className: ["teacher", "student"][i], textContent: ` ■ ${model}`})));

  // The top 10 of both together, the teacher's order; then what is left, so that each colour sums to 1.
  const most = p.map((x, i) => Math.max(x, q[i])), taken = shown.ids[seen.at];
  const top = [...most.keys()].sort((a, b) => most[b] - most[a]).slice(0, 10).sort((a, b) => p[b] - p[a]);
  const rest = each => Math.max(0, 1 - top.reduce((sum, i) => sum + each[i], 0));
  const bar = (y, kind, value) => [
    draw("rect", {y, width: `${(value * 84).toFixed(2)}%`, height: 13, rx: 2, class: kind}),
    draw("text", {x: `${(value * 84 + 1).toFixed(2)}%`, y: y + 10.5}, value.toFixed(4))];
  const bars = (a, b) => draw("svg",
    {role: "img", "aria-label": `${teacher} ${a.toFixed(4)}, ${student} ${b.toFixed(4)}`},
    ...bar(1, "teacher", a), ...bar(16, "student", b));
  $("bars").replaceChildren(
    ...top.map(i => make("button",
      {className: i === taken ? "bar taken" : "bar", onclick: () => attempt(() => whatIf(i))},
      make("code", {textContent: nameOf(names, i)}), bars(p[i], q[i]))),
    make("div", {className: "bar"},
      make("code", {textContent: say("rest"), className: "quiet"}), bars(rest(p), rest(q))));
  $("position").hidden = false;
}

// Both models continue after another token, greedily.
async function whatIf(id) {
  const before = shown.ids.slice(0, seen.at), prompt = [...shown.prompt, ...before, id];
  const names = await vocabulary(pair()[0]);
  const lines = pair().map((model, i) => make("p", {},
    make("b", {className: ["teacher", "student"][i], textContent: say("continues", model)}),
    ...before.map(reader(names)), make("u", {textContent: nameOf(names, id)})));
  $("what-if").replaceChildren(...lines);
  $("what-if").hidden = false;
  $("what-if").scrollIntoView({block: "nearest"});      // on a phone it lies below the numbers
  const body = {prompt, max_tokens: 64, temperature: 0, logprobs: 0, return_tokens_as_token_ids: true};
  await Promise.all(pair().map(async (model, i) => {
    const next = reader(names);
    [...before, id].forEach(next);
    for await (const choice of stream("/v1/completions", {model, ...body})) {
      const texts = choice.logprobs.tokens.map(name => next(+name.slice("token_id:".length)));
      lines[i].append(...texts.map(text => isSpecial(text) ? make("small", {textContent: ` ${text}`}) : text));
    }
  }));
}

let slid = null;
$("soften").oninput = () => {
  $("soften-value").textContent = (+$("soften").value).toFixed(1);
  attempt(showPosition);
  clearTimeout(slid);
  slid = setTimeout(() => { if (shown) attempt(colour); }, 200);
};
$("teacher").onchange = $("student").onchange = () => attempt(async () => {
  if (!shown) return;
  await colour();
  await choose(shown.at);
});

// -- 5. Training ------------------------------------------------------------------------------------

const USUAL = ["loss", "ce", "kd", "val_kl", "val_agreement", "val_loss", "val_accuracy", "lr", "tokens_per_s"];
const COLOURS = ["var(--teacher)", "var(--student)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
let files = {}, quantities = null;
const rowsOf = {};          // {path of a run's log: its rows}

const checked = () => [...document.querySelectorAll("#run-list input:checked")].map(box => box.value);
const read = path => askJSON(`/v1/page/files/${path.split("/").map(encodeURIComponent).join("/")}`);

// Once at first, then every two seconds: what has changed in out/?
async function refresh() {
  const found = await askJSON("/v1/page/files"), before = files;
  const changed = Object.keys(found).filter(path => found[path] !== before[path]);
  files = found;
  const [logs, tables] = [".jsonl", ".md"].map(end => Object.keys(found).filter(path => path.endsWith(end)));
  const boxes = [...document.querySelectorAll("#run-list input")];
  const picked = boxes.length ? checked() : logs.slice(0, 1);
  if (boxes.map(box => box.value).join() !== logs.join() || !logs.length) {
    $("run-list").replaceChildren($("run-list").firstElementChild, ...logs.map(path => make("label", {},
      make("input", {type: "checkbox", value: path, checked: picked.includes(path),
        onchange: () => attempt(showRuns)}),
      ` ${path.slice(0, -".jsonl".length)}`)));
    if (!logs.length) $("run-list").append(make("p", {className: "quiet", textContent: say("no_runs")}));
  }
  for (const box of document.querySelectorAll("#run-list input"))
    box.parentElement.classList.toggle("live", box.value in before && changed.includes(box.value));
  changed.forEach(path => delete rowsOf[path]);
  if (changed.some(path => logs.includes(path))) await showRuns();
  if (changed.some(path => tables.includes(path))) {
    const table = $("table-list").value;
    $("table-list").replaceChildren(...tables.map(path =>
      make("option", {textContent: path, selected: path === table})));
    await showTable();
  }
}

async function showRuns() {
  const paths = checked();
  for (const path of paths) rowsOf[path] ??= await read(path);
  const has = name => paths.some(path => rowsOf[path].some(row => Number.isFinite(row[name])));
  const all = paths.flatMap(path => rowsOf[path].flatMap(Object.keys));
  const names = new Set(all.filter(name => name !== "step" && has(name)));
  const others = [...names].filter(name => !USUAL.includes(name)).sort();
  const known = [...USUAL.filter(name => names.has(name)), ...others];
  quantities ??= ["loss", "kd", "val_kl", "val_agreement", "lr", "tokens_per_s"].filter(name => names.has(name));
  if ([...$("quantities").children].map(label => label.textContent.trim()).join() !== known.join())
    $("quantities").replaceChildren(...known.map(name => make("label", {},
      make("input", {type: "checkbox", checked: quantities.includes(name), onchange: event => {
        quantities = event.target.checked ? [...quantities, name] : quantities.filter(each => each !== name);
        attempt(showRuns);
      }}), ` ${name}`)));
  $("charts").replaceChildren(...known.filter(name => quantities.includes(name)).map(name => chart(name, paths)));
  const samples = paths.flatMap(path => rowsOf[path].filter(row => row.sample).slice(-5).reverse().map(row =>
    make("p", {}, make("small", {textContent: `${path.slice(0, -".jsonl".length)}, ${say("step")} ${row.step}: `}),
      make("code", {textContent: row.sample}))));
  $("samples").hidden = !samples.length;
  $("samples").replaceChildren(make("h3", {textContent: say("samples")}), ...samples);
}

const W = 320, H = 180, LEFT = 56, RIGHT = 10, TOP = 8, BOTTOM = 24;
const short = value =>
  Math.abs(value) >= 10000 ? Math.round(value).toLocaleString("en")
    : value && Math.abs(value) < 0.001 ? value.toExponential(1) : `${+value.toPrecision(3)}`;

// One quantity of several runs. The pointer reads values off; otherwise the last ones are shown.
function chart(quantity, paths) {
  const curves = paths.map(path => [...new Map(rowsOf[path].filter(row => Number.isFinite(row[quantity]))
    .map(row => [row.step, row[quantity]]))]);          // of two rows of a step, the later one
  const xs = curves.flat().map(([x]) => x), ys = curves.flat().map(([, y]) => y);
  const [first, last, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const place = ([x, y]) => [
    LEFT + (W - LEFT - RIGHT) * (x - first) / (last - first || 1),
    TOP + (H - TOP - BOTTOM) * (high - y) / (high - low || 1)];
  const lines = curves.map((curve, i) => {
    const steps = curve.map((point, n) => `${n ? "L" : "M"}${place(point).map(v => v.toFixed(1))}`);
    const path = draw("path", {d: steps.join("") + (curve.length === 1 ? "h0.01" : "")});     // a dot
    path.style.stroke = COLOURS[i % COLOURS.length];
    return path;
  });
  const label = (x, y, text, anchor) => draw("text", {x, y, "text-anchor": anchor}, text);
  const cursor = draw("line", {y1: TOP, y2: H - BOTTOM, visibility: "hidden"}), legend = make("div");
  const readAt = step => legend.replaceChildren(...curves.map((curve, i) => {
    const point = curve.findLast(([x]) => x <= step) ?? curve[0];
    const line = make("small", {}, `${paths[i].slice(0, -".jsonl".length)}: `,
      make("b", {textContent: point ? short(point[1]) : "–"}),
      Number.isFinite(step) && point ? ` (${say("step")} ${point[0]})` : "");
    line.style.color = COLOURS[i % COLOURS.length];
    return line;
  }));
  const picture = draw("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": quantity},
    draw("line", {x1: LEFT, y1: H - BOTTOM, x2: W - RIGHT, y2: H - BOTTOM}),
    draw("line", {x1: LEFT, y1: TOP, x2: LEFT, y2: H - BOTTOM}),
    label(LEFT - 4, TOP + 8, short(high), "end"), label(LEFT - 4, H - BOTTOM, short(low), "end"),
    label(LEFT, H - 8, `${first}`, "start"), label(W - RIGHT, H - 8, `${say("step")} ${last}`, "end"),
    cursor, ...lines);
  picture.onpointermove = event => {
    const box = picture.getBoundingClientRect(), under = (event.clientX - box.left) * W / box.width;
    const x = Math.min(W - RIGHT, Math.max(LEFT, under));
    for (const [name, value] of [["x1", x], ["x2", x], ["visibility", "visible"]]) cursor.setAttribute(name, value);
    readAt(first + (last - first) * (x - LEFT) / (W - LEFT - RIGHT));
  };
  picture.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); readAt(Infinity); };
  readAt(Infinity);
  return make("figure", {className: "card chart"}, make("h3", {textContent: quantity}), picture, legend);
}

// Tables of Markdown, of which a file may have several.
async function showTable() {
  $("tables").hidden = !$("table-list").value;
  if ($("tables").hidden) return;
  const text = await read($("table-list").value);
  const tables = text.split(/\n\s*\n/).filter(block => block.startsWith("|")).map(block => {
    const lines = block.split("\n").filter(line => line.startsWith("|") && !/^\|[-:| ]+\|$/.test(line));
    return make("table", {}, ...lines.map((line, n) => make("tr", {}, ...line.split("|").slice(1, -1).map(cell =>
      make(n ? "td" : "th", {textContent: cell.trim().replaceAll("**", "")})))));
  });
  $("table").replaceChildren(...tables.map(table => make("div", {className: "card scroll"}, table)));
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
  if (tab === "runs") attempt(refresh);
  if (tab === "tokens" && !shown && newest) attempt(() => explain(newest));
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
  attempt(async () => {
    await showPosition();
    await showRuns();
  });
};
const root = document.documentElement.style;
root.colorScheme = localStorage.getItem("theme") ?? "";
$("theme").onclick = () => {
  const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.colorScheme);
};
setInterval(() => { if (!$("runs").hidden && !keyGiven) attempt(refresh); }, 2000);

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
