"""How the page looks: on a screen, light or dark, from 320 pixels of width on, and on paper."""

from __future__ import annotations

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #ffffff; --panel: #f3f5f8; --mark: #0969da;
  --good: #1a7f37; --bad: #b4541a }
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--back) }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem }
p { margin: .6rem 0; max-width: 44rem } li { margin: .2rem 0 } ul { padding-left: 1.2rem }
code, pre { font: .87em/1.45 ui-monospace, Consolas, Menlo, monospace; overflow-wrap: anywhere; white-space: pre-wrap }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  margin: .6rem 0 }
.soft, figcaption { color: var(--soft); font-size: .9em }
.verdict { border-left: 4px solid var(--mark); background: var(--panel); border-radius: 0 6px 6px 0;
  padding: .5rem 1rem; margin: 1rem 0 }
.verdict p { max-width: none }
.missing { border-left: 4px solid var(--bad); background: var(--panel); border-radius: 0 6px 6px 0;
  padding: .4rem 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; font-weight: normal }
tr { border-top: 1px solid var(--line) }
thead tr, .facts tr:first-child { border-top: 0 }
thead th { font-weight: 600; vertical-align: bottom }
.facts th { color: var(--soft); width: 14rem; padding-right: 1rem }
.measured td, .measured thead th { text-align: right; font-variant-numeric: tabular-nums; width: 20% }
.measured thead th:first-child, .measured tbody th { text-align: left; width: auto }
.measured td { white-space: nowrap }
.measured .point th { font-weight: 600; padding: .9rem .5rem .3rem }
.measured th:first-child, .measured td:first-child { padding-left: .5rem }
.measured td:last-child, .measured thead th:last-child { padding-right: .5rem }
.measured .target { background: var(--panel); box-shadow: inset 3px 0 var(--mark) }
.tag { display: inline-block; border: 1px solid var(--mark); color: var(--mark); border-radius: 1em; padding: 0 .6em;
  font-size: .8em; font-weight: 600; margin-left: .4rem; white-space: nowrap }
.between { display: block; color: var(--soft); font-size: .82em }
figure { margin: 1rem 0 }
figure > img { display: block; width: 100%; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; padding: 4px }
.changed { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .8rem }
.changed figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: 6px; display: flex;
  flex-direction: column; justify-content: space-between }
.changed .both { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin-top: .5rem }
.changed .both > div { font-size: .85em; color: var(--soft) }
.changed img, .changed .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px;
  background: var(--panel) }
.changed .none { display: flex; align-items: center; justify-content: center; text-align: center; padding: .4rem;
  overflow-wrap: anywhere }
figcaption { margin-top: .4rem } .changed figcaption { margin-top: 0; color: var(--ink);
  overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 8; overflow: hidden }
.right { color: var(--good) } .wrong { color: var(--bad) }
@media (max-width: 600px) {
  body { font-size: 14px } main { padding: 1.2rem .8rem 3rem }
  .facts th { width: 38% } th, td { padding-right: .5rem }
  .measured td, .measured thead th { font-size: .86em; padding-right: .3rem }
}
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #d7dde4; --soft: #98a3af; --line: #343b44; --back: #14171b; --panel: #1e2329; --mark: #58a6ff;
    --good: #4ac26b; --bad: #e8935a }
  figure > img { border-color: transparent }
}
@page { size: A4; margin: 16mm 14mm }
@media print {
  body { font-size: 9pt; line-height: 1.4; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  main { max-width: none; padding: 0 } h2, h3 { break-after: avoid }
  tr, figure, .verdict, .missing, li { break-inside: avoid }
  p { orphans: 3; widows: 3 }
  h2 { margin-top: 1.4rem } th, td { padding-top: .16rem; padding-bottom: .16rem }
  .measured .point th { padding-top: .5rem } .measured tbody { break-inside: avoid }
  figure > img { max-height: 122mm; width: auto; margin: 0 auto }
  .changed { display: block }
  .changed figure { display: inline-flex; width: 32%; margin: 0 .6% 3mm 0;
    vertical-align: top }
}
"""
