// The official SDK (WASM) under Node: loads one instance per user, because the SDK asks one global
// `JuiceboxGetAuthToken(realmId)` and two users must not see each other's tokens.
//
// The package is made for bundlers: its entry imports the `.wasm` file. Here the module is compiled once and each
// instance gets its own copy of the glue, in which that global name is bound to the user's own function.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const folder = dirname(createRequire(import.meta.url).resolve("juicebox-sdk"));
const glueText = readFileSync(join(folder, "juicebox-sdk_bg.js"), "utf8");
const compiled = new WebAssembly.Module(readFileSync(join(folder, "juicebox-sdk_bg.wasm")));

globalThis.juiceboxTokenSources = new Map();
let instances = 0;

/** Return a fresh instance of the SDK whose tokens come from `source(realmIdHex)`. */
export async function loadSdk(source) {
  const number = ++instances;
  globalThis.juiceboxTokenSources.set(number, async (realmId) => source(Buffer.from(realmId).toString("hex")));
  const text = `const JuiceboxGetAuthToken = globalThis.juiceboxTokenSources.get(${number});\n${glueText}`;
  const glue = await import(`data:text/javascript;base64,${Buffer.from(text).toString("base64")}`);
  const instance = new WebAssembly.Instance(compiled, { "./juicebox-sdk_bg.js": glue });
  glue.__wbg_set_wasm(instance.exports);
  if (instance.exports.__wbindgen_start) instance.exports.__wbindgen_start();
  return glue;
}

/** Return what a rejected promise of the SDK says: a number for register and delete, an object for recover. */
export function describeError(error) {
  if (typeof error === "number") return { code: error, guesses_remaining: null };
  if (error && typeof error === "object" && "reason" in error) {
    return { code: error.reason, guesses_remaining: error.guesses_remaining ?? null };
  }
  return { code: null, message: String(error && error.stack ? error.stack : error) };
}
