// The playground: an ordinary client of the OpenAI API of this server, which measures what it sees.

const form = document.getElementById("playground");
const talk = document.getElementById("talk");
const measured = (name, value) => { document.getElementById(`m-${name}`).textContent = value; };
const say = (text) => { document.getElementById("announce").textContent = text; };
let messages = [];
let controller = null;

function turn(kind, who) {
  document.getElementById("talk-empty")?.remove();
  const element = document.createElement("div");
  element.className = `turn ${kind}`;
  element.append(document.createElement("b"), document.createElement("div"));
  element.firstChild.textContent = who;
  talk.append(element);
  return element;
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of response.body) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

const isChat = (values) => values.get("mode") === "chat";

function body(values, prompt) {
  const request = { model: form.dataset.model, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) if (values.get(name) !== "") request[name] = Number(values.get(name));
  if (isChat(values)) { messages.push({ role: "user", content: prompt }); request.messages = messages; } else request.prompt = prompt;
  return [isChat(values) ? "/v1/chat/completions" : "/v1/completions", request];
}

async function generate() {
  const values = new FormData(form);
  const prompt = values.get("prompt");
  const trouble = document.getElementById("trouble");
  trouble.replaceChildren();
  const style = isChat(values) ? "" : " mono";
  turn(`user${style}`, form.dataset.you).lastChild.textContent = prompt;
  const answer = turn(`streaming${style}`, form.dataset.model);
  for (const name of ["ttft", "rate", "tokens", "finish", "version"]) measured(name, "–");
  document.getElementById("send").disabled = true;
  document.getElementById("stop").disabled = false;
  controller = new AbortController();
  const began = performance.now();
  let first = 0, text = "", tokens = 0, usage = null, scheduled = false;
  const paint = () => {
    scheduled = false;
    const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    answer.lastChild.textContent = text;
    if (atEnd) talk.scrollTop = talk.scrollHeight;
    if (first && tokens > 1) measured("rate", ((tokens - 1) / ((performance.now() - first) / 1000)).toFixed(1));
    if (tokens) measured("tokens", usage ? `${usage.prompt_tokens} + ${usage.completion_tokens}` : `≥ ${tokens}`);
  };
  try {
    const [path, request] = body(values, prompt);
    const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal: controller.signal });
    if (!response.ok) throw new Error((await response.json()).error?.message ?? `${response.status} ${response.statusText}`);
    for await (const event of events(response)) {
      const choice = event.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece || (choice && !first && choice.finish_reason)) {
        if (!first) { first = performance.now(); measured("ttft", `${Math.round(first - began)} ms`); }
        text += piece;
        tokens += 1;
      }
      if (choice?.finish_reason) measured("finish", choice.finish_reason);
      if (event.system_fingerprint) measured("version", event.system_fingerprint);
      if (event.usage) { usage = event.usage; tokens = usage.completion_tokens; }
      if (!scheduled) { scheduled = true; requestAnimationFrame(paint); }
    }
    say(form.dataset.done);
  } catch (error) {
    if (error.name === "AbortError") { measured("finish", form.dataset.stopped); say(form.dataset.stopped); } else {
      const notice = document.createElement("p");
      notice.className = "notice bad";
      notice.textContent = `${form.dataset.broken} ${error.message}`;
      trouble.append(notice);
    }
  } finally {
    paint();
    if (isChat(values)) messages.push({ role: "assistant", content: text });
    answer.classList.remove("streaming");
    document.getElementById("send").disabled = false;
    document.getElementById("stop").disabled = true;
    controller = null;
  }
}
form.addEventListener("submit", (event) => { event.preventDefault(); if (!controller) generate(); });
form.prompt.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
document.getElementById("stop").addEventListener("click", () => controller?.abort());
document.getElementById("clear").addEventListener("click", () => { messages = []; talk.replaceChildren(); form.prompt.focus(); });
