// Searching the catalog, and the history that is put together from it.

import { getJson } from "./api.js";
import { byId, counted, make, unseen } from "./dom.js";

const DELAY = 200; // milliseconds after the last key
const SHOWN = 50;

/** The catalog's items whose titles hold what is typed, as buttons that call `choose(item)`. */
export function catalogSearch(choose, failed) {
  const query = byId("query");
  const hits = byId("hits");
  let timer = 0;
  let running = null;

  async function search() {
    running?.abort();
    running = new AbortController();
    const { signal } = running;
    const text = query.value.trim();
    try {
      const asked = new URLSearchParams({ query: text, limit: SHOWN + 1 });
      const { items } = await getJson(`v1/items?${asked}`, { signal });
      if (!signal.aborted) show(text, items);
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
    }
  }

  function show(text, items) {
    const few = items.slice(0, SHOWN);
    hits.replaceChildren(...few.map(({ id, fields }) => hit({ id, title: fields.title })));
    hits.scrollTop = 0;
    const more = items.length > SHOWN;
    if (!text) byId("found").textContent = more ? `The first ${SHOWN} items` : "All items";
    else if (!few.length) byId("found").textContent = "No title holds this.";
    else byId("found").textContent = more ? `The first ${SHOWN} found` : `${few.length} found`;
  }

  function hit(item) {
    const button = make("button", { type: "button" }, unseen("Add "), item.title);
    if (String(item.id) !== item.title) {
      button.append(make("span", { className: "id" }, ` ${item.id}`));
    }
    button.addEventListener("click", () => choose(item));
    return make("li", {}, button);
  }

  query.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, DELAY);
  });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault(); // looks again, and asks for no recommendation
      clearTimeout(timer);
      search();
    } else if (event.key === "ArrowDown") {
      event.preventDefault();
      hits.querySelector("button")?.focus();
    }
  });
  hits.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = [...hits.querySelectorAll("button")];
    const place = buttons.indexOf(document.activeElement) + step;
    (place < 0 ? query : buttons[place])?.focus();
  });
  search();
}

/** The list of what the user bought. `events()` is what the server is sent. */
export class HistoryList {
  constructor() {
    this.entries = [];
    this.list = byId("history");
    byId("clear").addEventListener("click", () => this.clear());
    this.show();
  }

  add(item) {
    this.entries.push({ ...item, rating: "" });
    this.show();
    this.list.scrollTop = this.list.scrollHeight;
    this.say(`Added ${item.title}; ${counted(this.entries.length, "item")}.`);
  }

  remove(place) {
    const [gone] = this.entries.splice(place, 1);
    this.show();
    const next = Math.min(place, this.entries.length - 1);
    if (next < 0) byId("query").focus();
    else this.button(next, "remove").focus();
    this.say(`Removed ${gone.title}; ${counted(this.entries.length, "item")}.`);
  }

  move(place, step) {
    const target = place + step;
    const [entry] = this.entries.splice(place, 1);
    this.entries.splice(target, 0, entry);
    this.show();
    const same = this.button(target, step < 0 ? "up" : "down");
    (same.disabled ? this.button(target, step < 0 ? "down" : "up") : same).focus();
    this.say(`${entry.title} is now number ${target + 1} of ${this.entries.length}.`);
  }

  clear() {
    this.entries = [];
    this.show();
    byId("query").focus();
    this.say("The history is empty.");
  }

  events() {
    return this.entries.map(({ id, rating }) =>
      rating === "" ? { item: id } : { item: id, rating: Number(rating) },
    );
  }

  button(place, action) {
    return this.list.children[place].querySelector(`[data-action="${action}"]`);
  }

  say(text) {
    byId("history-said").textContent = text;
  }

  show() {
    this.list.replaceChildren(...this.entries.map((entry, place) => this.row(entry, place)));
    byId("clear").hidden = !this.entries.length;
    byId("history-hint").hidden = this.entries.length > 0;
  }

  row(entry, place) {
    const { title } = entry;
    const last = this.entries.length - 1;
    const rating = make("input", {
      type: "number",
      step: "any",
      value: entry.rating,
      placeholder: "Rating",
      "aria-label": `Rating of ${title}, optional`,
    });
    rating.addEventListener("input", () => {
      entry.rating = rating.value;
    });
    const control = (action, sign, label, disabled, act) => {
      const button = make("button", { type: "button", disabled, "data-action": action }, sign);
      button.setAttribute("aria-label", label);
      button.title = label;
      button.addEventListener("click", act);
      return button;
    };
    return make(
      "li",
      {},
      make("span", { className: "title" }, title),
      make(
        "span",
        { className: "controls" },
        rating,
        control("up", "↑", `Move ${title} up`, place === 0, () => this.move(place, -1)),
        control("down", "↓", `Move ${title} down`, place === last, () => this.move(place, 1)),
        control("remove", "×", `Remove ${title}`, false, () => this.remove(place)),
      ),
    );
  }
}
