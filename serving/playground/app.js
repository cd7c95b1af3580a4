// The playground: a page over the gateway's public API. Everything that comes from a model or from data goes into text
// nodes, never into markup; the key stays in this tab (sessionStorage) and goes to this server only.
"use strict";
(() => {
  const ROOT = new URL("../", location.href);  // the gateway, whatever path it is served under
  const KEY = "ray-ft-key";
  const LARGEST_SIDE = 1536;  // pixels; models see less, and the body of a request is limited
  const LARGEST_FILE = 1 << 20;
  const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];

  const $ = (id) => document.getElementById(id);
  const make = (tag, cls, text) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const button = (text, action) => {
    const node = make("button", "plain small", text);
    node.type = "button";
    node.addEventListener("click", action);
    return node;
  };

  let models = [];      // as GET /v1/models lists them
  let turns = [];       // {text, image, reference, answers: {model: answer}, node}
  let picture = null;   // data: URL that goes with the next question
  let running = new Set();  // AbortControllers of answers under way
  let lastRequest = null;   // {path, body} of the newest one, for curl

  // ---------------------------------------------------------------------------------------------------- the key

  const takeKeyFromAddress = () => {
    const found = /^#key=(.+)$/.exec(location.hash);
    if (!found) return false;
    let key = found[1];
    try { key = decodeURIComponent(key); } catch { /* not encoded */ }
    sessionStorage.setItem(KEY, key);
    history.replaceState(null, "", location.pathname + location.search);
    return true;
  };
  const key = () => sessionStorage.getItem(KEY) || "";
  const headers = () => ({ "content-type": "application/json", ...(key() && { authorization: `Bearer ${key()}` }) });

  const showKeyPanel = (shown) => {
    $("key-panel").hidden = !shown;
    $("key-button").setAttribute("aria-expanded", String(shown));
    if (shown) $("key").focus();
  };

  // ------------------------------------------------------------------------------------------------------ errors

  class Failed extends Error {
    constructor(message, status) { super(message); this.status = status; }
  }

  const LOST = "The connection to the server was lost.";

  const failure = async (response) => {
    let said = "";
    try { said = (await response.json()).error?.message || ""; } catch { /* not the gateway's own answer */ }
    const wait = response.headers.get("retry-after");
    const known = {
      400: "The server refused the request.",
      401: "This server wants an API key.",
      403: "This API key is not valid here.",
      404: "The server does not know this model, or no longer.",
      413: "The request is too large for this server.",
      429: "Too many requests with this key.",
      503: "The model has no room for this request at the moment.",
    };
    const parts = [known[response.status] || `The server answered with status ${response.status}.`];
    if (said && response.status !== 401 && response.status !== 403) parts.push(`It said: “${said}”.`);
    if (wait && !/again in/.test(said)) parts.push(`Try again in ${wait} s.`);
    return new Failed(parts.join(" "), response.status);
  };

  const request = async (path, options = {}) => {
    let response;
    try {
      response = await fetch(new URL(path, ROOT), { headers: headers(), cache: "no-store", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failed(LOST);
    }
    if (!response.ok) throw await failure(response);
    return response;
  };

  const notice = (text) => {
    $("notice").textContent = text;
    $("notice").hidden = !text;
  };

  const report = (error) => {
    if (error.status === 401 || error.status === 403) showKeyPanel(true);
    return error instanceof Failed ? error.message : `${LOST} (${error.message})`;
  };

  // ------------------------------------------------------------------------------------------------------ models

  const model = () => models.find((one) => one.id === $("model").value);
  const about = (id) => models.find((one) => one.id === id)?.ray_ft || {};

  const loadModels = async () => {
    try {
      models = (await (await request("v1/models")).json()).data;
    } catch (error) {
      models = [];
      notice(report(error));
    }
    const before = $("model").value;
    $("model").replaceChildren(...models.map((one) => {
      const option = make("option", "", one.id);
      option.value = one.id;
      return option;
    }));
    if (models.some((one) => one.id === before)) $("model").value = before;
    $("model").disabled = $("send").disabled = models.length === 0;
    if (models.length) { notice(""); showKeyPanel(false); }
    await choose();
  };

  const choose = async () => {
    const chosen = model();
    const facts = chosen?.ray_ft || {};
    const other = models.some((one) => one.id === facts.compare) ? facts.compare : null;
    $("compare-box").hidden = !other;
    if (!other) $("compare").checked = false;
    $("file-box").hidden = !facts.vision;
    if (!facts.vision) dropPicture();
    const generates = facts.kind !== "classify";
    for (const node of document.querySelectorAll(".generate-only")) node.hidden = !generates;
    for (const node of document.querySelectorAll(".chat-only")) node.hidden = !generates || !facts.chat;
    $("text").placeholder = generates
      ? `${facts.chat ? "Your question" : "A text to be continued"} (Enter sends, Shift+Enter begins a line)`
      : "A text to be classified (Enter sends, Shift+Enter begins a line)";
    $("max-tokens").max = facts.max_model_len || "";
    $("about").textContent = [
      facts.run && facts.run !== chosen.id && `run ${facts.run}`,
      facts.run && facts.step != null && `step ${facts.step}`,
      facts.base && `from ${facts.base}`,
      facts.max_model_len && `context ${facts.max_model_len.toLocaleString("en")} tokens`,
    ].filter(Boolean).join(" · ");
    await loadExamples();
  };

  const loadExamples = async () => {
    let found = [];
    const asked = model()?.id;
    if (asked) {
      try {
        found = (await (await request(`playground/examples?model=${encodeURIComponent(asked)}`)).json()).examples;
      } catch (error) {
        if (error.status !== 404) notice(report(error));
      }
    }
    if (model()?.id !== asked) return;  // another was chosen meanwhile
    $("examples").hidden = found.length === 0;
    $("example-list").replaceChildren(...found.map((example) => {
      const item = make("li");
      const ask = make("button", "example");
      ask.append(make("span", "", lastText(example.prompt)));
      ask.type = "button";
      ask.title = example.origin || "";
      ask.addEventListener("click", () => askExample(example));
      item.append(ask);
      return item;
    }));
  };

  const textOf = (content) => (typeof content === "string" ? content
    : (content || []).filter((part) => part.type === "text").map((part) => part.text).join("\n"));
  const lastText = (prompt) => (typeof prompt === "string" ? prompt : textOf(prompt[prompt.length - 1]?.content));

  const askExample = (example) => {
    if (running.size) return;
    anew();
    const messages = typeof example.prompt === "string" ? [{ role: "user", content: example.prompt }] : example.prompt;
    $("system").value = messages.filter((one) => one.role === "system").map((one) => textOf(one.content)).join("\n");
    const rest = messages.filter((one) => one.role !== "system");
    for (let at = 0; at + 1 < rest.length; at += 2) {  // earlier turns, with the answers that the row holds
      const turn = addTurn(textOf(rest[at].content));
      showAnswer(turn, model().id, { text: textOf(rest[at + 1].content), given: true });
    }
    const turn = addTurn(lastText(example.prompt), null, example.reference);
    answer(turn);
  };

  // ------------------------------------------------------------------------------------------------ conversation

  const addTurn = (text, image = null, reference = undefined) => {
    const node = make("article", "turn");
    const question = make("div", "question");
    question.append(make("h2", "unseen", "Question"), make("p", "text", text));
    if (image) {
      const shown = make("img");
      shown.src = image;
      shown.alt = "Image of this question";
      question.append(shown);
    }
    const turn = { text, image, reference, answers: {}, node, sides: make("div", "sides") };
    const actions = make("div", "actions");
    actions.append(button("Edit", () => edit(turn)), button("Answer again", () => again(turn)));
    question.append(actions);
    node.append(question, turn.sides);
    turns.push(turn);
    $("talk").append(node);
    $("empty").hidden = true;
    return turn;
  };

  const showReference = (turn) => {
    if (turn.reference === undefined || turn.sides.querySelector(".reference")) return;
    const side = make("section", "side reference");
    side.append(make("h3", "", "Reference"), make("p", "text", turn.reference));
    turn.sides.append(side);
  };

  const side = (turn, name) => {
    const node = make("section", "side");
    node.setAttribute("aria-busy", "true");
    const heading = make("h3", "", name);
    const content = make("p", "text");
    const stats = make("p", "stats quiet");
    node.append(heading, content, stats);
    const before = turn.sides.querySelector(".reference");
    turn.sides.insertBefore(node, before);
    return { node, content, stats };
  };

  const showAnswer = (turn, name, answered) => {
    turn.answers[name] = answered;
    const shown = side(turn, answered.given ? "Answer of the row" : name);
    shown.content.textContent = answered.text;
    shown.node.setAttribute("aria-busy", "false");
  };

  const truncate = (turn) => {
    const at = turns.indexOf(turn);
    for (const gone of turns.splice(at)) gone.node.remove();
    $("empty").hidden = turns.length > 0;
  };

  const edit = (turn) => {
    if (running.size) return;
    truncate(turn);
    $("text").value = turn.text;
    setPicture(turn.image);
    $("text").focus();
  };

  const again = (turn) => {
    if (running.size) return;
    const after = turns[turns.indexOf(turn) + 1];
    if (after) truncate(after);
    turn.answers = {};
    turn.sides.replaceChildren();
    answer(turn);
  };

  const anew = () => {
    for (const one of running) one.abort();
    if (turns.length) truncate(turns[0]);
  };

  // What one model is asked in a turn: the conversation before it with that model's own answers, where it has any.
  const asked = (turn, name) => {
    const facts = about(name);
    const body = { model: name };
    if (facts.kind === "classify") return { path: "v1/classify", body: { ...body, input: turn.text } };
    body.temperature = Number($("temperature").value);
    const most = parseInt($("max-tokens").value, 10);
    if (most > 0) body.max_tokens = most;
    Object.assign(body, { stream: true, stream_options: { include_usage: true } });
    if (!facts.chat) return { path: "v1/completions", body: { ...body, prompt: turn.text } };
    const messages = [];
    if ($("system").value.trim()) messages.push({ role: "system", content: $("system").value });
    for (const one of turns.slice(0, turns.indexOf(turn) + 1)) {
      messages.push({ role: "user", content: one.image && facts.vision
        ? [{ type: "image_url", image_url: { url: one.image } }, { type: "text", text: one.text }] : one.text });
      const given = one.answers[name] || Object.values(one.answers)[0];
      if (one !== turn) messages.push({ role: "assistant", content: given?.text || "" });
    }
    return { path: "v1/chat/completions", body: { ...body, messages } };
  };

  const answer = async (turn) => {
    const names = [model().id];
    if ($("compare").checked) names.unshift(about(names[0]).compare);
    showReference(turn);
    notice("");
    const asks = names.map((name) => asked(turn, name));  // before any of the answers is there
    lastRequest = asks[asks.length - 1];
    const streams = names.map((name, at) => stream(turn, name, asks[at]));
    toBottom();
    await Promise.all(streams);
  };

  const stream = async (turn, name, { path, body }) => {
    const shown = side(turn, name);
    const answered = turn.answers[name] = { text: "" };
    const control = new AbortController();
    running.add(control);
    busy();
    const began = performance.now();
    const text = document.createTextNode("");
    shown.content.append(text);
    let first = null, usage = null, finish = null, ended = false, pieces = 0;
    try {
      const response = await request(path, { method: "POST", body: JSON.stringify(body), signal: control.signal });
      if (!body.stream) {
        showLabels(shown, await response.json(), began);
        return;
      }
      for await (const event of events(response.body)) {
        if (event === "[DONE]") { ended = true; break; }
        const chunk = JSON.parse(event);
        if (chunk.error) throw new Failed(`The answer broke off. The server said: “${chunk.error.message}”.`);
        if (chunk.usage) usage = chunk.usage;
        const choice = chunk.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? "";
        if (choice?.finish_reason) finish = choice.finish_reason;
        if (!piece) continue;
        first ??= performance.now();
        pieces += 1;
        answered.text += piece;
        const low = atBottom();
        text.appendData(piece);
        if (low) toBottom();
      }
      if (!ended) throw new Failed("The connection was lost before the answer was complete.");
      if (!answered.text) shown.content.append(make("em", "quiet", "(an empty answer)"));
      else if (!answered.text.trim()) shown.content.append(make("em", "quiet", "(white space alone)"));
      if (finish === "length") shown.stats.append(make("span", "cut", "cut off at the longest answer"), " · ");
      shown.stats.append(figures(usage, pieces, began, first, performance.now()));
    } catch (error) {
      if (control.signal.aborted) {
        shown.stats.append("stopped");
      } else {
        const failed = make("p", "failed", error instanceof Failed ? report(error)
          : "The connection was lost before the answer was complete.");
        failed.setAttribute("role", "alert");
        const low = atBottom();
        shown.node.append(failed);
        if (low) toBottom();
      }
    } finally {
      running.delete(control);
      shown.node.setAttribute("aria-busy", "false");
      if (shown.stats.childNodes.length === 0) shown.stats.remove();
      busy();
    }
  };

  // The data of server-sent events, as they come.
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }

  const figures = (usage, pieces, began, first, end) => {
    const parts = [];
    if (usage) parts.push(`${usage.prompt_tokens} → ${usage.completion_tokens} tokens`);
    if (first !== null) parts.push(`first after ${Math.round(first - began)} ms`);
    // Tokens that came at once, such as those of one character that had to be complete, came at no rate.
    if (usage?.completion_tokens > 1 && pieces > usage.completion_tokens / 2 && end > first) {
      parts.push(`${((usage.completion_tokens - 1) / (end - first) * 1000).toFixed(1)} tokens/s`);
    }
    return parts.join(" · ");
  };

  const showLabels = (shown, found, began) => {
    const { label, probabilities } = found.data[0];
    shown.content.replaceWith(make("p", "label", label));
    const list = make("dl", "labels");
    for (const [name, share] of Object.entries(probabilities).sort((a, b) => b[1] - a[1])) {
      const bar = make("progress");
      bar.max = 1; bar.value = share;
      bar.setAttribute("aria-hidden", "true");
      const value = make("dd", "");
      value.append(bar, make("span", "share", `${(share * 100).toFixed(1)}%`));
      list.append(make("dt", "", name), value);
    }
    shown.node.insertBefore(list, shown.stats);
    shown.stats.append(`answered after ${Math.round(performance.now() - began)} ms`);
  };

  const busy = () => {
    $("stop").hidden = running.size === 0;
    $("send").hidden = running.size > 0;
    for (const node of document.querySelectorAll(".actions button, .example")) node.disabled = running.size > 0;
  };

  const toBottom = () => scrollTo({ top: document.documentElement.scrollHeight });
  const atBottom = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 60;

  // ------------------------------------------------------------------------------------------------------ images

  const setPicture = (url) => {
    picture = url;
    $("picture").hidden = !url;
    if (url) $("picture-shown").src = url; else $("picture-shown").removeAttribute("src");
  };
  const dropPicture = () => { setPicture(null); $("file").value = ""; };

  const readFile = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

  const addPicture = async (file) => {
    try {
      const image = await createImageBitmap(file);
      const scale = Math.min(1, LARGEST_SIDE / Math.max(image.width, image.height));
      if (scale === 1 && file.size <= LARGEST_FILE && AS_THEY_ARE.includes(file.type)) {
        setPicture(await readFile(file));
        return;
      }
      const canvas = make("canvas");
      canvas.width = Math.round(image.width * scale);
      canvas.height = Math.round(image.height * scale);
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      setPicture(canvas.toDataURL("image/jpeg", 0.9));
    } catch {
      dropPicture();
      notice(`${file.name} is no image that this browser can read.`);
    }
  };

  // -------------------------------------------------------------------------------------------------------- curl

  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

  const curl = ({ path, body }) => [
    `curl ${quoted(new URL(path, ROOT).href)}`,
    `-H "Authorization: Bearer $RAY_FT_API_KEY"`,
    `-H 'Content-Type: application/json'`,
    ...(body.stream ? ["--no-buffer"] : []),
    `-d ${quoted(JSON.stringify(body))}`,
  ].join(" \\\n  ");

  const copy = async () => {
    if (!model()) return;
    const draft = $("text").value.trim();
    let asks = lastRequest;
    if (draft || !asks) {  // what would be sent now
      const turn = { text: draft || "Hello", image: picture, answers: {} };
      turns.push(turn);
      asks = asked(turn, model().id);
      turns.pop();
    }
    $("curl-text").value = curl(asks);
    $("curl-said").textContent = "";
    $("curl").showModal();
    $("curl-text").select();
    try {
      await navigator.clipboard.writeText($("curl-text").value);
      $("curl-said").textContent = "Copied.";
    } catch {  // only pages over HTTPS, or of this machine, may
      $("curl-said").textContent = "Copy the selected text.";
    }
  };

  // ------------------------------------------------------------------------------------------------------ wiring

  const send = () => {
    const text = $("text").value.trim();
    if (running.size || !model() || (!text && !picture)) return;
    const turn = addTurn(text, picture);
    $("text").value = "";
    dropPicture();
    answer(turn);
  };

  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("stop").addEventListener("click", () => { for (const one of running) one.abort(); });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("curl").open) for (const one of running) one.abort();
  });
  $("anew").addEventListener("click", () => { anew(); lastRequest = null; $("text").focus(); });
  $("model").addEventListener("change", () => { anew(); lastRequest = null; choose(); });
  $("temperature").addEventListener("input", () => { $("temperature-shown").textContent = $("temperature").value; });
  $("file").addEventListener("change", () => { if ($("file").files[0]) addPicture($("file").files[0]); });
  $("picture-drop").addEventListener("click", dropPicture);
  $("copy").addEventListener("click", copy);
  $("key-button").addEventListener("click", () => showKeyPanel($("key-panel").hidden));
  $("key-panel").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("key").value.trim());
    $("key").value = "";
    loadModels();
  });
  $("key-forget").addEventListener("click", () => { sessionStorage.removeItem(KEY); loadModels(); });
  addEventListener("hashchange", () => { if (takeKeyFromAddress()) loadModels(); });

  if (matchMedia("(max-width: 60rem)").matches) for (const node of document.querySelectorAll("aside details")) node.open = false;
  takeKeyFromAddress();
  loadModels();
})();
