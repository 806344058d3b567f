// On every page: times in the reader's zone, parts that are asked for again, questions before acts.

const EVERY_MS = 2000;
const PATIENCE_MS = 10000;

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const dayless = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

export function tellTimes(within = document) {
  const today = new Date().toDateString();
  for (const time of within.querySelectorAll("time:not([title])")) {
    const at = new Date(time.dateTime);
    time.title = time.textContent;
    time.textContent = (at.toDateString() === today ? dayless : clock).format(at);
  }
}

// That the server does not answer, or does again.
export function cutOff(lost) {
  document.getElementById("lost").hidden = !lost;
}

export function say(words) {
  document.getElementById("said").textContent = words;
}

// A part of a page, or null while it is what it was; without a key any more: to the sign in.
export async function part(url, etag) {
  const headers = { "x-fragment": "1", ...(etag ? { "if-none-match": etag } : {}) };
  const answer = await fetch(url, { headers, signal: AbortSignal.timeout(PATIENCE_MS * 6) });
  if (answer.status === 401) location.assign("/login?next=" + encodeURIComponent(location.pathname + location.search));
  if (answer.status === 304) return null;
  if (!answer.ok) throw new Error("status " + answer.status);
  return { html: await answer.text(), etag: answer.headers.get("etag") };
}

// The part comes from our own templates, escaped there; focus and what was open stay.
export function put(holder, html) {
  const focused = holder.contains(document.activeElement) ? document.activeElement.id : "";
  const open = [...holder.querySelectorAll("details")].map((each) => each.open);
  holder.innerHTML = html;
  holder.querySelectorAll("details").forEach((each, place) => { each.open = open[place] ?? each.open; });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  tellTimes(holder);
}

function selecting(holder) {
  const selection = getSelection();
  return !selection.isCollapsed && holder.contains(selection.anchorNode);
}

class Refreshed {
  constructor(holder) {
    this.holder = holder;
    this.etag = null;
    this.timer = 0;
    this.next();
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.look(); });
  }

  get ended() {
    return this.holder.querySelector("[data-ended]")?.dataset.ended === "yes";
  }

  next() {
    clearTimeout(this.timer);
    if (!this.ended) this.timer = setTimeout(() => this.look(), EVERY_MS);
  }

  async look() {
    clearTimeout(this.timer);
    if (document.hidden) return; // looked at again when it is seen
    try {
      const news = selecting(this.holder) ? null : await part(this.holder.dataset.refresh, this.etag);
      cutOff(false);
      if (news) this.show(news);
    } catch {
      cutOff(true);
    }
    this.next();
  }

  show(news) {
    const before = this.holder.querySelector("[data-state]")?.dataset.state;
    this.etag = news.etag;
    put(this.holder, news.html);
    const now = this.holder.querySelector("[data-state]")?.dataset;
    if (now && now.state !== before) say(`${now.name} is now ${now.state}`);
    this.holder.dispatchEvent(new CustomEvent("refreshed", { bubbles: true }));
  }
}

export const refreshed = new Map();
tellTimes();
for (const holder of document.querySelectorAll("[data-refresh]")) refreshed.set(holder.id, new Refreshed(holder));

const dialog = document.getElementById("ask");
let asked = null;

function ask(button) {
  asked = button.dataset.act;
  dialog.querySelector("h2").textContent = button.dataset.title;
  dialog.querySelector(".what").textContent = button.dataset.what;
  dialog.querySelector(".fault").textContent = "";
  const yes = dialog.querySelector(".yes");
  yes.textContent = button.dataset.yes ?? button.textContent;
  yes.classList.toggle("danger", button.classList.contains("danger"));
  yes.disabled = false;
  dialog.showModal();
}

async function act() {
  const yes = dialog.querySelector(".yes");
  yes.disabled = true;
  const job = document.getElementById("status").dataset.refresh.replace(/^\/jobs\/(.*)\/status$/, "$1");
  try {
    const answer = await fetch(`/api/jobs/${job}/${asked}`, {
      method: "POST", headers: { "content-type": "application/json" }, body: "{}",
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    dialog.close();
    await refreshed.get("status").look();
  } catch (error) {
    dialog.querySelector(".fault").textContent = error.message;
    yes.disabled = false;
  }
}

if (dialog) {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-act]");
    if (button) ask(button);
  });
  dialog.querySelector(".yes").addEventListener("click", act);
}
