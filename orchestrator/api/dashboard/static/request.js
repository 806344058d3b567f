// A request's page: its text as it comes, and its tokens with what the model nearly said instead.

import { cutOff, part, put, say } from "./page.js";
import { element, visible } from "./text.js";

const choices = document.getElementById("choices");
const id = choices.dataset.request;
const first = Number(choices.dataset.first);

const article = (choice) => choices.querySelector(`[data-choice="${choice}"]`);

// ---- live text -------------------------------------------------------------------------------

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
  const news = await part(`/requests/${id}/choices?choice=${first}`);
  if (news) put(choices, news.html);
  await showState();
  choices.dataset.live = "no";
  say(`The request has ended: ${document.getElementById("state").textContent.trim()}`);
}

if (choices.dataset.live === "yes") live();

// ---- tokens ----------------------------------------------------------------------------------

const asTokens = document.getElementById("as-tokens");
const asText = document.getElementById("as-text");

async function fetchTokens(holder, start) {
  const choice = holder.closest(".choice").dataset.choice;
  const news = await part(`/requests/${id}/tokens?choice=${choice}&start=${start}`);
  const more = element("template");
  more.innerHTML = news.html; // from our own template, escaped there
  holder.querySelector(".more")?.remove();
  holder.append(more.content);
}

async function switchTo(tokens) {
  asTokens.setAttribute("aria-pressed", tokens);
  asText.setAttribute("aria-pressed", !tokens);
  for (const holder of choices.querySelectorAll(".tokens")) {
    if (tokens && !holder.childElementCount) await fetchTokens(holder, 0);
    holder.hidden = !tokens;
    holder.parentElement.querySelector(".text").hidden = tokens;
  }
}

asTokens?.addEventListener("click", () => switchTo(true));
asText?.addEventListener("click", () => switchTo(false));
if (asTokens && choices.dataset.live !== "yes") switchTo(true);

choices.addEventListener("click", (event) => {
  const more = event.target.closest(".more");
  if (more) fetchTokens(more.parentElement, more.dataset.start);
});

choices.addEventListener("keydown", (event) => {
  const token = event.target.closest(".tk");
  if (event.key === "Escape") hint.hidden = true;
  if (!token) return;
  const to = { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling }[event.key];
  if (!to) return;
  event.preventDefault();
  if (to.matches(".tk")) {
    token.tabIndex = -1;
    to.tabIndex = 0;
  }
  to.focus();
});

// ---- what it nearly said ----------------------------------------------------------------------

const hint = document.getElementById("hint");
const SVG = "http://www.w3.org/2000/svg";

function meter(share) {
  const svg = document.createElementNS(SVG, "svg"), rect = document.createElementNS(SVG, "rect");
  svg.setAttribute("class", "meter");
  svg.setAttribute("viewBox", "0 0 100 1");
  svg.setAttribute("preserveAspectRatio", "none");
  rect.setAttribute("width", 100 * share);
  rect.setAttribute("height", 1);
  svg.append(rect);
  return svg;
}

// Ends of lines and blanks at the ends, which nobody would see.
function marked(text) {
  const blanks = text.replace(/^ +| +$/g, (found) => "␣".repeat(found.length));
  return blanks.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function row(text, logprob, chosen) {
  const share = Math.exp(Math.min(0, logprob));
  const words = element("td", "", visible(marked(text)));
  const percent = share >= 0.001 ? (100 * share).toFixed(1) + "%" : "<0.1%";
  return element("tr", chosen ? "chosen" : "", words, element("td", "", percent), element("td", "", meter(share)));
}

function hintAt(token) {
  const top = JSON.parse(token.dataset.top);
  const table = element("table");
  if (!top.some((each) => each[2])) table.append(row(token.textContent, Number(token.dataset.lp), true));
  for (const [text, logprob, chosen] of top) table.append(row(text, logprob, chosen));
  hint.replaceChildren(table);
  hint.hidden = false;
  const at = token.getClientRects()[0], size = hint.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8));
  const above = at.bottom + 8 + size.height > innerHeight;
  const y = above ? Math.max(8, at.top - size.height - 6) : at.bottom + 6;
  hint.style.transform = `translate(${left}px, ${y}px)`;
  const said = top.map(([text, logprob]) => `${text} ${(100 * Math.exp(logprob)).toFixed(1)}%`).join(", ");
  token.setAttribute("aria-label", `${token.textContent}, ${token.dataset.of}. ${said}`);
}

for (const [kind, on] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
  choices.addEventListener(kind, (event) => {
    const token = event.target.closest(".tk");
    if (token && on) hintAt(token);
    else if (!on) hint.hidden = true;
  });
}
addEventListener("scroll", () => { hint.hidden = true; }, { capture: true, passive: true });
