// Run operations of the official client on request: one JSON object per line in, one per line out, in any order.
//
// In:  {"id", "op": "register"|"recover"|"delete", "instance", "configuration", "previous"?, "tokens",
//       "pin"?, "secret"?, "info"?, "num_guesses"?}        bytes are hex; the same "instance" shares SDK sessions
// Out: {"id", "ok": true, "secret"?, "ms"} or {"id", "ok": false, "code", "guesses_remaining", "message"?, "ms"}

import { createInterface } from "node:readline";
import { describeError, loadSdk } from "./official.mjs";

const users = new Map();

async function userOf(message) {
  let user = users.get(message.instance);
  if (user === undefined) {
    user = { tokens: {}, clients: new Map() };
    user.sdk = loadSdk((realm) => {
      const token = user.tokens[realm];
      if (token === undefined) throw new Error(`no token for realm ${realm}`);
      return token;
    });
    users.set(message.instance, user);
  }
  user.tokens = message.tokens;
  const key = JSON.stringify([message.configuration, message.previous ?? []]);
  if (!user.clients.has(key)) {
    const sdk = await user.sdk;
    const previous = (message.previous ?? []).map((value) => new sdk.Configuration(value));
    user.clients.set(key, new sdk.Client(new sdk.Configuration(message.configuration), previous));
  }
  return user.clients.get(key);
}

const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));

async function run(message) {
  const started = performance.now();
  try {
    const client = await userOf(message);
    let secret;
    if (message.op === "register") {
      await client.register(bytes(message.pin), bytes(message.secret), bytes(message.info), message.num_guesses);
    } else if (message.op === "recover") {
      secret = Buffer.from(await client.recover(bytes(message.pin), bytes(message.info))).toString("hex");
    } else if (message.op === "delete") {
      await client.delete();
    } else {
      throw new Error(`unknown op ${message.op}`);
    }
    return { id: message.id, ok: true, secret, ms: performance.now() - started };
  } catch (error) {
    return { id: message.id, ok: false, ...describeError(error), ms: performance.now() - started };
  }
}

createInterface({ input: process.stdin }).on("line", async (line) => {
  process.stdout.write(`${JSON.stringify(await run(JSON.parse(line)))}\n`);
});
