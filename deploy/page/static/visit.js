// The panel "Be a user": recommendations of the real replica, something done with one of them, and what that changed.
const byId = (id) => document.getElementById(id);
const CALL = { method: "POST", headers: { "Content-Type": "application/json", "X-Headrace-Page": "1" } };
const LABELS = { click: "Click", watch: "Watch to the end", purchase: "Buy" };
const DID = { click: "clicked", watch: "watched to the end", purchase: "bought" };
const ms = (x) => Math.round(x).toLocaleString("en") + " ms";

let kinds = [];
let shown = null; // the page that is on the screen: {request_id, items}
let asked = null;
let turn = 0; // of the last thing that was asked for: what comes of earlier ones is not drawn any more

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const say = (text) => { byId("visit-result").textContent = text; };

async function post(path, body) {
  const answer = await fetch(path, { ...CALL, body: JSON.stringify(body) });
  if (answer.ok) return answer;
  let detail = answer.statusText;
  try { detail = (await answer.json()).detail; } catch { /* no JSON: the status says it */ }
  throw new Error(detail);
}

// How an item moved against the page it was acted on: [mark, words]
function move(item, place, before) {
  if (!before) return ["", ""];
  const was = before.findIndex((other) => other.item === item.item);
  if (was < 0) return ["new", "new"];
  if (was === place) return ["", ""];
  return was > place ? [`▲ ${was - place}`, `up ${was - place}`] : [`▼ ${place - was}`, `down ${place - was}`];
}

function reasons(why) {
  const falls = Object.entries(why.features ?? {}).filter(([, fall]) => fall > 0).sort((a, b) => b[1] - a[1]).slice(0, 3);
  const words = falls.map(([name, fall]) => `${name} +${fall.toFixed(3)}`);
  return [...words, ...(why.rules ?? [])].join(", ") || "nothing stands out";
}

function row(item, place, before) {
  const [mark, words] = move(item, place, before);
  const about = [item.category, item.price == null ? null : item.price.toFixed(2), `click ${(100 * item.click).toFixed(1)} %`];
  const buttons = kinds.map((kind) => make("button", { type: "button", "data-kind": kind, "data-place": place,
    "aria-label": `${LABELS[kind] ?? kind}: ${item.title}` }, LABELS[kind] ?? kind));
  const line = make("li", { "data-item": item.item, ...(mark ? { class: mark === "new" ? "new" : "moved" } : {}) },
    make("div", { class: "line" }, make("p", { class: "item" }, make("b", {}, item.title), " ", make("span", { class: "about" }, about.filter((x) => x != null).join(" · ")),
      ...(mark ? [" ", make("span", { class: "mark", "aria-hidden": "true" }, mark), make("span", { class: "unseen" }, words)] : [])),
      make("p", { class: "acts" }, ...buttons)));
  if (item.why) line.append(make("details", {}, make("summary", {}, "Why", make("span", { class: "unseen" }, ` ${item.title} is here`)), make("p", {}, `The score falls without: ${reasons(item.why)}`)));
  return line;
}

// Draws a page; who has the focus on an item keeps it, wherever that has gone.
function draw(page, before = null) {
  const list = byId("visit-list"), held = document.activeElement;
  const item = list.contains(held) ? held.closest("li").dataset.item : null, kind = held?.dataset?.kind;
  const open = new Set([...list.querySelectorAll("details[open]")].map((node) => node.closest("li").dataset.item));
  shown = page;
  list.replaceChildren(...page.items.map((one, place) => row(one, place, before)));
  for (const line of list.children) if (open.has(line.dataset.item) && line.querySelector("details")) line.querySelector("details").open = true;
  if (item != null) {
    const line = [...list.children].find((one) => one.dataset.item === item);
    (line?.querySelector(kind ? `[data-kind="${kind}"]` : "summary") ?? byId("visit-page")).focus();
  }
  byId("visit-page").hidden = false;
}

function changes(page, before) {
  const marks = page.items.map((item, place) => move(item, place, before)[1]);
  const fresh = marks.filter((mark) => mark === "new").length, moved = marks.filter(Boolean).length - fresh;
  if (!fresh && !moved) return "the list is the same";
  return [fresh ? `${fresh} new` : "", moved ? `${moved} moved` : ""].filter(Boolean).join(", ");
}

async function recommend(event) {
  event.preventDefault();
  const mine = ++turn;
  asked = { user: byId("visit-user").value.trim(), scenario: byId("visit-scenario").value, query: byId("visit-query").value.trim() };
  say("asking the replica …");
  try {
    const page = await (await post("/visit/recommend", asked)).json();
    if (mine !== turn) return;
    draw(page);
    byId("visit-heading").textContent = `For ${asked.user}`;
    say(page.items.length ? `${page.items.length} recommendations for ${asked.user}, by version ${page.model_version}.` : "The replica has nothing to recommend.");
  } catch (error) { say(`That did not work: ${error.message}.`); }
}

// The server-sent events of an answer to POST, which EventSource cannot ask for.
async function* news(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

function journey(item, kind) {
  const cells = { what: make("th", { scope: "row" }, `${DID[kind] ?? kind} ${item.title}`), sent: make("td", { class: "n" }, "…"), history: make("td", { class: "n" }, "…"), learned: make("td", { class: "n" }, "…") };
  byId("visit-journeys").tBodies[0].prepend(make("tr", {}, ...Object.values(cells)));
  while (byId("visit-journeys").tBodies[0].rows.length > 5) byId("visit-journeys").tBodies[0].lastElementChild.remove();
  byId("visit-done").hidden = false;
  return cells;
}

async function act(button) {
  const place = Number(button.dataset.place), kind = button.dataset.kind;
  const page = shown, item = page.items[place], mine = ++turn;
  const cells = journey(item, kind), began = performance.now();
  const parts = [`You ${DID[kind] ?? kind} ${item.title}.`];
  say(parts[0]);
  try {
    for await (const one of news(await post("/visit/act", { request_id: page.request_id, place, kind }))) {
      if (one.stage === "late") {
        for (const name of ["history", "learned"]) if (cells[name].textContent === "…") cells[name].textContent = "–";
        parts.push(`${one.why}.`);
        if (mine === turn) say(parts.join(" "));
        continue;
      }
      if (one.page && mine === turn) draw(one.page, page.items);
      const took = performance.now() - began;
      cells[one.stage].textContent = ms(took);
      cells[one.stage].dataset.ms = took;
      if (one.stage === "sent") continue;
      const stages = Object.entries(one.stages ?? {}).map(([name, at]) => `${name} ${ms(at)}`).join(", ");
      if (stages) cells.what.append(make("span", { class: "stages" }, stages));
      parts.push(one.stage === "history"
        ? `Your history is in the answer ${ms(took)} after it: ${changes(one.page, page.items)}.`
        : `The model has learned it ${ms(took)} after it (version ${one.version})${one.page ? ": " + changes(one.page, page.items) : ""}.`);
      if (mine === turn) say(parts.join(" "));
    }
  } catch (error) {
    for (const name of ["sent", "history", "learned"]) if (cells[name].textContent === "…") cells[name].textContent = "–";
    say(`That did not work: ${error.message}.`);
  }
}

async function begin() {
  const about = await (await fetch("/visit")).json();
  if (!about.open) return;
  kinds = about.kinds;
  byId("visit-scenario").replaceChildren(...about.scenarios.map((name) => make("option", name === "shelf" ? { selected: "" } : {}, name)));
  byId("visit-users").replaceChildren(...about.users.map((name) => make("option", { value: name })));
  byId("visit-user").value = about.users[0] ?? "";
  byId("visit-form").addEventListener("submit", recommend);
  byId("visit-new").addEventListener("click", () => {
    byId("visit-user").value = "visitor-" + crypto.randomUUID().slice(0, 8);
    byId("visit-form").requestSubmit();
  });
  byId("visit-list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) act(button);
  });
  if (about.watch_wait_ms) byId("visit-wait").textContent = `A watch is learned ${(about.watch_wait_ms / 1000).toLocaleString("en")} s later: a longer one may come.`;
  byId("visit").hidden = false;
}

begin();
