// The job's page: why it waits, its sweep's grid, its errors, and tokens per second since the page was opened.

import { lines } from "./charts.js";
import { part, put } from "./page.js";

const LEAST_PAUSE_MS = 5000;
const KEPT = 300;
const MOST_LINES = 8;

const status = document.getElementById("status");
const now = () => status.querySelector("[data-state]").dataset;

// Asked for at once and, while the job goes on, again: the longer it took, the more seldom.
class Fetched {
  constructor(section, shown) {
    this.section = section;
    this.holder = section.querySelector(".fetched");
    this.url = section.dataset.fetch;
    this.shown = shown;
    this.etag = null;
    this.timer = 0;
    this.look();
  }

  async look() {
    clearTimeout(this.timer);
    const began = performance.now();
    const ended = now().ended === "yes"; // asked before: what ends meanwhile is looked at once more
    try {
      const news = document.hidden || this.busy ? null : await part(this.url, this.etag);
      if (news) {
        this.etag = news.etag;
        put(this.holder, news.html);
        this.shown(this.holder);
      }
    } catch { /* page.js says when the server is away */ }
    const pause = Math.max(LEAST_PAUSE_MS, 10 * (performance.now() - began));
    if (!ended || !this.etag) this.timer = setTimeout(() => this.look(), pause);
  }

  get busy() { // somebody is in it: a cell or a list is not taken from under their hands
    return this.holder.contains(document.activeElement);
  }
}

const waiting = document.getElementById("waiting");
if (waiting) new Fetched(waiting, () => {});

const grid = document.getElementById("sweep");
if (grid) {
  const fetched = new Fetched(grid, drawLines);
  grid.addEventListener("change", async (event) => {
    const form = event.target.closest("form");
    if (!form) return;
    const name = event.target.name;
    const asked = new URLSearchParams(new FormData(form));
    fetched.url = grid.dataset.fetch + "?" + asked;
    const news = await part(fetched.url);
    fetched.etag = news.etag;
    put(fetched.holder, news.html);
    drawLines(fetched.holder);
    grid.querySelector(`[name="${CSS.escape(name)}"]`)?.focus();
  });
  grid.addEventListener("submit", (event) => event.preventDefault());
  grid.addEventListener("keydown", walk);
  grid.addEventListener("focusin", read);
  grid.addEventListener("pointerover", read);
  grid.addEventListener("click", (event) => event.target.closest("td[data-said]")?.focus());
}

function cells(table) {
  return [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
}

function walk(event) {
  const cell = event.target.closest("td[data-said]");
  if (!cell) return;
  const all = cells(cell.closest("table"));
  let y = all.findIndex((row) => row.includes(cell));
  let x = all[y].indexOf(cell);
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-x, 0], End: [all[y].length, 0] };
  if (event.key === "Enter") return void document.querySelector("#cell-said a")?.click();
  if (!steps[event.key]) return;
  event.preventDefault();
  x = Math.max(0, Math.min(all[y].length - 1, x + steps[event.key][0]));
  y = Math.max(0, Math.min(all.length - 1, y + steps[event.key][1]));
  cell.tabIndex = -1;
  all[y][x].tabIndex = 0;
  all[y][x].focus();
}

function read(event) {
  const cell = event.target.closest("td[data-said]");
  if (!cell) return;
  const said = document.getElementById("cell-said");
  said.textContent = cell.dataset.said;
  const link = document.createElement("a");
  link.href = `${said.dataset.requests}?point=${cell.dataset.points}`;
  link.textContent = "its requests";
  if (cell.dataset.points && cell.dataset.points.length < 200) said.append(link);
}

// Lines besides the cells, where the parameter across is a number with three values or more.
function drawLines(holder) {
  const table = holder.querySelector("table.heat");
  const first = table?.querySelector("td");
  if (!first) return;
  first.tabIndex = 0;
  const chart = holder.querySelector(".lines");
  const xs = [...table.querySelectorAll("th[data-x]")].map((each) => Number(each.dataset.x));
  const rows = [...table.tBodies[0].rows];
  if (table.dataset.numbers !== "yes" || xs.length < 3 || rows.length > MOST_LINES) return;
  const order = xs.map((_, place) => place).sort((a, b) => xs[a] - xs[b]);
  const series = rows.map((row) => {
    const means = [...row.querySelectorAll("td")].map((each) => (each.dataset.mean === undefined ? null : Number(each.dataset.mean)));
    return { label: row.querySelector("th").textContent, values: order.map((place) => means[place]) };
  });
  const values = series.flatMap((each) => each.values).filter((each) => each !== null);
  if (!values.length) return;
  chart.hidden = false;
  // Scores over the same range as the colours.
  const scores = table.dataset.measure !== "length" && values.every((each) => each >= 0 && each <= 1);
  lines(chart, order.map((place) => xs[place]), series, scores ? { low: 0, high: 1 } : {});
}

const errors = document.getElementById("errors");
let grouped = null;
function groupErrors() {
  const failed = Number(now().failed);
  errors.hidden = errors.hidden && !failed;
  if (!failed) return;
  if (!grouped) grouped = new Fetched(errors, () => {});
}
groupErrors();

const pace = document.getElementById("pace");
const seen = { at: [], tokens: [], rate: [] };
function keepPace() {
  groupErrors();
  if (!pace) return;
  const at = Date.now() / 1000, tokens = Number(now().tokens);
  if (seen.at.length) {
    const seconds = at - seen.at.at(-1);
    seen.rate.push(Math.max(0, (tokens - seen.tokens.at(-1)) / seconds));
  } else seen.rate.push(null);
  seen.at.push(at);
  seen.tokens.push(tokens);
  for (const each of Object.values(seen)) if (each.length > KEPT) each.shift();
  pace.hidden = seen.at.length < 4;
  if (!pace.hidden) lines(pace.querySelector(".chart"), seen.at, [{ label: "tokens/s", values: seen.rate }], { time: true, height: 150, low: 0 });
}
keepPace();
status.addEventListener("refreshed", keepPace);
