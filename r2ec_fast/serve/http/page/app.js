// The page: reads the form, asks the server, and shows what it answers as it comes.

import { getJson, postEvents, postJson, Problem } from "./api.js";
import { byId, counted, make } from "./dom.js";
import { catalogSearch, HistoryList } from "./history.js";
import { directTable, itemTable, measurements } from "./results.js";

const DEPTH = 100; // ranks of direct mode that changes are counted from
const MOST = 1000; // items the server gives

// fields of the API: what the page calls them, and the input they come from
const FIELDS = [
  [/^history\[(\d+)\]/, (place) => `History, item ${Number(place) + 1}`, null],
  [/^history/, () => "History", "query"],
  [/^user_id/, () => "User id", "user"],
  [/^k$/, () => "Items", "k"],
  [/^max_reasoning_tokens/, () => "Longest reasoning", "longest"],
  [/^query/, () => "Search the catalog", "query"],
];

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

const setStatus = (text) => {
  byId("status").textContent = text;
};

function scroll(element, block) {
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block, behavior: still ? "auto" : "smooth" });
}

function showError(error) {
  const box = byId("error");
  const parts = [error.message];
  if (error.field) {
    parts[0] = error.message.replace(`${error.field}: `, "");
    const known = FIELDS.find(([pattern]) => pattern.test(error.field));
    const name = known ? known[1](error.field.match(known[0])[1]) : error.field;
    parts.unshift(make("strong", {}, name), ": ");
    const input = known?.[2] && byId(known[2]);
    if (input) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-errormessage", "error");
      input.addEventListener("input", () => input.removeAttribute("aria-invalid"), { once: true });
    }
  }
  box.replaceChildren(make("p", {}, ...parts));
  scroll(box, "nearest");
}

function forgetErrors() {
  byId("error").replaceChildren();
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
  }
}

/** The reasoning as it is written; screen readers are told a sentence at a time. */
class Reasoning {
  constructor(shown) {
    this.unsaid = "";
    this.box = byId("reasoning");
    this.box.replaceChildren();
    this.box.classList.toggle("writing", shown);
    byId("reasoning-said").replaceChildren();
    byId("reasoning-part").hidden = !shown;
  }

  add(text) {
    const atEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 40;
    this.box.append(text);
    if (atEnd) this.box.scrollTop = this.box.scrollHeight;
    this.unsaid += text;
    const sentences = this.unsaid.match(/^[^]*[.!?\n](?=\s)/);
    if (sentences) this.say(sentences[0]);
  }

  say(text) {
    this.unsaid = this.unsaid.slice(text.length);
    byId("reasoning-said").replaceChildren(make("p", {}, text));
  }

  end(whole) {
    if (this.box.textContent !== whole) this.box.textContent = whole;
    if (this.unsaid) this.say(this.unsaid);
    this.box.classList.remove("writing");
  }

  stop() {
    this.box.classList.remove("writing");
    if (!this.box.textContent) byId("reasoning-part").hidden = true;
  }
}

/** One press of the button: its requests, and what has come of them. */
class Run {
  constructor(body) {
    this.body = body;
    this.stopping = new AbortController();
    this.reasoned = body.mode === "reasoned";
    this.answer = null;
    this.direct = null;
    this.reasoning = new Reasoning(this.reasoned);
  }

  get signal() {
    return this.stopping.signal;
  }

  async start() {
    setStatus(this.reasoned ? "Reasoning…" : "Searching…");
    this.show();
    const begun = performance.now();
    const comparison = this.reasoned ? this.compare() : null;
    try {
      await this.main();
      const took = ((performance.now() - begun) / 1000).toFixed(2);
      setStatus(`${counted(this.answer.items.length, "item")} in ${took} s.`);
      const problem = await comparison;
      if (problem) showError(problem);
    } catch (error) {
      if (this.signal.aborted) return;
      this.stop("No recommendation.");
      showError(error);
    }
  }

  stop(said) {
    if (!this.answer) setStatus(said);
    this.stopping.abort();
    this.reasoning.stop();
    this.show();
  }

  /** `promise`'s result, unless the run was stopped meanwhile. */
  async wait(promise) {
    const result = await promise;
    this.signal.throwIfAborted();
    return result;
  }

  async main() {
    if (!this.reasoned) {
      const asked = postJson("v1/recommend", this.body, { signal: this.signal });
      this.answer = await this.wait(asked);
      this.show();
      return;
    }
    const streamed = { ...this.body, stream: true };
    for await (const event of postEvents("v1/recommend", streamed, { signal: this.signal })) {
      this.signal.throwIfAborted();
      if (event.name === "reasoning") this.reasoning.add(event.data.text);
      else if (event.name === "error") throw Problem.of(event.data);
      else if (event.name === "items") this.answer = event.data;
    }
    if (!this.answer) throw new Problem("The server's answer has no items.");
    this.reasoning.end(this.answer.reasoning ?? "");
    this.show();
  }

  /** What direct mode says, deeper than is shown, so that most changes of rank are known. Resolves
   * to an error, if there was one: the reasoned answer comes first. */
  async compare() {
    const { max_reasoning_tokens: _, ...body } = this.body;
    const k = Math.min(MOST, Math.max(DEPTH, body.k));
    try {
      const asked = { ...body, mode: "direct", k };
      const answer = await this.wait(postJson("v1/recommend", asked, { signal: this.signal }));
      this.direct = { ...answer, asked: body.k };
      this.show();
      return null;
    } catch (error) {
      return this.signal.aborted ? null : error;
    }
  }

  show() {
    const tables = [];
    const answers = [];
    if (this.answer) {
      const caption = this.reasoned ? "With reasoning" : "Direct, without reasoning";
      tables.push(itemTable(caption, this.answer, this.direct));
      answers.push([this.reasoned ? "Reasoned" : "Direct", this.answer]);
    } else if (this.direct && !this.signal.aborted) {
      const hint = make("p", { className: "muted" }, "Comes when the reasoning is written.");
      tables.push(make("div", {}, make("h3", {}, "With reasoning"), hint));
    }
    if (this.direct) {
      tables.push(directTable(this.direct, this.answer));
      answers.push(["Direct", this.direct]);
    }
    byId("lists").replaceChildren(...tables);
    byId("measured-part").hidden = !this.answer;
    if (this.answer) byId("measured").replaceChildren(measurements(answers));
  }
}

/** The request that the form describes. */
function bodyOf(history) {
  const mode = chosen("mode");
  const body = { mode, k: byId("k").valueAsNumber };
  if (mode === "reasoned") body.max_reasoning_tokens = byId("longest").valueAsNumber;
  if (chosen("who") === "user") body.user_id = byId("user").value.trim();
  else body.history = history.events();
  return body;
}

function showChoices() {
  const user = chosen("who") === "user";
  byId("by-history").hidden = user;
  byId("by-user").hidden = !user;
  byId("user").required = user;
  byId("longest").disabled = chosen("mode") === "direct";
}

/** On a narrow window the answer is below the form. */
function bringIntoView() {
  const results = byId("results");
  if (results.getBoundingClientRect().top < window.innerHeight * 0.6) return;
  scroll(results, "start");
}

function begin() {
  const history = new HistoryList();
  const stop = byId("stop");
  let run = null;

  async function recommend(event) {
    event.preventDefault();
    if (!stop.hidden) run.stop("Stopped.");
    forgetErrors();
    const body = bodyOf(history);
    if (body.history?.length === 0) {
      showError(new Problem("Choose at least one item.", { field: "history" }));
      return;
    }
    const own = new Run(body);
    run = own;
    stop.hidden = false;
    bringIntoView();
    await own.start();
    if (run === own) hideStop();
  }

  function hideStop() {
    if (document.activeElement === stop) byId("results").focus({ preventScroll: true });
    stop.hidden = true;
  }

  function add(item) {
    forgetErrors();
    history.add(item);
  }

  byId("request").addEventListener("submit", recommend);
  byId("request").addEventListener("change", showChoices);
  stop.addEventListener("click", () => {
    run.stop("Stopped.");
    hideStop();
  });
  showChoices();
  catalogSearch(add, showError);
  getJson("v1/models").then(
    ({ data }) => {
      byId("model").textContent = data[0].id;
    },
    (error) => showError(error),
  );
}

begin();
