// Requests to the server: the key, problem documents, and streams of events.

import { byId } from "./dom.js";

const KEY = "r2ec-fast-key";

/** An error of the server or of the way to it; `field` is the part of the request that is wrong. */
export class Problem extends Error {
  constructor(detail, { status = 0, field = null } = {}) {
    super(detail);
    this.status = status;
    this.field = field;
  }

  static of(document) {
    return new Problem(document.detail || document.title, document);
  }
}

let asking = null; // one dialog at a time, for all requests that wait for a key

/** Ask for a key; resolves to whether one was given. */
function askKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    let given = false;
    const submit = () => {
      sessionStorage.setItem(KEY, input.value.trim());
      given = true;
    };
    const cancel = () => dialog.close();
    byId("key-form").addEventListener("submit", submit);
    byId("key-cancel").addEventListener("click", cancel);
    const closed = () => {
      byId("key-form").removeEventListener("submit", submit);
      byId("key-cancel").removeEventListener("click", cancel);
      input.value = "";
      asking = null;
      resolve(given);
    };
    dialog.addEventListener("close", closed, { once: true });
    dialog.showModal();
    byId("key-wrong").textContent = wrong ? "The server does not know this key." : "";
    input.focus();
  });
  return asking;
}

/** A header value holds no other characters. */
const sendable = (key) => /^[\x20-\x7e]+$/.test(key);

async function send(path, { body, signal }) {
  const key = sessionStorage.getItem(KEY);
  const headers = {};
  if (key && sendable(key)) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal };
  if (body) options.body = JSON.stringify(body);
  try {
    return { response: await fetch(path, options), key };
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server could not be reached.");
  }
}

async function problemOf(response) {
  let document = {};
  try {
    document = await response.json();
  } catch {
    // not a problem document; the status says what is known
  }
  const { field = null, detail = `The server answered ${response.status}.` } = document;
  const after = response.headers.get("Retry-After");
  const hint = after ? ` Try again in ${after} s.` : "";
  return new Problem(detail + hint, { status: response.status, field });
}

/** The response of a request, asked for again with a key where the server wants one. */
async function respond(path, { body = null, signal } = {}) {
  for (;;) {
    const { response, key } = await send(path, { body, signal });
    if (response.ok) return response;
    if (response.status !== 401) throw await problemOf(response);
    // another request may have got a key meanwhile
    const other = sessionStorage.getItem(KEY) !== key;
    if (!other && !(await askKey(Boolean(key)))) throw await problemOf(response);
    signal?.throwIfAborted();
  }
}

export async function getJson(path, options) {
  return (await respond(path, options)).json();
}

export async function postJson(path, body, options = {}) {
  return (await respond(path, { ...options, body })).json();
}

/** The events of a stream as { name, data }, until the server says that it is done. */
export async function* postEvents(path, body, options = {}) {
  const response = await respond(path, { ...options, body });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw new Problem("The server's answer ended before its time.");
    waiting += decoder.decode(value, { stream: true });
    const blocks = waiting.split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const event = parsed(block);
      if (event.data === "[DONE]") return;
      yield { name: event.name, data: JSON.parse(event.data) };
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The connection to the server broke.");
  }
}

function parsed(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) event.name = line.slice(7);
    else if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}
