// A request's text as it comes, choice by choice, until it has ended.

import { cutOff, part, put, say } from "./page.js";
import { visible } from "./text.js";

const choices = document.getElementById("choices");
const id = choices.dataset.request;

const article = (choice) => choices.querySelector(`[data-choice="${choice}"]`);

const waiting = new Map();
const calling = new Set();
let framed = false;

function arrived(choice, text) {
  if (!article(choice) || !text) return;
  waiting.set(choice, (waiting.get(choice) ?? "") + text);
  if (!framed) requestAnimationFrame(show);
  framed = true;
}

function show() {
  framed = false;
  for (const [choice, text] of waiting) {
    const holder = article(choice).querySelector(".text");
    const low = holder.scrollHeight - holder.scrollTop - holder.clientHeight < 24;
    holder.append(visible(text));
    if (low) holder.scrollTop = holder.scrollHeight;
  }
  waiting.clear();
}

function told(chunk) {
  for (const { index, delta, finish_reason: reason } of chunk.choices) {
    arrived(index, delta.content);
    const calls = delta.tool_calls ?? (delta.function_call ? [{ index: 0, function: delta.function_call }] : []);
    for (const call of calls) {
      if (call.function.name) arrived(index, (calling.has(index) ? ")\n" : "") + call.function.name + "(");
      calling.add(index);
      arrived(index, call.function.arguments);
    }
    if (reason) {
      if (calling.has(index) && reason !== "length") arrived(index, ")");
      article(index)?.classList.remove("live");
    }
  }
}

const AGAIN_MS = 2000;

function live() {
  const source = new EventSource(`/api/requests/${id}/stream`);
  let begun = false;
  calling.clear();
  source.onopen = () => cutOff(false);
  source.onerror = () => {
    cutOff(true);
    // Cut off it goes on by itself; refused (the server was not ready) it does not.
    if (source.readyState === EventSource.CLOSED) setTimeout(again, AGAIN_MS);
  };
  source.onmessage = (event) => {
    if (event.data === "[DONE]") return void ended(source);
    if (!begun) {
      choices.querySelectorAll(".text").forEach((each) => each.replaceChildren());
      showState().catch(() => {});
    }
    begun = true;
    const chunk = JSON.parse(event.data);
    if (chunk.choices) told(chunk);
  };
  choices.querySelectorAll(".choice").forEach((each) => each.classList.add("live"));
}

async function again() {
  try {
    await showState(); // without a key any more: to the sign in
    live();
  } catch {
    setTimeout(again, AGAIN_MS);
  }
}

async function showState() {
  const state = await part(`/requests/${id}/state`);
  if (state) put(document.getElementById("state"), state.html);
}

async function ended(source) {
  source.close();
  const news = await part(`/requests/${id}/choices?choice=${choices.dataset.first}`);
  if (news) put(choices, news.html);
  await showState();
  choices.dataset.live = "no";
  say(`The request has ended: ${document.getElementById("state").textContent.trim()}`);
}

if (choices.dataset.live === "yes") live();
