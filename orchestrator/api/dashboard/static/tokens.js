// A choice's tokens in colours, and what the model nearly said in the place of each.

import { part } from "./page.js";
import { element, visible } from "./text.js";

const choices = document.getElementById("choices");
const id = choices.dataset.request;
const hint = document.getElementById("hint");
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
