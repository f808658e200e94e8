"""The status page's one style sheet; inline, so that the page is a single request (manager.md 2)."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

GROUP_COLOURS: Final = 8

STYLE: Final = """
:root { color-scheme: light dark; --text: #1c2530; --soft: #5b6775; --line: #d7dde4; --card: #fff; --page: #f3f5f8;
  --good: #0a7a50; --good-back: #dff5ea; --bad: #b3261e; --bad-back: #fde7e4; --note: #7a5a00; --note-back: #fdf3d3;
  --g0: #0072b2; --g1: #b26a00; --g2: #00805c; --g3: #a8477c; --g4: #5b5ea6; --g5: #b33c00; --g6: #6f6800;
  --g7: #3f6b78; --bad-fill: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --soft: #98a4b1; --line: #323c48; --card: #1b222b;
  --page: #12171d; --good: #6fdcab; --good-back: #123427; --bad: #ff9c92; --bad-back: #43191a; --note: #f0cf72;
  --note-back: #3a2f10; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .6rem; } h3 { font-size: .95rem; margin: 0; }
header { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin-bottom: 1rem; }
header p { margin: 0; color: var(--soft); flex-basis: 100%; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem;
  margin-bottom: 1rem; }
.badge { padding: .1rem .7rem; border-radius: 1rem; font-weight: 600; background: var(--good-back);
  color: var(--good); }
.badge.bad, .problems li { background: var(--bad-back); color: var(--bad); }
ul.lines { list-style: none; margin: 0; padding: 0; }
ul.lines li { padding: .35rem .6rem; border-radius: .4rem; margin-bottom: .35rem; overflow-wrap: anywhere; }
.advice li { background: var(--note-back); color: var(--note); }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }
.bar { display: block; width: 100%; height: 2.2rem; border-radius: .35rem; background: var(--bad-fill); }
.bar text { fill: #fff; font: 600 14px system-ui, sans-serif; text-anchor: middle; dominant-baseline: central; }
.bar line { stroke: var(--card); stroke-width: 2; }
.bar line.stuck { stroke: var(--bad-fill); stroke-width: 2.2rem; stroke-dasharray: 8 6; }
.bar:has(.stuck) text { stroke: #000; stroke-width: 3px; paint-order: stroke; }
.legend { margin: -.4rem 0 .8rem; font-size: .85rem; font-weight: 600; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; margin-bottom: .8rem; }
.group { border-top: 1px solid var(--line); padding-top: .6rem; margin-top: .6rem; }
.group h3 { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: baseline; }
.group h3 span { font-weight: 400; color: var(--soft); }
.dot { display: inline-block; min-width: 1.5rem; padding: 0 .4rem; border-radius: .3rem; color: #fff;
  text-align: center; background: var(--soft); font-weight: 600; font-style: normal; }
.group h3 .moving { color: var(--note); font-weight: 600; } .group h3 .bad { color: var(--bad); font-weight: 600; }
table { width: 100%; border-collapse: collapse; margin-top: .4rem; font-size: .92rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .2rem .6rem .2rem 0; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; padding-right: 1.6rem;
  white-space: nowrap; } th.n { white-space: normal; vertical-align: bottom; }
td[data-label=Agent], td[data-label=Address], td[data-label=State], td[data-label=Result] { overflow-wrap: anywhere; }
td code[title] { overflow-wrap: normal; } tr.lead td { font-weight: 600; }
.bad { color: var(--bad); } .soft { color: var(--soft); } .good { color: var(--good); }
footer { color: var(--soft); font-size: .85rem; }
@media (max-width: 640px) {
  body { padding: .6rem; } section { padding: .7rem; }
  .tall thead { display: none; } .tall tr { display: block; border-top: 1px solid var(--line); padding: .3rem 0; }
  .tall td, .tall td.n { display: flex; justify-content: space-between; gap: 1rem; text-align: right;
    padding: .08rem 0; }
  .tall td:has(span:empty) { display: none; }
  .tall td::before { content: attr(data-label); color: var(--soft); font-weight: 400; text-align: left; flex: none; }
  .wide { font-size: .8rem; } .wide th, .wide td { padding-right: .45rem; }
  .wide th:last-child, .wide td:last-child { padding-right: 0; }
}
""" + "".join(
    f".g{number} {{ fill: var(--g{number}); }} .dot.g{number} {{ background: var(--g{number}); }}\n"
    for number in range(GROUP_COLOURS)
)

STYLE_HASH: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
"""For the Content-Security-Policy: exactly this style sheet may apply, and nothing else may load or run."""
