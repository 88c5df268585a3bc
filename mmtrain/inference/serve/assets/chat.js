// The chat page. It sends requests only to the API of its own server. Conversations and settings are stored in the browser.
// Text that a model or a person wrote is inserted into the page as text only, never as HTML.

const WORDS = {
  en: {
    new_chat: "New chat", conversations: "Conversations", settings: "Settings", messages: "Messages", message: "Message", send: "Send",
    stop: "Stop", close: "Close", system: "System prompt", temperature: "Temperature", repetition: "Repetition penalty",
    max_tokens: "Longest answer, tokens", seed: "Seed", random: "random", api_key: "API key", theme: "Theme", as_system: "As the system",
    light: "Light", dark: "Dark", language: "Language", defaults: "Back to the defaults", empty: "Ask anything. Answers come from the model on this machine.",
    copy: "Copy", copied: "Copied", edit: "Edit", save: "Save", save_hint: "Save this conversation as a row for mm pack", parameters: "parameters", window: "window", vocabulary: "vocabulary", again: "Answer again", thought: "Thinking", call: "Tool call", remove: "Delete",
    cut: "cut at the longest answer", stopped: "stopped", tokens: "tokens", offline: "The server does not answer. Is `mm serve` still running?",
    think: "Thinking", as_model: "As the model does", yes: "On", no: "Off",
    key_needed: "This server wants an API key: enter it in the settings.",
  },
  zh: {
    new_chat: "新对话", conversations: "对话记录", settings: "设置", messages: "消息", message: "输入消息", send: "发送",
    stop: "停止", close: "关闭", system: "系统提示词", temperature: "温度", repetition: "重复惩罚",
    max_tokens: "最长回答（token 数）", seed: "随机种子", random: "随机", api_key: "API 密钥", theme: "外观", as_system: "跟随系统",
    light: "浅色", dark: "深色", language: "语言", defaults: "恢复默认值", empty: "请提问。回答由本机上的模型生成。",
    copy: "复制", copied: "已复制", edit: "编辑", save: "保存", save_hint: "将此对话保存为 mm pack 可读的一行", parameters: "参数", window: "窗口", vocabulary: "词表", again: "重新回答", thought: "思考过程", call: "工具调用", remove: "删除",
    cut: "已达最长回答长度", stopped: "已停止", tokens: "token", offline: "服务器没有响应，mm serve 还在运行吗？",
    think: "思考", as_model: "由模型决定", yes: "开启", no: "关闭",
    key_needed: "此服务器需要 API 密钥：请在设置中填写。",
  },
};
const DEFAULTS = {
  system: "", temperature: 0.7, top_p: 0.9, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 512, seed: "", api_key: "", theme: "", think: "",
  language: navigator.language.startsWith("zh") ? "zh" : "en",
};

const $ = (id) => document.getElementById(id);
const kept = (name, otherwise) => {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
};
const keep = (name, value) => {
  try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* storage is full or forbidden: the page works without it */ }
};

let settings = { ...DEFAULTS, ...kept("mm.settings", {}) };
let conversations = kept("mm.conversations", []); // newest first: {id, messages: [{role, content, …}]}
let current = null;
let running = null; // AbortController of the answer being written
let model = {};

const t = (name) => WORDS[settings.language][name];

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, act) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// --- text with the Markdown that models write: code, bold, headings, lists, quotes, tables ------------------------------

function inline(into, text) {
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`[^`]+`$/.test(piece)) into.append(element("code", "", piece.slice(1, -1)));
    else if (/^\*\*[^*]+\*\*$/.test(piece)) into.append(element("strong", "", piece.slice(2, -2)));
    else if (piece) into.append(piece);
  }
}

function show(into, text) {
  into.replaceChildren();
  text.split(/^```[^\n]*\n?/m).forEach((block, i) => {
    if (i % 2) {
      const pre = element("pre");
      pre.append(element("code", "", block.replace(/\n$/, "")));
      into.append(pre);
    } else {
      markdown(into, block.split("\n"));
    }
  });
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const BORDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/; // the line below the headings of a table
const KINDS = [["heading", /^#{1,6}\s+(.*)$/], ["rule", /^\s*([-*_])(\s*\1){2,}\s*$/], ["item", ITEM], ["quote", /^>\s?(.*)$/]];

function kindOf(lines, i) {
  if (lines[i].includes("|") && lines[i + 1]?.includes("|") && BORDER.test(lines[i + 1])) return "table";
  return KINDS.find(([, pattern]) => pattern.test(lines[i]))?.[0] ?? (lines[i].trim() ? "text" : "");
}

function markdown(into, lines) {
  for (let i = 0; i < lines.length; ) {
    const kind = kindOf(lines, i), begin = i++;
    if (kind === "table") while (i < lines.length && lines[i].includes("|")) i++;
    else if (kind === "item") while (i < lines.length && (kindOf(lines, i) === "item" || /^\s+\S/.test(lines[i]))) i++;
    else if (kind === "text" || kind === "quote") while (i < lines.length && kindOf(lines, i) === kind) i++;
    const part = lines.slice(begin, i);
    if (kind === "heading") inline(into.appendChild(element("h3")), part[0].replace(/^#+\s+/, ""));
    else if (kind === "rule") into.append(element("hr"));
    else if (kind === "table") into.append(tableOf(part));
    else if (kind === "item") list(into, part);
    else if (kind) inline(into.appendChild(element(kind === "quote" ? "blockquote" : "p")), part.map((line) => (kind === "quote" ? line.replace(/^>\s?/, "") : line)).join("\n"));
  }
}

// Lines that are indented more than the first item belong to the item before them, as text or as a list inside it.
function list(into, lines) {
  const [, indent, mark] = lines[0].match(ITEM);
  const made = element(/\d/.test(mark) ? "ol" : "ul");
  if (/\d/.test(mark)) made.start = parseInt(mark);
  for (let i = 0; i < lines.length; ) {
    const item = element("li"), match = lines[i++].match(ITEM), inner = [];
    inline(item, match ? match[3] : lines[i - 1].trim());
    while (i < lines.length && !(lines[i].match(ITEM)?.[1].length <= indent.length)) inner.push(lines[i++]);
    if (inner.length) markdown(item, inner.map((line) => (ITEM.test(line) ? line : line.trim())));
    made.append(item);
  }
  into.append(made);
}

function tableOf([head, , ...rows]) {
  const table = element("table"), box = element("div", "table");
  [head, ...rows].forEach((row, i) => {
    const line = table.appendChild(element("tr"));
    for (const cell of row.trim().replace(/^\||\|$/g, "").split("|")) inline(line.appendChild(element(i ? "td" : "th")), cell.trim());
  });
  box.append(table);
  return box;
}

// --- messages -----------------------------------------------------------------------------------------------------------

class View {
  constructor(message) {
    this.message = message;
    this.root = element("article", `message ${message.role}`);
    this.before = element("div");
    this.said = element("div", "said");
    this.after = element("div");
    this.foot = element("div", "foot");
    this.root.append(this.before, this.said, this.after, this.foot);
    this.draw();
  }

  draw() {
    const { content, reasoning_content: thought, tool_calls: calls, error } = this.message;
    show(this.said, content ?? "");
    if (thought && !this.thought) {
      this.thought = element("details", "thought");
      this.thought.open = !content;
      this.thought.append(element("summary", "", t("thought")), element("div"));
      this.before.append(this.thought);
    }
    if (thought) this.thought.lastChild.textContent = thought;
    this.after.replaceChildren();
    for (const call of calls ?? []) {
      const box = element("div", "call");
      box.append(element("span", "", `${t("call")} `), element("code", "", `${call.function.name}(${call.function.arguments})`));
      this.after.append(box);
    }
    if (error) this.after.append(element("p", "wrong", error));
  }

  finish(isLast) {
    const { role, content, figures } = this.message;
    this.foot.replaceChildren();
    const copy = button(t("copy"), async () => {
      await navigator.clipboard?.writeText(content ?? "");
      copy.textContent = t("copied");
      setTimeout(() => (copy.textContent = t("copy")), 1200);
    });
    if (content && navigator.clipboard) this.foot.append(copy);
    if (role === "user") this.foot.append(button(t("edit"), () => edit(this.message)));
    if (role === "assistant" && isLast) this.foot.append(button(t("again"), again));
    if (figures) this.foot.append(element("span", "figures", figures));
  }
}

let views = [];

function draw() {
  const log = $("log");
  log.replaceChildren();
  views = (current?.messages ?? []).map((message) => new View(message));
  if (!views.length) {
    const proposed = element("div", "proposed");
    for (const prompt of model.prompts ?? []) proposed.append(button(prompt, () => { $("text").value = prompt; ask(); }));
    log.append(element("p", "empty", t("empty")), proposed);
  }
  views.forEach((view, i) => {
    view.finish(i === views.length - 1);
    log.append(view.root);
  });
  log.scrollTop = log.scrollHeight;
}

function drawList() {
  $("conversations").replaceChildren(
    ...conversations.map((conversation) => {
      const item = element("li", conversation === current ? "current" : "");
      const title = button(conversation.messages[0]?.content.slice(0, 80) || t("new_chat"), () => open(conversation));
      title.className = "title";
      const drop = button("✕", () => forget(conversation));
      drop.className = "drop";
      drop.setAttribute("aria-label", t("remove"));
      item.append(title, drop);
      return item;
    }),
  );
}

function open(conversation) {
  running?.abort();
  if (edited) { edited = null; $("text").value = ""; fit(); }
  current = conversation;
  closeSidebar();
  draw();
  drawList();
  $("text").focus();
}

function forget(conversation) {
  conversations = conversations.filter((other) => other !== conversation);
  keep("mm.conversations", conversations);
  if (conversation === current) open(null);
  else drawList();
}

// --- asking -------------------------------------------------------------------------------------------------------------

function request(messages) {
  const { system, temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed } = settings;
  const said = messages.map(({ role, content, reasoning_content, tool_calls }) => ({
    role, content: content ?? "", ...(reasoning_content && { reasoning_content }), ...(tool_calls?.length && { tool_calls }),
  }));
  return {
    model: model.id, stream: true, stream_options: { include_usage: true }, truncation: "auto", temperature, top_p, top_k, min_p, repetition_penalty, max_tokens,
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    ...(seed !== "" && { seed: Number(seed) }),
    ...(settings.think && model.knows_thinking && { chat_template_kwargs: { enable_thinking: settings.think === "yes" } }),
  };
}

function headers() {
  return settings.api_key ? { Authorization: `Bearer ${settings.api_key}` } : {};
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function complaint(response) {
  if (response.status === 401) return t("key_needed");
  try { return (await response.json()).error.message; } catch { return `HTTP ${response.status}`; }
}

async function answer() {
  const conversation = current;
  const message = { role: "assistant", content: "" };
  const body = request(conversation.messages);
  conversation.messages.push(message);
  draw();
  const view = views.at(-1);
  view.root.classList.add("writing");
  view.foot.replaceChildren();
  running = new AbortController();
  busy(true);
  const begun = performance.now();
  let first = 0;
  let frame = 0;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", signal: running.signal, headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body),
    });
    if (!response.ok) throw new Error(await complaint(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content) message.content += choice.delta.content;
      if (choice?.delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + choice.delta.reasoning_content;
      if (choice?.delta.tool_calls) (message.tool_calls ??= []).push(...choice.delta.tool_calls.map(({ index, ...call }) => call));
      if (choice?.finish_reason === "length") message.figures = t("cut");
      first ||= performance.now();
      if (event.usage) {
        const seconds = (performance.now() - begun) / 1000;
        const rate = event.usage.completion_tokens / Math.max(seconds, 0.001);
        message.figures = [message.figures, `${event.usage.completion_tokens} ${t("tokens")} · ${rate.toFixed(0)} tok/s`].filter(Boolean).join(" · ");
      }
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        const log = $("log");
        const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
        view.draw();
        if (isAtEnd) log.scrollTop = log.scrollHeight;
      });
    }
  } catch (error) {
    if (error.name === "AbortError") message.figures = t("stopped");
    else message.error = error instanceof TypeError ? t("offline") : error.message;
  }
  cancelAnimationFrame(frame);
  if (!message.content && !message.error && !message.tool_calls && !message.reasoning_content && message.figures === t("stopped")) conversation.messages.pop();
  running = null;
  busy(false);
  view.root.classList.remove("writing");
  remember(conversation);
  if (conversation === current) draw();
}

function remember(conversation) {
  if (!conversations.includes(conversation) && conversation === current) conversations.unshift(conversation);
  keep("mm.conversations", conversations.slice(0, 200));
  drawList();
}

function again() {
  if (running) return;
  if (current.messages.at(-1).role === "assistant") current.messages.pop();
  answer();
}

// The message to ask instead of, with all that follows it; nothing is lost until the new one is sent.
let edited = null;

function edit(message) {
  if (running) return;
  edited = message;
  $("text").value = message.content;
  fit();
  $("text").focus();
}

// Saves the conversation as one row of jsonl.
function save() {
  if (!current?.messages.length) return;
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const said = current.messages.filter((message) => !message.error).map(({ role, content, reasoning_content, tool_calls }) => ({
    role, content, ...(reasoning_content && { reasoning_content }), ...(tool_calls?.length && { tool_calls }),
  }));
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ messages: [...system, ...said] }) + "\n"], { type: "application/jsonl" }));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (!is) $("text").focus();
}

function ask() {
  const content = $("text").value.trim();
  if (!content || running) return;
  current ??= { id: crypto.randomUUID?.() ?? String(Math.random()), messages: [] };
  if (edited && current.messages.includes(edited)) current.messages.splice(current.messages.indexOf(edited));
  edited = null;
  if (current.messages.at(-1)?.error) current.messages.splice(-1); // a message that failed is not part of the conversation
  current.messages.push({ role: "user", content });
  $("text").value = "";
  fit();
  remember(current);
  answer();
}

// --- the frame ----------------------------------------------------------------------------------------------------------

function fit() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  $("send").disabled = !text.value.trim();
}

function closeSidebar() {
  $("sidebar").classList.remove("open");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
}

function apply() {
  const root = document.documentElement;
  root.lang = settings.language;
  if (settings.theme) root.dataset.theme = settings.theme;
  else delete root.dataset.theme;
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
  for (const node of document.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  $("save").title = t("save_hint");
  facts();
  for (const input of $("settings").querySelectorAll("[name]")) input.value = settings[input.name];
  if (!running) draw();
  drawList();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("text").addEventListener("input", fit);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => open(null));
$("save").addEventListener("click", save);
$("menu").addEventListener("click", () => {
  $("sidebar").classList.add("open");
  $("shade").hidden = false;
  $("menu").setAttribute("aria-expanded", "true");
});
$("shade").addEventListener("click", closeSidebar);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { closeSidebar(); if (edited) { edited = null; $("text").value = ""; fit(); } } });
$("tune").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("change", (event) => {
  const { name, type, value } = event.target;
  if (type === "number" && value === "" && name !== "seed") event.target.value = DEFAULTS[name];
  if (!event.target.reportValidity()) return;
  settings[name] = type === "number" && name !== "seed" ? Number(event.target.value) : event.target.value;
  keep("mm.settings", settings);
  apply();
  if (name === "api_key") meet();
});
$("defaults").addEventListener("click", () => {
  settings = { ...DEFAULTS };
  keep("mm.settings", settings);
  apply();
});

apply();
fit();

function facts() {
  if (!model.parameters) return;
  const millions = (model.parameters / 1e6).toFixed(1) + "M";
  $("facts").textContent = `${millions} ${t("parameters")} · ${t("window")} ${model.context_length.toLocaleString()} · ${t("vocabulary")} ${model.vocab_size.toLocaleString()}`;
}

async function meet() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await complaint(response));
    model = (await response.json()).data[0];
    $("model").textContent = model.id;
    facts();
    if (!views.length && !running) draw();
    $("think").hidden = !model.knows_thinking;
  } catch (error) {
    $("model").textContent = error instanceof TypeError ? t("offline") : error.message;
  }
}

meet();
