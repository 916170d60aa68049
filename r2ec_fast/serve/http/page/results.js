// What an answer looks like: tables of items, rank changes, and measurements.

import { make, unseen } from "./dom.js";

const percent = new Intl.NumberFormat("en", {
  style: "percent",
  minimumSignificantDigits: 2,
  maximumSignificantDigits: 2,
});

/** A probability, also a very small one. */
function probability(logProb) {
  const p = Math.exp(logProb);
  return p < 1e-6 ? "< 0.0001%" : percent.format(p);
}

const milliseconds = (ms) => (ms < 10 ? ms.toFixed(2) : ms.toFixed(ms < 100 ? 1 : 0));

function headed(...titles) {
  const cells = titles.map(([text, className = "", below = ""]) => {
    const cell = make("th", { scope: "col", className }, text);
    if (below) cell.append(second(below));
    return cell;
  });
  return make("thead", {}, make("tr", {}, ...cells));
}

/** A cell's second line. */
const second = (...parts) => make("span", { className: "second" }, " ", ...parts);

const RANK = ["Rank", "number"];
const LIKELY = ["Probability", "number", "score"];

/** The cells that every table of items has; `mark` stands on the item's second line. */
function cells(item, mark = null) {
  const name = make("th", { scope: "row", className: "item" }, item.title);
  const id = String(item.item_id) === item.title ? "" : String(item.item_id);
  if (id || mark) name.append(second(id, mark && id ? " · " : "", mark ?? ""));
  return [
    make("td", { className: "number rank" }, String(item.rank)),
    name,
    make(
      "td",
      { className: "number" },
      probability(item.log_prob),
      second(item.score.toFixed(3)),
    ),
  ];
}

/** What only those who see are shown. */
const sign = (text) => make("span", { "aria-hidden": "true" }, text);

/** How far an item moved against direct mode: a sign, a number, and words for screen readers. */
function change(rank, before, depth) {
  const cell = make("td", { className: "number" });
  const marked = (className, ...parts) => cell.append(make("span", { className }, ...parts));
  if (before === undefined) {
    marked("up", "new", unseen(`: not among direct's first ${depth}`));
  } else if (before === rank) {
    marked("muted", sign("="), unseen("same rank"));
  } else {
    if (before > rank) marked("up", sign("▲ "), unseen("up "), String(before - rank));
    else marked("down", sign("▼ "), unseen("down "), String(rank - before));
    cell.append(second(`from ${before}`));
  }
  return cell;
}

function table(caption, head, rows) {
  const captioned = make("caption", {}, caption);
  return make("table", { className: "items" }, captioned, head, make("tbody", {}, ...rows));
}

/** The items of an answer; with `direct`, an answer of direct mode, how their ranks changed. */
export function itemTable(caption, answer, direct = null) {
  const before = new Map((direct?.items ?? []).map((item) => [item.item_id, item.rank]));
  const titles = [RANK, ["Item"], LIKELY];
  if (direct) titles.push(["Change", "number"]);
  const rows = answer.items.map((item) => {
    const row = make("tr", {}, ...cells(item));
    if (direct) row.append(change(item.rank, before.get(item.item_id), direct.items.length));
    return row;
  });
  return table(caption, headed(...titles), rows);
}

/** The first items of direct mode, with those marked that the reasoned answer does not have. */
export function directTable(direct, answer) {
  const kept = new Set(answer?.items.map((item) => item.item_id));
  const rows = direct.items.slice(0, direct.asked).map((item) => {
    const gone = answer && !kept.has(item.item_id);
    const words = unseen(": not in the reasoned answer");
    const mark = gone ? make("span", { className: "down" }, "dropped", words) : null;
    return make("tr", {}, ...cells(item, mark));
  });
  return table("Direct, without reasoning", headed(RANK, ["Item"], LIKELY), rows);
}

const ENDS = { direct: "none", answer: "by itself", eos: "end of text", length: "at the limit" };

/** Latency by stage, tokens and versions, a column for each answer: [[title, answer], ...]. */
export function measurements(answers) {
  const rows = [
    ["Waiting (ms)", ({ timing }) => milliseconds(timing.queue_ms)],
    ["Prompt (ms)", ({ timing }) => milliseconds(timing.prompt_ms)],
    ["Reasoning (ms)", ({ timing }) => milliseconds(timing.reasoning_ms)],
    ["Search (ms)", ({ timing }) => milliseconds(timing.search_ms)],
    ["Total (ms)", ({ timing }) => milliseconds(timing.total_ms)],
    ["Prompt tokens", ({ usage }) => String(usage.prompt_tokens)],
    ["Reasoning tokens", ({ usage }) => String(usage.completion_tokens)],
    ["Reasoning ended", (answer) => ENDS[answer.finish_reason] ?? answer.finish_reason],
    ["User's state", ({ cached }) => (cached ? "from the cache" : "computed")],
    ["Item table", (answer) => `version ${answer.table_version}`],
  ];
  const head = headed([""], ...answers.map(([title]) => [title, "number"]));
  head.querySelector("th").replaceWith(make("td"));
  const body = rows.map(([title, value]) =>
    make(
      "tr",
      { className: title.startsWith("Total") ? "total" : "" },
      make("th", { scope: "row" }, title),
      ...answers.map(([, answer]) => make("td", { className: "number" }, value(answer))),
    ),
  );
  return make("table", { className: "measured" }, head, make("tbody", {}, ...body));
}
