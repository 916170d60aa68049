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
  const cells = titles.map(([text, className = ""]) =>
    make("th", { scope: "col", className }, text),
  );
  return make("thead", {}, make("tr", {}, ...cells));
}

function named(item) {
  const cell = make("th", { scope: "row", className: "item" }, item.title);
  if (String(item.item_id) !== item.title) {
    cell.append(make("span", { className: "id" }, ` ${item.item_id}`));
  }
  return cell;
}

/** How far an item moved against direct mode: a sign, a number, and words for screen readers. */
function change(rank, before, depth) {
  if (before === undefined) {
    return make("span", { className: "up" }, "new", unseen(`: not among direct's first ${depth}`));
  }
  const words = unseen(`, ${before} in direct mode`);
  if (before === rank) return make("span", { className: "muted" }, "=", unseen(" same rank"));
  if (before > rank) {
    return make("span", { className: "up" }, `▲ ${before - rank}`, unseen(" up"), words);
  }
  return make("span", { className: "down" }, `▼ ${rank - before}`, unseen(" down"), words);
}

function table(caption, head, rows) {
  const captioned = make("caption", {}, caption);
  return make("table", { className: "items" }, captioned, head, make("tbody", {}, ...rows));
}

/** The items of an answer; with `direct`, an answer of direct mode, how their ranks changed. */
export function itemTable(caption, answer, direct = null) {
  const before = new Map((direct?.items ?? []).map((item) => [item.item_id, item.rank]));
  const titles = [["Rank", "number"], ["Item"], ["Probability", "number"], ["Score", "number"]];
  if (direct) titles.push(["Change", "change"]);
  const rows = answer.items.map((item) => {
    const row = make(
      "tr",
      {},
      make("td", { className: "number rank" }, String(item.rank)),
      named(item),
      make("td", { className: "number" }, probability(item.log_prob)),
      make("td", { className: "number score" }, item.score.toFixed(3)),
    );
    if (direct) {
      const moved = change(item.rank, before.get(item.item_id), direct.items.length);
      row.append(make("td", { className: "change" }, moved));
    }
    return row;
  });
  return table(caption, headed(...titles), rows);
}

/** The first items of direct mode, with those marked that the reasoned answer does not have. */
export function directTable(direct, answer) {
  const kept = new Set(answer?.items.map((item) => item.item_id));
  const shown = direct.items.slice(0, answer?.items.length ?? direct.asked);
  const rows = shown.map((item) => {
    const cell = named(item);
    if (answer && !kept.has(item.item_id)) {
      const words = unseen(": not in the reasoned answer");
      cell.append(" ", make("span", { className: "down left" }, "left", words));
    }
    const number = (text) => make("td", { className: "number" }, text);
    const rank = make("td", { className: "number rank" }, String(item.rank));
    return make("tr", {}, rank, cell, number(probability(item.log_prob)));
  });
  const head = headed(["Rank", "number"], ["Item"], ["Probability", "number"]);
  return table("Direct, without reasoning", head, rows);
}

const ENDS = { direct: "none", answer: "by itself", eos: "end of text", length: "at the limit" };

/** Latency by stage, tokens and versions, a column for each answer: [[title, answer], ...]. */
export function measurements(answers) {
  const rows = [
    ["Waiting, ms", ({ timing }) => milliseconds(timing.queue_ms)],
    ["Prompt, ms", ({ timing }) => milliseconds(timing.prompt_ms)],
    ["Reasoning, ms", ({ timing }) => milliseconds(timing.reasoning_ms)],
    ["Search, ms", ({ timing }) => milliseconds(timing.search_ms)],
    ["Total, ms", ({ timing }) => milliseconds(timing.total_ms)],
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
