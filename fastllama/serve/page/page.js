// The page of `fastllama serve`. Above the line "The page": pure functions, which tests/serve/test_page_js.py runs in node.

/** A request that got no answer, or a broken one. message: for the reader, without its last full stop. */
export class Failure extends Error {
  constructor(message, { status = 0, code = "", seconds = 0 } = {}) {
    super(message.replace(/\.$/, "")); // more sentences may follow
    Object.assign(this, { status, code, seconds });
  }
}

/** The data of server-sent events. body: a ReadableStream of bytes, whose chunks may end anywhere. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event without its empty line was cut off: it does not count
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop(); // it goes on in the next chunk
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // else a comment (": ping"), or a field that this API does not use
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The messages to send: the system prompt, and the turns from index start that have text. */
export function messagesOf(turns, start, system) {
  const said = turns.slice(start).filter((turn) => turn.content);
  const messages = said.map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

/** Where the turns start once the oldest question and its answer are dropped; -1 if only the last question is left. */
export function nextStart(turns, start) {
  return turns.findIndex((turn, index) => index > start && turn.role === "user");
}

/** A text in pieces, {text, code, language}: lines between ``` are code, and an empty line beside them is their margin. */
export function pieces(text) {
  const found = [];
  let lines = [];
  let code = false;
  let language = "";
  const close = (last) => {
    if (!code && found.length && lines[0] === "") lines.shift();
    if (!code && !last && lines.at(-1) === "") lines.pop();
    if (lines.length) found.push({ text: lines.join("\n"), code, language });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = line.match(/^ {0,3}```\s*([^`]*)$/);
    if (fence && !(code && fence[1])) {
      close(false);
      code = !code;
      language = code ? fence[1].trim() : "";
    } else {
      lines.push(line);
    }
  }
  close(true);
  return found;
}

/** What is said below an answer. first, last: seconds from sending to the first and the last text. */
export function facts({ usage, reason, first, last }) {
  const said = [];
  const tokens = usage?.completion_tokens ?? 0;
  if (tokens) said.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (tokens > 1 && last > first) said.push(`${((tokens - 1) / (last - first)).toFixed(1)} tokens/s`);
  if (first > 0) said.push(`first after ${first.toFixed(2)} s`);
  if (reason === "length") said.push("cut at the length limit");
  else if (reason !== "stop" && reason) said.push(`ended by ${reason}`);
  return said.join(" · ");
}

/** The failure that an answer without success reports. */
export async function failureOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // what stands between this page and the server may answer in its own way
  }
  const { status } = response;
  const seconds = Number(response.headers.get("retry-after")) || 0;
  let message = error.message || `the server answers with status ${status}`;
  if (status === 401) message += ". Enter the API key in the settings";
  if (status === 429) message += `. Try again in ${seconds || 1} s`;
  return new Failure(message, { status, code: error.code, seconds });
}

/** Resolves after some seconds; rejects at once when the signal aborts. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal.addEventListener("abort", stop, { once: true });
  });
}

/** Fetches, and waits as long as the server loads its model. Yields {waiting: seconds}, returns the Response. */
export async function* patient(send, signal, wait = pause) {
  for (;;) {
    let response;
    try {
      response = await send();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new Failure("the server cannot be reached");
    }
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (failure.status !== 503 || failure.code !== "loading") throw failure;
    const seconds = Math.min(Math.max(failure.seconds, 1), 30);
    yield { waiting: seconds };
    await wait(seconds, signal);
  }
}

/**
 * Asks for the answer to the last of the turns. send(messages) is a fetch.
 * Yields {waiting: seconds} while the model loads, {start} when old turns had to be dropped, {text} as it comes, and
 * at the end {reason, usage}. Throws Failure, also for a stream that ends without saying so, or what the signal aborts with.
 */
export async function* answer({ turns, start, system, send, signal, wait = pause }) {
  let response;
  while (!response) {
    try {
      response = yield* patient(() => send(messagesOf(turns, start, system)), signal, wait);
    } catch (error) {
      const next = error.code === "context_length_exceeded" ? nextStart(turns, start) : -1;
      if (next < 0) throw error;
      yield { start: (start = next) };
    }
  }
  let reason = null;
  let usage = null;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        yield { reason, usage };
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(chunk.error.message, { code: chunk.error.code });
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
  }
  throw new Failure("the connection ended before the answer did: what stands here is not all of it");
}

/** 32 hexadecimal digits; crypto.randomUUID is missing where a page comes without TLS from another machine. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- The page -------------------------------------------------------------------------------------------------------

/** A JSON value in one of the browser's stores, which may be switched off or full. */
function stored(store, name) {
  try {
    return JSON.parse(globalThis[store].getItem(name));
  } catch {
    return null;
  }
}

function keep(store, name, value) {
  try {
    globalThis[store].setItem(name, JSON.stringify(value));
  } catch {
    // the conversation then lasts as long as the page
  }
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Shows a text, and leaves alone the nodes that are right already: a selection survives the next token. */
function showText(content, text) {
  const wanted = pieces(text);
  wanted.forEach((piece, index) => {
    const tag = piece.code ? "PRE" : "SPAN";
    let node = content.children[index];
    if (node?.tagName !== tag) {
      const made = element(tag, "");
      if (node) node.replaceWith(made);
      else content.append(made);
      node = made;
    }
    if (node.textContent !== piece.text) node.textContent = piece.text;
    if (piece.language) node.dataset.language = piece.language;
  });
  while (content.children.length > wanted.length) content.lastElementChild.remove();
}

function startPage() {
  const byId = (id) => document.getElementById(id);
  const log = byId("log");
  const prompt = byId("prompt");
  const fields = { system: byId("system"), temperature: byId("temperature"), length: byId("length") };
  const key = byId("key");

  const fresh = () => ({ session: newId(), turns: [], start: 0 });
  let conversation = stored("localStorage", "fastllama.conversation") ?? fresh();
  let running = null; // the AbortController of the answer that is coming

  const save = () => keep("localStorage", "fastllama.conversation", conversation);
  const headers = () => (key.value ? { authorization: `Bearer ${key.value}` } : {});

  function send(messages, signal) {
    const body = { messages, stream: true, stream_options: { include_usage: true } };
    body.temperature = Number(fields.temperature.value);
    if (fields.length.valueAsNumber >= 1) body.max_tokens = Math.floor(fields.length.valueAsNumber);
    return fetch("/v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json", "x-session-id": conversation.session },
      body: JSON.stringify(body),
      signal,
    });
  }

  const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const toEnd = () => log.scrollTo(0, log.scrollHeight);

  function showTurn(turn) {
    const article = element("article", turn.role);
    article.append(element("h2", "", turn.role === "user" ? "You" : "Model"));
    const content = element("div", "content");
    showText(content, turn.content);
    article.append(content);
    log.append(article);
    showNotes(article, turn);
    return article;
  }

  function showNotes(article, turn) {
    for (const old of article.querySelectorAll(".facts, .failure")) old.remove();
    if (turn.facts) article.append(element("p", "facts", turn.facts));
    if (turn.dropped) article.append(element("p", "facts", "The context is full: the model no longer sees the oldest messages."));
    if (!turn.failure) return;
    const failure = element("p", "failure", `${turn.failure[0].toUpperCase()}${turn.failure.slice(1)}.`);
    const again = element("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      if (running || conversation.turns.at(-1) !== turn) return;
      conversation.turns.pop();
      article.remove();
      reply();
    });
    failure.append(again);
    article.append(failure);
  }

  function showAll() {
    for (const article of log.querySelectorAll("article")) article.remove();
    conversation.turns.forEach(showTurn);
    byId("empty").hidden = conversation.turns.length > 0;
    toEnd();
  }

  function setRunning(controller) {
    running = controller;
    byId("send").hidden = Boolean(controller);
    byId("stop").hidden = !controller;
  }

  /** Lets the model answer the last turn. */
  async function reply() {
    const controller = new AbortController();
    const { signal } = controller;
    const current = conversation; // another one may have begun when this one's answer ends
    const turn = { role: "assistant", content: "" };
    const asked = { turns: [...current.turns], start: current.start, system: fields.system.value };
    current.turns.push(turn);
    const article = showTurn(turn);
    const content = article.querySelector(".content");
    article.setAttribute("aria-busy", "true");
    toEnd();
    setRunning(controller);

    let drawing = 0;
    const draw = () => {
      const follow = atEnd();
      showText(content, turn.content);
      drawing = 0;
      if (follow) toEnd();
    };
    let began = performance.now();
    const times = { first: 0, last: 0 };
    try {
      for await (const step of answer({ ...asked, send: (messages) => send(messages, signal), signal })) {
        if (step.waiting) {
          turn.facts = `The model is loading. Trying again in ${step.waiting} s.`;
          showNotes(article, turn);
          began = performance.now() + step.waiting * 1000;
        } else if (step.start) {
          current.start = step.start;
          turn.dropped = true;
        } else if (step.text) {
          times.last = (performance.now() - began) / 1000;
          times.first ||= times.last;
          if (turn.facts) {
            turn.facts = ""; // that it was loading
            showNotes(article, turn);
          }
          turn.content += step.text;
          drawing ||= requestAnimationFrame(draw);
        } else {
          turn.facts = facts({ ...step, ...times });
          // "length" before the length that was asked for: the context is full
          const full = step.reason === "length" && !(step.usage?.completion_tokens >= fields.length.valueAsNumber);
          const next = full ? nextStart(current.turns, current.start) : -1;
          if (next > 0) {
            current.start = next;
            turn.dropped = true;
          }
        }
      }
    } catch (error) {
      turn.facts = signal.aborted ? "stopped" : "";
      if (!signal.aborted) turn.failure = error.message;
      if (error.status === 401) askForKey();
    }
    cancelAnimationFrame(drawing);
    draw();
    article.setAttribute("aria-busy", "false");
    const follow = atEnd();
    showNotes(article, turn);
    if (follow) toEnd();
    if (current === conversation) {
      setRunning(null);
      save();
    }
  }

  function say(text) {
    if (!text.trim() || running) return;
    const turn = { role: "user", content: text };
    conversation.turns.push(turn);
    byId("empty").hidden = true;
    showTurn(turn);
    save();
    reply();
  }

  function askForKey() {
    byId("settings").open = true;
    key.focus();
  }

  async function showModel() {
    const shown = byId("model");
    try {
      const { signal } = new AbortController();
      const steps = patient(() => fetch("/v1/models", { headers: headers() }), signal);
      let step;
      while (!(step = await steps.next()).done) shown.textContent = "loading the model …";
      const [model] = (await step.value.json()).data;
      shown.textContent = `${model.id} · context of ${model.max_model_len} tokens`;
      shown.title = model.id;
    } catch (error) {
      shown.textContent = error.status === 401 ? "needs an API key" : error.message;
    }
  }

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    const text = prompt.value;
    prompt.value = "";
    prompt.focus();
    say(text);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  const stop = () => running?.abort();
  byId("stop").addEventListener("click", () => {
    stop();
    prompt.focus();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  byId("forget").addEventListener("click", () => {
    stop();
    setRunning(null);
    conversation = fresh();
    save();
    showAll();
    prompt.focus();
  });
  byId("show-limits").addEventListener("click", () => (byId("limits").open = true));

  const settings = stored("localStorage", "fastllama.settings") ?? {};
  for (const [name, field] of Object.entries(fields)) {
    field.value = settings[name] ?? field.value;
    field.addEventListener("input", () => {
      settings[name] = field.value;
      keep("localStorage", "fastllama.settings", settings);
      byId("temperature-shown").textContent = fields.temperature.value;
    });
  }
  byId("temperature-shown").textContent = fields.temperature.value;
  key.value = stored("sessionStorage", "fastllama.key") ?? "";
  key.addEventListener("input", () => keep("sessionStorage", "fastllama.key", key.value));
  key.addEventListener("change", showModel);

  addEventListener("pagehide", save);
  const last = conversation.turns.at(-1);
  if (last?.role === "assistant" && !last.facts) last.failure ??= "the page was left before the answer ended";

  const wide = matchMedia("(min-width: 800px)").matches;
  byId("settings").open = wide;
  byId("limits").open = wide;
  showAll();
  showModel();
  prompt.focus();

  const given = new URLSearchParams(location.search).get("prompt");
  if (given) {
    history.replaceState(null, "", location.pathname); // a reload does not ask again
    say(given);
  }
}

if (typeof document !== "undefined") startPage();
