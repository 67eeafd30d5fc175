// What the page asks the server: JSON, and streams of server-sent events. Nothing else is ever asked.

const KEY = "puna-key";
let askForKey = async () => null;

export function onMissingKey(ask) { askForKey = ask; }
export function keepKey(key) { key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY); }

function headers(extra) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...extra, Authorization: `Bearer ${key}` } : extra;
}

async function ask(path, options) {
  const sent = { ...options, headers: headers(options.headers ?? {}) };
  let answer = await fetch(path, sent);
  if (answer.status === 401 && (await askForKey())) {
    answer = await fetch(path, { ...options, headers: headers(options.headers ?? {}) });
  }
  if (!answer.ok) throw new Error(await messageOf(answer));
  return answer;
}

async function messageOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

export async function get(path) {
  return (await ask(path, { method: "GET" })).json();
}

// Yields every event of a streamed answer as an object; ends after [DONE].
export async function* stream(path, body, signal) {
  const answer = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
